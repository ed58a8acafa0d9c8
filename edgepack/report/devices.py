"""The report of runs on devices: their figures, and their outputs against the host's."""

from collections.abc import Sequence

from edgepack.report.tables import or_dash, size_text, table, time_text
from edgepack.results import DeviceFigures, DeviceRun


def closeness(found: DeviceFigures) -> str:
    """Fidelity of the outputs against the host's."""
    return "bit-exact" if found.exact else "equal" if found.sqnr_db is None else f"{found.sqnr_db:.1f} dB"


def origin(run: DeviceRun) -> str:
    """The processor and the runtime of a device."""
    runtimes = [f"onnxruntime {run.onnxruntime}" if run.onnxruntime else "", run.litert or ""]
    temperatures = [
        f"{t:.0f} °C" for t in (run.temperature_before_c, run.temperature_after_c) if t is not None
    ]
    parts = [
        f"{run.cpu} ({run.machine}), {run.threads} of {run.cores or '?'} cores",
        "" if run.clock_mhz is None else f"{run.clock_mhz:.0f} MHz",
        " → ".join(temperatures),
        *runtimes,
    ]
    return ", ".join(filter(None, parts))


def device_lines(runs: Sequence[DeviceRun]) -> list[str]:
    """One table of models for each device."""
    lines = []
    for run in runs:
        rows = [("", "size", "p50", "p90", "min", "speed", "cold start", "memory", "against host")]
        for m in run.models:
            rows.append(
                (
                    m.model, size_text(m.size_bytes), time_text(m.p50_ms), time_text(m.p90_ms),
                    time_text(m.min_ms), f"{m.speedup:.2f}×",
                    or_dash(time_text, m.cold_start_ms),
                    or_dash(size_text, m.peak_memory_bytes),
                    closeness(m),
                )
            )  # fmt: skip
        lines += ["", f"on {run.device}: {origin(run)}", *table(rows, right=range(1, 8))]
        for m in run.models:
            lines += [f"  {m.model}: {time_text(us / 1e3)} {op}" for op, us in list(m.ops_us.items())[:8]]
    return lines
