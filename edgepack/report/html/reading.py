"""Reads the report of a package."""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from edgepack import __version__
from edgepack.calibration.ranges import RangeTable, load_ranges
from edgepack.errors import ConfigError
from edgepack.results import SCHEMA_VERSION, BuildReport

REPORT = "report.json"
RANGES = "ranges.json"


def read_report(folder: Path) -> BuildReport:
    """The report in a package's ``folder``; one without a schema version is read as version 1.

    Raises:
        ConfigError: there is none, or this version of edgepack cannot read it.
    """
    path = folder / REPORT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        _refuse_newer(content, path)
        return TypeAdapter(BuildReport).validate_python(content)
    except FileNotFoundError as error:
        raise ConfigError(f"{folder}: has no {REPORT}; give the folder of a finished build") from error
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the top"
        raise ConfigError(
            f"{path}: is no report of this edgepack version ({where}: {first['msg'].lower()}); build again"
        ) from error


def _refuse_newer(content: Any, path: Path) -> None:
    """Refuse a newer schema: its fields may have other meanings, even with the same types."""
    version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        writer = content.get("edgepack_version", "a newer version")
        raise ConfigError(
            f"{path}: has schema version {version}, written by edgepack {writer}; this edgepack "
            f"({__version__}) reads versions up to {SCHEMA_VERSION}: update edgepack"
        )


def read_ranges(folder: Path) -> RangeTable | None:
    """The ranges of a package; ``None`` where there is no file of them.

    Raises:
        CalibrationError: the file is broken.
    """
    path = folder / RANGES
    return load_ranges(path) if path.exists() else None
