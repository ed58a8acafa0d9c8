"""Pruning: weights become zero where that costs least, and the rest makes up for it."""

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepack.config_passes import Prune
from edgepack.data import Samples
from edgepack.errors import ConfigError, did_you_mean
from edgepack.model import clone, constant, name_of, new_initializer
from edgepack.passes.sparse import (
    Matrix,
    Pattern,
    lowest,
    lowest_in_rows,
    prune_second_order,
    rates,
    salience,
)
from edgepack.quantize.statistics import InputMoments, stream_moments
from edgepack.quantize.units import Role, Unit
from edgepack.quantize.weights import from_groups, has_rows, to_groups, weight_of

PATTERNS = {"unstructured": Pattern(), "2:4": Pattern(2, 4), "4:8": Pattern(4, 8)}
MOST_ZEROS = 0.95
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
    wanted = _prunable(units, nodes, config)
    pattern = PATTERNS[config.pattern]

    def measured() -> Iterator[tuple[Unit, InputMoments]]:
        second = config.method in ("wanda", "second_order")
        return stream_moments(
            model, wanted, samples, second_order=second, threads=threads, seed=seed, on_sample=on_sample
        )

    share = dict.fromkeys((u.name for u in wanted), config.sparsity)
    if config.scope == "global" and not pattern.of:
        # Moments of all weights at once may be more than memory holds: they are measured again below.
        costs = {u.name: salience(_matrix(nodes[u.name]), m.second, config.method) for u, m in measured()}
        share = dict(zip(costs, rates(list(costs.values()), config.sparsity, MOST_ZEROS), strict=True))
    pruned, rows = clone(model), []
    targets = {n.name: n for n in pruned.graph}
    for unit, moments in measured():
        weight = _matrix(nodes[unit.name])
        sparse = _zeroed(weight, moments, share[unit.name], pattern, config.method)
        _write(pruned.graph, targets[unit.name], weight, sparse, moments)
        rows.append(PrunedWeight(unit.name, sparse.size, int((sparse == 0).sum())))
    return pruned, tuple(rows)


def _matrix(node: ir.Node) -> Matrix:
    return to_groups(node, weight_of(node))


def _prunable(units: Sequence[Unit], nodes: dict[str | None, ir.Node], config: Prune) -> list[Unit]:
    names = [u.name for u in units]
    for pattern in config.keep:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"prune: keep: no node is named {pattern!r}, {did_you_mean(pattern, names)}")
    found = [
        u
        for u in units
        if u.role is Role.HEAVY
        and u.weight is not None
        and u.inputs
        and has_rows(nodes[u.name])
        and u.op_type not in config.keep_types
        and not any(fnmatch.fnmatch(u.name, pattern) for pattern in config.keep)
    ]
    if not found:
        raise ConfigError("prune: the model has no weights to prune, or all are kept")
    return found


def _zeroed(weight: Matrix, moments: InputMoments, rate: float, pattern: Pattern, method: str) -> Matrix:
    if method == "second_order" and moments.second is not None and moments.count:
        return prune_second_order(weight, moments.second, rate, pattern)
    cost = salience(weight, moments.second, method)
    mask = lowest_in_rows(cost, pattern) if pattern.of else lowest(cost, round(rate * cost.size))
    return np.where(mask, np.float32(0), weight)


def _write(graph: ir.Graph, node: ir.Node, before: Matrix, after: Matrix, moments: InputMoments) -> None:
    """Put the new weight into ``node``, and what its mean output has changed by into its bias."""
    old = node.inputs[1]
    assert old is not None
    content = from_groups(node, after).astype(np.float32)
    node.replace_input_with(1, new_initializer(graph, f"{name_of(old)}_sparse", content))
    shift = np.einsum("gok,gk->go", after - before, moments.mean).reshape(-1)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    held = constant(bias)
    if bias is not None and held is not None and held.size == shift.size:
        corrected = (held.reshape(-1) - shift).reshape(held.shape).astype(np.float32)
        node.replace_input_with(2, new_initializer(graph, f"{name_of(bias)}_sparse", corrected))
    elif bias is None and node.op_type == "Conv":
        node.resize_inputs(3)
        made = new_initializer(graph, f"{name_of(old)}_bias", -shift.astype(np.float32))
        node.replace_input_with(2, made)
    for value in (old, bias):
        if value is not None and not value.uses() and name_of(value) in graph.initializers:
            del graph.initializers[name_of(value)]
