"""Unstructured and N:M pruning: sets the cheapest weights to zero and updates the others."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from edgepack.compression.allocation import allocate, noise_curves
from edgepack.compression.sparse import (
    Matrix,
    Pattern,
    damped,
    lowest,
    lowest_in_rows,
    prune_obs,
    rates,
    salience,
)
from edgepack.compression.weights import matrix_of, weighted_groups, write_weight
from edgepack.config.passes import Prune
from edgepack.data.augmentation import augmented
from edgepack.data.samples import Samples
from edgepack.errors import ConfigError
from edgepack.ir.model import clone
from edgepack.quantization.groups import FusionGroup
from edgepack.quantization.weights.moments import InputMoments, stream_moments

PATTERNS = {"unstructured": Pattern(), "2:4": Pattern(2, 4), "4:8": Pattern(4, 8)}
MOST_ZEROS = 0.99
"""Largest sparsity of all weights together in a search."""
USUAL_MOST = 0.95
"""Largest sparsity of one weight if sparsities differ and the total is not higher. With 0.99 a VGG-type net
with 90% zeros agrees in 0.899 of its decisions, with 0.95 in 0.924."""
SPARE = 0.98
"""Margin of a size budget, for the unknown effect of GPTQ and activation ranges."""
MOST_DAMPING = 1.0
"""Largest damping of moments, relative to their mean square; below it inputs / rows. That is close to the
best on other samples: 0.3 for the late bottlenecks of EfficientNet-Lite0, none with many rows."""
STEPS = 6
"""Bisection steps in a search for the sparsity: to less than 2%."""


@dataclass(frozen=True, slots=True)
class PrunedWeight:
    """One weight: its fusion group, its size and its number of zeros."""

    group: str
    values: int
    zeros: int


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a search for the sparsity."""

    packed_bytes: Callable[[Mapping[str, Matrix]], int]
    """Packed bytes of the int8 model with these weights, by group."""
    accurate: Callable[[ir.Model], bool]
    """Whether a model meets the gate with a margin for later stages."""


Shares = Callable[[float], dict[str, float]]
"""Sparsity of each group as a function of the total sparsity."""
BY_COUNT: Mapping[str, float] = {}
"""Dampings of the input moments, from the number of rows."""


