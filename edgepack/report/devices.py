"""What a report says of runs on devices: figures side by side, and how close outputs are to the host's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgepack.report.tables import size_text, table, time_text

FORM = 1
"""Of what ``bench --device --json`` prints; counted up when fields change their meaning."""


@dataclass(frozen=True, slots=True)
class DeviceFigures:
    """Everything that a device measured of one model file."""

    model: str
    size_bytes: int
    p50_ms: float
    p90_ms: float
    min_ms: float
    speedup: float
    """Median over rounds of the first model's latency by this one's."""
    speedup_error: float
    cold_start_ms: float | None
    peak_memory_bytes: int | None
    sha256: str
    """Of all outputs as the device computed them: types, shapes and bytes."""
    exact: bool
    """Whether the outputs are those of the build host to the bit."""
    sqnr_db: float | None
    """Of the outputs against the host's on the same samples; ``None`` where they are equal."""
    ops_us: Mapping[str, float]
    """Microseconds of a run by type of operator, where that was asked for."""


@dataclass(frozen=True, slots=True)
class DeviceRun:
    """One bench on one device."""

    device: str
    machine: str
    cpu: str
    cores: int | None
    system: str
    python: str
    numpy: str | None
    onnxruntime: str | None
    litert: str | None
    clock_mhz: float | None
    temperature_before_c: float | None
    temperature_after_c: float | None
    threads: int
    samples: int
    date: str
    models: tuple[DeviceFigures, ...]
    """The yardstick first."""


def closeness(found: DeviceFigures) -> str:
    """Outputs against the host's, in a word."""
    return "same bits" if found.exact else "equal" if found.sqnr_db is None else f"{found.sqnr_db:.1f} dB"


def origin(run: DeviceRun) -> str:
    """The processor and the runtime of a device, in a line."""
    runtimes = [f"onnxruntime {run.onnxruntime}" if run.onnxruntime else "", run.litert or ""]
    warmth = [f"{t:.0f} °C" for t in (run.temperature_before_c, run.temperature_after_c) if t is not None]
    parts = [
        f"{run.cpu} ({run.machine}), {run.threads} of {run.cores or '?'} cores",
        "" if run.clock_mhz is None else f"{run.clock_mhz:.0f} MHz",
        " → ".join(warmth),
        *runtimes,
    ]
    return ", ".join(filter(None, parts))


def device_lines(runs: Sequence[DeviceRun]) -> list[str]:
    """Devices one below the other; models of one device in one table."""
    lines = []
    for run in runs:
        rows = [("", "size", "p50", "p90", "min", "speed", "cold start", "memory", "to the host")]
        for m in run.models:
            rows.append(
                (
                    m.model, size_text(m.size_bytes), time_text(m.p50_ms), time_text(m.p90_ms),
                    time_text(m.min_ms), f"{m.speedup:.2f}×",
                    "-" if m.cold_start_ms is None else time_text(m.cold_start_ms),
                    "-" if not m.peak_memory_bytes else size_text(m.peak_memory_bytes),
                    closeness(m),
                )
            )  # fmt: skip
        lines += ["", f"on {run.device}: {origin(run)}", *table(rows, right=range(1, 8))]
        for m in run.models:
            lines += [f"  {m.model}: {time_text(us / 1e3)} {op}" for op, us in list(m.ops_us.items())[:8]]
    return lines


def with_run(runs: Sequence[DeviceRun], run: DeviceRun) -> tuple[DeviceRun, ...]:
    """``runs`` with one more, which takes the place of an earlier one of the same device."""
    return (*(old for old in runs if old.device != run.device), run)
