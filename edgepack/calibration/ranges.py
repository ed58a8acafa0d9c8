"""Calibrated ranges, saved as JSON with fingerprints for later builds."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgepack.calibration.histogram import Histogram
from edgepack.errors import CalibrationError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Range:
    """The range of one activation: the quantization range ``low`` to ``high``, and the measured extremes."""

    low: float
    high: float
    minimum: float
    maximum: float
    histogram: Histogram | None = None
    """Coarse histogram of the values; ``None`` where the observer needs none."""


@dataclass(frozen=True, slots=True)
class RangeTable:
    """Ranges by value name, with the fingerprints of the model and the samples."""

    ranges: Mapping[str, Range]
    observer: str
    model_fingerprint: str
    samples_fingerprint: str
    samples: int

    def save(self, path: Path) -> None:
        """Write as JSON: keys sorted, one tensor per line, floats with all digits."""
        content = {"edgepack_ranges": FORMAT, **asdict(self)}
        ranges = content.pop("ranges")
        lines = [
            f"  {json.dumps(name)}: {json.dumps(ranges[name], sort_keys=True)}" for name in sorted(ranges)
        ]
        head = json.dumps(content, indent=1, sort_keys=True).removesuffix("\n}")
        body = ",\n".join(lines)
        path.write_text(f'{head},\n "ranges": {{\n{body}\n }}\n}}\n', encoding="utf-8")

    def require(self, names: list[str], model_fingerprint: str, where: str) -> None:
        """Check that the table belongs to the model and covers ``names``.

        Raises:
            CalibrationError: measured on another model, or a tensor is missing.
        """
        if self.model_fingerprint != model_fingerprint:
            raise CalibrationError(
                f"{where}: these ranges were measured on another model (fingerprint "
                f"{self.model_fingerprint[:12]}, this model has {model_fingerprint[:12]}); calibrate again"
            )
        missing = [name for name in names if name not in self.ranges]
        if missing:
            raise CalibrationError(
                f"{where}: has no range for tensor {missing[0]!r} ({len(missing)} missing); calibrate again"
            )


def load_ranges(path: Path) -> RangeTable:
    """The table saved in ``path``.

    Raises:
        CalibrationError: no such file, not a table of ranges, or of a newer format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("edgepack_ranges")
        if version != FORMAT:
            raise CalibrationError(f"{path}: ranges of format {version}, this edgepack reads {FORMAT}")
        ranges = {name: _range(entry) for name, entry in content.pop("ranges").items()}
        table = RangeTable(ranges=ranges, **content)
        broken = next((name for name, r in ranges.items() if not _is_range(r)), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CalibrationError(
            f"{path}: is not a table of ranges ({type(error).__name__}: {error}); "
            "give the ranges.json of an earlier build"
        ) from error
    if broken is not None:
        raise CalibrationError(
            f"{path}: tensor {broken!r} has no usable range: {ranges[broken]}; calibrate again"
        )
    return table


def _range(entry: dict[str, Any]) -> Range:
    """A range from its JSON; the histogram is optional."""
    found = entry.pop("histogram", None)
    return Range(**entry, histogram=found and Histogram(**{**found, "counts": tuple(found["counts"])}))


def _is_range(entry: Range) -> bool:
    """Whether all four numbers are finite and in order; JSON may hold NaN, and the file may be edited."""
    return (
        all(math.isfinite(x) for x in (entry.low, entry.high, entry.minimum, entry.maximum))
        and entry.low <= entry.high
        and entry.minimum <= entry.maximum
    )
