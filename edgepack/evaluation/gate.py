"""The gate: limits on accuracy, bytes and latency, compared with measured figures."""

from collections.abc import Sequence

from edgepack.config.target import Gate
from edgepack.results import EQUAL_DB, Fidelity, GateLine, Limit, ModelFigures

HALF_DB = 3.0
"""Half of the noise power, in dB."""


def judge(gate: Gate, models: Sequence[ModelFigures], *, asked_for: bool) -> tuple[GateLine, ...]:
    """One line for each limit of the gate; the worst of the built models (all but the first) counts.

    A limit that the user set (``asked_for``) fails where its figure was not measured. A default limit of the
    target without a figure (a metric without labels) is left out.
    """
    built = models[1:]
    lines = [
        *_accuracy_lines(gate, models[0].fidelity, [m.fidelity for m in built]),
        _at_most(Limit.BYTES, gate.max_bytes, [m.size_bytes for m in built]),
        _at_most(Limit.LATENCY_MS, gate.max_latency_ms, [m.latency_ms_p50 for m in built]),
        _at_least(Limit.SPEEDUP, gate.min_speedup, [m.speedup for m in built]),
    ]
    return tuple(line for line in lines if line is not None and (asked_for or line.measured is not None))


def judge_accuracy(
    gate: Gate, original: Fidelity, found: Fidelity, *, asked_for: bool
) -> tuple[GateLine, ...]:
    """The accuracy lines of :func:`judge` for one model."""
    lines = _accuracy_lines(gate, original, [found])
    return tuple(line for line in lines if line is not None and (asked_for or line.measured is not None))


def _accuracy_lines(
    gate: Gate, original: Fidelity | None, built: Sequence[Fidelity | None]
) -> list[GateLine | None]:
    return [
        _at_most(Limit.METRIC_DROP, gate.max_metric_drop, [_drop(original, f) for f in built]),
        _at_least(Limit.SQNR_DB, gate.min_sqnr_db, [_sqnr(f) for f in built]),
        _at_least(Limit.CENTRED_SQNR_DB, gate.min_centred_sqnr_db, [_centred(f) for f in built]),
        _at_least(Limit.AGREEMENT, gate.min_agreement, [f.agreement if f else None for f in built]),
    ]


def leaves_room(gate: Gate, original: Fidelity, found: Fidelity) -> bool:
    """Whether a model uses at most half of the accuracy loss that the gate allows, so that others can be
    added.

    For limits in dB: half of the noise, 3 dB more. True for a gate without an accuracy limit.
    """
    if gate.max_metric_drop is not None and original.metric is not None and found.metric is not None:
        return original.metric - found.metric <= gate.max_metric_drop / 2 + 1e-9
    if gate.min_sqnr_db is not None and found.sqnr_db is not None:
        return found.sqnr_db >= gate.min_sqnr_db + HALF_DB
    if gate.min_centred_sqnr_db is not None and found.centred_sqnr_db is not None:
        return found.centred_sqnr_db >= gate.min_centred_sqnr_db + HALF_DB
    if gate.min_agreement is not None and found.agreement is not None:
        return 1 - found.agreement <= (1 - gate.min_agreement) / 2 + 1e-9
    return True


def _drop(original: Fidelity | None, found: Fidelity | None) -> float | None:
    before = original.metric if original else None
    after = found.metric if found else None
    return None if before is None or after is None else before - after


def _sqnr(found: Fidelity | None) -> float | None:
    if found is None:
        return None
    return found.sqnr_db if found.sqnr_db is not None else EQUAL_DB


def _centred(found: Fidelity | None) -> float | None:
    if found is None:
        return None
    return found.centred_sqnr_db if found.sqnr_db is not None else EQUAL_DB


def _at_most(limit: Limit, bound: float | None, figures: Sequence[float | None]) -> GateLine | None:
    if bound is None:
        return None
    known = [f for f in figures if f is not None]
    if len(known) < len(figures) or not known:
        return GateLine(limit, bound, None, False)
    # Differences of floats such as 0.9 - 0.895 have rounding errors in the last digits.
    return GateLine(limit, bound, max(known), max(known) <= bound + 1e-9)


def _at_least(limit: Limit, bound: float | None, figures: Sequence[float | None]) -> GateLine | None:
    if bound is None:
        return None
    known = [f for f in figures if f is not None]
    if len(known) < len(figures) or not known:
        return GateLine(limit, bound, None, False)
    return GateLine(limit, bound, min(known), min(known) >= bound - 1e-9)
