"""The report of a training run."""

import math
from dataclasses import asdict
from typing import Any

from edgepack.results import Curve
from edgepack.training.train import Traffic, Tuned

CURVE_POINTS = 12
CHART_POINTS = 80


def notes_of(made: Tuned) -> list[str]:
    """Notes for the report of a build."""
    log, last = made.log, made.log[-1]
    lines = [
        f"{last.step} steps in {last.elapsed_s:.0f} s, ended by {made.ended}; kept step {made.kept_step}"
        + (f", {made.between:.0%} of the way from the first weights" if made.between < 1 else ""),
        f"loss: {curve(made)}",
    ]
    if made.traffic is not None:
        lines.append(_traffic(made.traffic))
    judged = [e for e in log if e.held_out is not None]
    if judged:
        kept = next((e for e in judged if e.step == made.kept_step), judged[-1])
        assert kept.held_out is not None
        lines.append(f"held-out samples: loss {kept.held_out['loss']:.4g}, {_agreement(kept.held_out)}")
    return lines


def _traffic(sent: Traffic) -> str:
    share = sent.sent_bytes / max(sent.float_bytes, 1)
    return (
        f"{sent.workers} workers, each sent {sent.sent_bytes} bytes of gradients: {share:.3f} of the "
        f"{sent.float_bytes} that floats take"
    )


def _agreement(held_out: dict[str, float]) -> str:
    share = held_out["agreement"]
    return f"{share:.1%} agreement with the teacher" if math.isfinite(share) else "no classes"


def curve(made: Tuned) -> str:
    """The loss curve in a few numbers, each the mean over an equal part of the run."""
    losses = [e.loss for e in made.log]
    count = min(CURVE_POINTS, len(losses))
    parts = [losses[i * len(losses) // count : (i + 1) * len(losses) // count] for i in range(count)]
    return " ".join(f"{sum(p) / len(p):.3g}" for p in parts)


def curve_of(made: Tuned) -> Curve:
    """The loss curve for a chart."""
    log, count = made.log, min(CHART_POINTS, len(made.log))
    ends = [(i + 1) * len(log) // count for i in range(count)]
    parts = [log[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    judged = [(e.step, e.held_out["loss"]) for e in log if e.held_out is not None]
    return Curve(
        steps=tuple(part[-1].step for part in parts),
        losses=tuple(sum(e.loss for e in part) / len(part) for part in parts),
        judged_steps=tuple(step for step, _ in judged),
        judged_losses=tuple(loss for _, loss in judged),
        kept_step=made.kept_step,
    )


def facts(made: Tuned, output: str) -> dict[str, Any]:
    """The result as JSON."""
    last = made.log[-1]
    return {
        "model": output,
        "steps": last.step,
        "kept_step": made.kept_step,
        "ended": made.ended,
        "elapsed_s": last.elapsed_s,
        "first_loss": made.log[0].loss,
        "last_loss": last.loss,
        "sparsity": last.sparsity,
        "workers": None if made.traffic is None else asdict(made.traffic),
        "held_out": next((e.held_out for e in reversed(made.log) if e.held_out is not None), None),
    }


def text(made: Tuned, output: str) -> str:
    """The result as text."""
    return "".join(f"{line}\n" for line in [*notes_of(made), f"wrote {output}"])
