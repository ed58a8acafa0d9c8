"""The stage breakdown of a report: figures of each step from the original to the built model."""

from collections.abc import Sequence

from edgepack.report.tables import or_dash, size_text, table, time_text
from edgepack.results import Step


def stage_breakdown_lines(steps: Sequence[Step]) -> list[str]:
    """A line for each step; empty where no pass runs between the original and the quantized model."""
    if len(steps) < 3:
        return []
    rows = [("step", "raw", "packed", "resident", "p50", "fidelity", "agreement", "metric")]
    for step in steps:
        rows.append(
            (
                step.name,
                size_text(step.raw_bytes),
                or_dash(size_text, step.packed_bytes),
                or_dash(size_text, step.resident_bytes),
                time_text(step.latency_ms_p50),
                "equal" if step.sqnr_db is None else f"{step.sqnr_db:.1f} dB",
                "" if step.agreement is None else f"{step.agreement:.4f}",
                "" if step.metric is None else f"{step.metric:.4f}",
            )
        )
    used = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return ["", *table([[row[i] for i in used] for row in rows], right=range(1, len(used)))]
