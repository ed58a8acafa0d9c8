"""Pruning: weights become zero where that costs least, and the rest makes up for it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from edgepack.config_passes import Prune
from edgepack.data import Samples
from edgepack.errors import ConfigError
from edgepack.model import clone
from edgepack.passes.sensitivity import noise, noise_alone, outputs_of
from edgepack.passes.sparse import (
    Matrix,
    Pattern,
    lowest,
    lowest_in_rows,
    prune_second_order,
    rates,
    salience,
)
from edgepack.passes.weights import matrix_of, weighty_units, write_weight
from edgepack.quantize.statistics import InputMoments, stream_moments
from edgepack.quantize.units import Unit

PATTERNS = {"unstructured": Pattern(), "2:4": Pattern(2, 4), "4:8": Pattern(4, 8)}
MOST_ZEROS = 0.99
"""Of all weights, at the end of a search."""
USUAL_MOST = 0.95
"""Of one weight, where the rates differ, unless more are asked for of all. With 0.99 a VGG-type net with 90%
zeros keeps 0.899 of its decisions, with 0.95 0.924."""
SPARE = 0.98
"""Of a budget: what second order and the ranges of activations add is not known before."""
STEPS = 6
"""Of halving, in a search for the share of zeros: to less than 2%."""


@dataclass(frozen=True, slots=True)
class PrunedWeight:
    """One weight: its unit, its size, and how many of its values are zero now."""

    unit: str
    values: int
    zeros: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What ends a search for the share of zeros, where the settings ask for one."""

    packed_bytes: Callable[[Mapping[str, Matrix]], int]
    """Of the int8 file with these weights, by unit."""
    accurate: Callable[[ir.Model], bool]
    """Whether the gate is met, and leaves room for what follows."""