class Pruned(NamedTuple):
    """A pruned model and the result for each weight."""

    model: ir.Model
    rows: tuple[PrunedWeight, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    model: ir.Model
    wanted: Sequence[FusionGroup]
    samples: Samples
    config: Prune
    threads: int
    seed: int

    def measured(self) -> Iterator[tuple[FusionGroup, Matrix, InputMoments]]:
        """Each weight with the moments of its inputs.

        Recomputes the moments in every call, because all of them may not fit in memory.
        """
        nodes = {n.name: n for n in self.model.graph}
        second = self.config.method in ("wanda", "second_order")
        for group, moments in stream_moments(
            self.model,
            self.wanted,
            augmented(self.samples, self.config.views, self.seed),
            with_second_moments=second,
            threads=self.threads,
            seed=self.seed,
        ):
            yield group, matrix_of(nodes[group.name]), moments

    def costs(self) -> dict[str, Matrix]:
        """The pruning cost of each value of each weight, by group."""
        return {u.name: salience(w, m.second, self.config.method) for u, w, m in self.measured()}

    def pruned(self, share: Mapping[str, float], damping: Mapping[str, float] = BY_COUNT) -> Pruned:
        """The model with these sparsities by group, refitted with damped moments."""
        made, rows = clone(self.model), []
        targets = {n.name: n for n in made.graph}
        for group, weight, moments in self.measured():
            sparse = _zeroed(weight, moments, share[group.name], damping.get(group.name), self.config)
            write_weight(made.graph, targets[group.name], weight, sparse, moments, "sparse")
            rows.append(PrunedWeight(group.name, sparse.size, int((sparse == 0).sum())))
        return Pruned(made, tuple(rows))


def prune(
    model: ir.Model,
    groups: Sequence[FusionGroup],
    samples: Samples,
    config: Prune,
    *,
    threads: int,
    seed: int,
    limits: Limits | None = None,
) -> Pruned:
    """Prune the weights as ``config`` requires; biases compensate the mean error.

    Raises:
        ConfigError: a pattern in ``keep`` matches no node; nothing is left to prune; the budget cannot be
        met;
            augmentation of inputs that are not images.
        CalibrationError: the model fails on a sample.
    """
    nodes = {n.name: n for n in model.graph}
    wanted = weighted_groups("prune", groups, nodes, config.keep, config.keep_types)
    work = _Work(model, wanted, samples, config, threads, seed)
    if config.scope == "layer" or PATTERNS[config.pattern].of:
        return work.pruned(dict.fromkeys((u.name for u in wanted), config.sparsity))
    measured = config.scope == "measured"
    costs = {} if measured and not config.max_bytes else work.costs()
    shares, damping = _by_noise(work) if measured else (_by_cost(costs), BY_COUNT)
    sparsity = _within_bytes(work, costs, shares, limits)
    if config.within_gate and limits is not None:
        return _within_gate(work, shares, damping, sparsity if config.max_bytes else MOST_ZEROS, limits)
    return work.pruned(shares(sparsity), damping)


def _most(sparsity: float) -> float:
    return max(USUAL_MOST, (1 + sparsity) / 2)


def _by_cost(costs: Mapping[str, Matrix]) -> Shares:
    def shares(sparsity: float) -> dict[str, float]:
        found = rates(list(costs.values()), sparsity, _most(sparsity))
        return dict(zip(costs, found, strict=True))

    return shares


def _by_noise(work: _Work) -> tuple[Shares, dict[str, float]]:
    """Sparsities and dampings by cross-validated noise at the outputs."""
    first, second = (replace(work, samples=half) for half in work.samples.halves())
    pairs = (
        (group, weight, one, other)
        for (group, weight, one), (_, _, other) in zip(first.measured(), second.measured(), strict=True)
    )

    def zeroed(weight: Matrix, moments: InputMoments, share: float, damping: float) -> Matrix:
        return _zeroed(weight, moments, share, damping, work.config)

    curves = noise_curves(work.model, pairs, zeroed, second.samples, work.threads)
    damping = {name: curve.damping for name, curve in curves.items()}
    return lambda sparsity: allocate(curves, sparsity, _most(sparsity)), damping


def _within_bytes(work: _Work, costs: Mapping[str, Matrix], shares: Shares, limits: Limits | None) -> float:
    """The least sparsity at which the packed file meets its budget; without a budget, that of the settings.

    The sparsity of each layer determines the size; the values of the other weights hardly do.
    """
    budget = work.config.max_bytes
    if budget is None or limits is None:
        return work.config.sparsity
    nodes = {n.name: n for n in work.model.graph}

    def size(sparsity: float) -> int:
        share = shares(sparsity)
        zeros = {name: lowest(cost, round(share[name] * cost.size)) for name, cost in costs.items()}
        return limits.packed_bytes(
            {name: np.where(mask, np.float32(0), matrix_of(nodes[name])) for name, mask in zeros.items()}
        )

    if (smallest := size(MOST_ZEROS)) > budget:
        raise ConfigError(
            f"prune: max_bytes: with {MOST_ZEROS:.0%} zeros the packed int8 model takes {smallest} bytes, "
            f"more than {budget}; raise it, keep fewer layers, or remove channels first"
        )
    low, high = 0.0, MOST_ZEROS
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if size(middle) <= SPARE * budget else (middle, high)
    return high


def _within_gate(
    work: _Work, shares: Shares, damping: Mapping[str, float], most: float, limits: Limits
) -> Pruned:
    """The model with the most zeros that is still accurate, at most ``most``."""
    best = work.pruned(shares(most), damping)
    if limits.accurate(best.model):
        return best
    low, high = 0.0, most
    best = work.pruned(dict.fromkeys((u.name for u in work.wanted), 0.0))
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = work.pruned(shares(middle), damping)
        if limits.accurate(found.model):
            low, best = middle, found
        else:
            high = middle
    return best


def _zeroed(
    weight: Matrix, moments: InputMoments, rate: float, damping: float | None, config: Prune
) -> Matrix:
    pattern, method = PATTERNS[config.pattern], config.method
    if method == "second_order" and moments.second is not None and moments.count:
        if damping is None:
            damping = min(weight.shape[2] / moments.count, MOST_DAMPING)
        return prune_obs(weight, damped(moments.second, damping), rate, pattern)
    cost = salience(weight, moments.second, method)
    mask = lowest_in_rows(cost, pattern) if pattern.of else lowest(cost, round(rate * cost.size))
    return np.where(mask, np.float32(0), weight)
