"""The section of the HTML report with figures of devices."""

from edgepack.report.devices import closeness, origin
from edgepack.report.html.markup import Html, table, tag
from edgepack.report.html.words import Section, duration, faster, section, size
from edgepack.results import BuildReport, DeviceFigures, DeviceRun

HEAD = ("File", "Device", "p50", "p90", "Min", "Speed", "Cold start", "Peak memory", "Against host")


def devices(report: BuildReport) -> Section | None:
    """A row for each file on each device, ordered by file; ``None`` where no device was measured."""
    if not report.devices:
        return None
    names = list(dict.fromkeys(m.model for run in report.devices for m in run.models))
    rows = [
        _row(run, found) for name in names for run in report.devices for found in run.models
        if found.model == name
    ]  # fmt: skip
    facts = [(tag("dt", run.device), tag("dd", f"{origin(run)}, {run.date}")) for run in report.devices]
    return section(
        "devices",
        "On devices",
        table(HEAD, rows, label="Figures of every file on every device", numbers=range(2, 8)),
        tag("dl", [part for pair in facts for part in pair], class_="facts"),
        lead="Measured on the device, interleaved. Speed is relative to the first file on the same device. "
        "The last column is the fidelity of the outputs against the build host's, on the same samples.",
    )


def _row(run: DeviceRun, found: DeviceFigures) -> list[Html | str]:
    return [
        found.model, run.device,
        duration(found.p50_ms), duration(found.p90_ms), duration(found.min_ms), faster(found.speedup),
        duration(found.cold_start_ms),
        size(found.peak_memory_bytes),
        closeness(found),
    ]  # fmt: skip
