"""A report that was written before, read again."""

import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from edgepack.calibration.ranges import RangeTable, load_ranges
from edgepack.errors import ConfigError
from edgepack.results import BuildReport

REPORT = "report.json"
RANGES = "ranges.json"


def read_report(folder: Path) -> BuildReport:
    """The report in a package's ``folder``.

    Raises:
        ConfigError: there is none, or another version of edgepack wrote it.
    """
    path = folder / REPORT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return TypeAdapter(BuildReport).validate_python(content)
    except FileNotFoundError as error:
        raise ConfigError(f"{folder}: has no {REPORT}; give the folder of a finished build") from error
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the top"
        raise ConfigError(
            f"{path}: is no report of this edgepack ({where}: {first['msg'].lower()}); build again"
        ) from error


def read_ranges(folder: Path) -> RangeTable | None:
    """The ranges beside the report; ``None`` where they were not kept.

    Raises:
        CalibrationError: the file is broken.
    """
    path = folder / RANGES
    return load_ranges(path) if path.exists() else None
