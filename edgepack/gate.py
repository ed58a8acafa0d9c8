"""The gate: limits on accuracy, bytes and latency, each against what was measured."""

from collections.abc import Sequence

from edgepack.report import Fidelity, GateLine, ModelFigures
from edgepack.target import Gate

HALF_DB = 3.0
"""Half of the noise."""


def judge(gate: Gate, models: Sequence[ModelFigures], *, asked_for: bool) -> tuple[GateLine, ...]:
    """One line for each limit that the gate has; the worst of the built models (all but the first) counts.

    A limit that the user ``asked_for`` and whose figure was not measured fails: what cannot be checked has
    not been passed. A target's default limit without a figure (a metric without labels) is left out.
    """
    original, built = models[0], models[1:]
    drops = [_drop(original, m) for m in built]
    lines = [
        _at_most("metric drop at most", gate.max_metric_drop, drops),
        _at_least("fidelity in dB at least", gate.min_sqnr_db, [_sqnr(m) for m in built]),
        _at_least("agreement at least", gate.min_agreement, [_agreement(m) for m in built]),
        _at_most("bytes at most", gate.max_bytes, [m.size_bytes for m in built]),
        _at_most("latency p50 in ms at most", gate.max_latency_ms, [m.latency_ms_p50 for m in built]),
        _at_least("times as fast at least", gate.min_speedup, [m.speedup for m in built]),
    ]
    return tuple(line for line in lines if line is not None and (asked_for or line.measured is not None))


def keeps_half(gate: Gate, original: Fidelity, found: Fidelity) -> bool:
    """Whether a model takes at most half of what the gate allows to be lost; the other half is for others.

    Half of the noise, which is 3 dB more, where fidelity is what counts. A gate without such a limit allows
    anything.
    """
    if gate.max_metric_drop is not None and original.metric is not None and found.metric is not None:
        return original.metric - found.metric <= gate.max_metric_drop / 2 + 1e-9
    if gate.min_sqnr_db is not None and found.sqnr_db is not None:
        return found.sqnr_db >= gate.min_sqnr_db + HALF_DB
    if gate.min_agreement is not None and found.agreement is not None:
        return 1 - found.agreement <= (1 - gate.min_agreement) / 2 + 1e-9
    return True


def _drop(original: ModelFigures, model: ModelFigures) -> float | None:
    before = original.fidelity.metric if original.fidelity else None
    after = model.fidelity.metric if model.fidelity else None
    return None if before is None or after is None else before - after


def _sqnr(model: ModelFigures) -> float | None:
    if model.fidelity is None:
        return None
    # Equal outputs have no noise: better than any limit.
    return model.fidelity.sqnr_db if model.fidelity.sqnr_db is not None else 999.0


def _agreement(model: ModelFigures) -> float | None:
    return model.fidelity.agreement if model.fidelity else None


def _at_most(limit: str, bound: float | None, figures: Sequence[float | None]) -> GateLine | None:
    if bound is None:
        return None
    known = [f for f in figures if f is not None]
    if len(known) < len(figures) or not known:
        return GateLine(limit, bound, None, False)
    # Differences of floats such as 0.9 - 0.895 carry noise in the last digits.
    return GateLine(limit, bound, max(known), max(known) <= bound + 1e-9)


def _at_least(limit: str, bound: float | None, figures: Sequence[float | None]) -> GateLine | None:
    if bound is None:
        return None
    known = [f for f in figures if f is not None]
    if len(known) < len(figures) or not known:
        return GateLine(limit, bound, None, False)
    return GateLine(limit, bound, min(known), min(known) >= bound - 1e-9)