class Pruned(NamedTuple):
    """A pruned model, and what became of each weight."""

    model: ir.Model
    rows: tuple[PrunedWeight, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    model: ir.Model
    wanted: Sequence[Unit]
    samples: Samples
    config: Prune
    threads: int
    seed: int

    def measured(self) -> Iterator[tuple[Unit, Matrix, InputMoments]]:
        """Each weight with the moments of its inputs.

        All moments at once may be more than memory holds: they are measured anew each time.
        """
        nodes = {n.name: n for n in self.model.graph}
        second = self.config.method in ("wanda", "second_order")
        for unit, moments in stream_moments(
            self.model,
            self.wanted,
            self.samples,
            second_order=second,
            threads=self.threads,
            seed=self.seed,
        ):
            yield unit, matrix_of(nodes[unit.name]), moments

    def pruned(self, share: Mapping[str, float]) -> Pruned:
        """The model with these shares of zeros, by unit."""
        made, rows = clone(self.model), []
        targets = {n.name: n for n in made.graph}
        for unit, weight, moments in self.measured():
            sparse = _zeroed(weight, moments, share[unit.name], self.config)
            write_weight(made.graph, targets[unit.name], weight, sparse, moments, "sparse")
            rows.append(PrunedWeight(unit.name, sparse.size, int((sparse == 0).sum())))
        return Pruned(made, tuple(rows))


def prune(
    model: ir.Model,
    units: Sequence[Unit],
    samples: Samples,
    config: Prune,
    *,
    threads: int,
    seed: int,
    limits: Limits | None = None,
) -> Pruned:
    """A model whose weights have the zeros that ``config`` asks for; biases take up the mean of the loss.

    Raises:
        ConfigError: a name to keep that no node has; nothing is left to prune; a budget out of reach.
        CalibrationError: the model fails on a sample.
    """
    nodes = {n.name: n for n in model.graph}
    wanted = weighty_units("prune", units, nodes, config.keep, config.keep_types)
    work = _Work(model, wanted, samples, config, threads, seed)
    if config.scope == "layer" or PATTERNS[config.pattern].of:
        return work.pruned(dict.fromkeys((u.name for u in wanted), config.sparsity))
    costs = {u.name: salience(w, m.second, config.method) for u, w, m in work.measured()}
    weights = dict.fromkeys(costs, 1.0)
    sparsity = _within_bytes(work, costs, weights, limits)
    found = work.pruned(_shares(costs, weights, sparsity))
    if config.scope == "measured":
        reference = outputs_of(model, samples, threads)
        alone = noise_alone(model, found.model, list(costs), reference, samples, threads)
        others = _measured_weights(costs, _shares(costs, weights, sparsity), alone)
        other_sparsity = _within_bytes(work, costs, others, limits)
        other = work.pruned(_shares(costs, others, other_sparsity))
        was, now = (noise(reference, outputs_of(m.model, samples, threads)) for m in (found, other))
        if now < was:
            found, weights, sparsity = other, others, other_sparsity
    if config.within_gate and limits is not None:
        return _within_gate(work, costs, weights, sparsity if config.max_bytes else MOST_ZEROS, limits)
    return found


def _shares(costs: Mapping[str, Matrix], weights: Mapping[str, float], sparsity: float) -> dict[str, float]:
    most = max(USUAL_MOST, (1 + sparsity) / 2)
    found = rates(list(costs.values()), sparsity, most, [weights[name] for name in costs])
    return dict(zip(costs, found, strict=True))


def _measured_weights(
    costs: Mapping[str, Matrix], shares: Mapping[str, float], noise_of: Mapping[str, float]
) -> dict[str, float]:
    """What a share of each layer's cost does to the model's outputs, as measured at ``shares``."""
    found = {}
    for name, cost in costs.items():
        ranked = np.sort(cost.reshape(-1).astype(np.float64))
        lost = ranked[: round(shares[name] * ranked.size)].sum() / max(ranked.sum(), 1e-30)
        if lost > 0 and noise_of[name] > 0:
            found[name] = noise_of[name] / float(lost)
    usual = float(np.median(list(found.values()))) if found else 1.0
    return {name: found.get(name, usual) for name in costs}


def _within_bytes(
    work: _Work, costs: Mapping[str, Matrix], weights: Mapping[str, float], limits: Limits | None
) -> float:
    """The least share of zeros with which the packed file keeps its budget; without one, what is asked for.

    How much of each layer is zero decides on the size, what the others become does not.
    """
    budget = work.config.max_bytes
    if budget is None or limits is None:
        return work.config.sparsity
    nodes = {n.name: n for n in work.model.graph}

    def size(sparsity: float) -> int:
        shares = _shares(costs, weights, sparsity)
        zeros = {name: lowest(cost, round(shares[name] * cost.size)) for name, cost in costs.items()}
        return limits.packed_bytes(
            {name: np.where(mask, np.float32(0), matrix_of(nodes[name])) for name, mask in zeros.items()}
        )

    if (smallest := size(MOST_ZEROS)) > budget:
        raise ConfigError(
            f"prune: max_bytes: {MOST_ZEROS:.0%} zeros still take {smallest} bytes when packed as int8, more "
            f"than {budget}; raise it, keep fewer layers, or remove channels first"
        )
    low, high = 0.0, MOST_ZEROS
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if size(middle) <= SPARE * budget else (middle, high)
    return high


def _within_gate(
    work: _Work, costs: Mapping[str, Matrix], weights: Mapping[str, float], most: float, limits: Limits
) -> Pruned:
    """The model with as many zeros as stay accurate, at most ``most``."""
    best = work.pruned(_shares(costs, weights, most))
    if limits.accurate(best.model):
        return best
    low, high = 0.0, most
    best = work.pruned(dict.fromkeys(costs, 0.0))
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = work.pruned(_shares(costs, weights, middle))
        if limits.accurate(found.model):
            low, best = middle, found
        else:
            high = middle
    return best


def _zeroed(weight: Matrix, moments: InputMoments, rate: float, config: Prune) -> Matrix:
    pattern, method = PATTERNS[config.pattern], config.method
    if method == "second_order" and moments.second is not None and moments.count:
        return prune_second_order(weight, moments.second, rate, pattern)
    cost = salience(weight, moments.second, method)
    mask = lowest_in_rows(cost, pattern) if pattern.of else lowest(cost, round(rate * cost.size))
    return np.where(mask, np.float32(0), weight)
