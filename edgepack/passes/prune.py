"""Pruning: weights become zero where that costs least, and the rest makes up for it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepack.config_passes import Prune
from edgepack.data import Samples
from edgepack.model import clone
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
"""Of one weight, where the rates differ."""


@dataclass(frozen=True, slots=True)
class PrunedWeight:
    """One weight: its unit, its size, and how many of its values are zero now."""

    unit: str
    values: int
    zeros: int


def prune(
    model: ir.Model,
    units: Sequence[Unit],
    samples: Samples,
    config: Prune,
    *,
    threads: int,
    seed: int,
    on_sample: Callable[[], None] = lambda: None,
) -> tuple[ir.Model, tuple[PrunedWeight, ...]]:
    """A model whose weights have the zeros that ``config`` asks for; biases take up the mean of the loss.

    Raises:
        ConfigError: a name to keep that no node has; nothing is left to prune.
        CalibrationError: the model fails on a sample.
    """
    nodes = {n.name: n for n in model.graph}
    wanted = weighty_units("prune", units, nodes, config.keep, config.keep_types)
    pattern = PATTERNS[config.pattern]

    def measured() -> Iterator[tuple[Unit, InputMoments]]:
        second = config.method in ("wanda", "second_order")
        return stream_moments(
            model, wanted, samples, second_order=second, threads=threads, seed=seed, on_sample=on_sample
        )

    share = dict.fromkeys((u.name for u in wanted), config.sparsity)
    if config.scope == "global" and not pattern.of:
        # Moments of all weights at once may be more than memory holds: they are measured again below.
        costs = {u.name: salience(matrix_of(nodes[u.name]), m.second, config.method) for u, m in measured()}
        share = dict(zip(costs, rates(list(costs.values()), config.sparsity, MOST_ZEROS), strict=True))
    pruned, rows = clone(model), []
    targets = {n.name: n for n in pruned.graph}
    for unit, moments in measured():
        weight = matrix_of(nodes[unit.name])
        sparse = _zeroed(weight, moments, share[unit.name], pattern, config.method)
        write_weight(pruned.graph, targets[unit.name], weight, sparse, moments, "sparse")
        rows.append(PrunedWeight(unit.name, sparse.size, int((sparse == 0).sum())))
    return pruned, tuple(rows)


def _zeroed(weight: Matrix, moments: InputMoments, rate: float, pattern: Pattern, method: str) -> Matrix:
    if method == "second_order" and moments.second is not None and moments.count:
        return prune_second_order(weight, moments.second, rate, pattern)
    cost = salience(weight, moments.second, method)
    mask = lowest_in_rows(cost, pattern) if pattern.of else lowest(cost, round(rate * cost.size))
    return np.where(mask, np.float32(0), weight)
