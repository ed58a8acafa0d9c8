"""Sharing in a model: constants that are equal, or nearly, become one."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from edgepack.config.passes import Share
from edgepack.graph.tied_embeddings import tables_of, transposed
from edgepack.ir.arrays import Array
from edgepack.ir.model import clone, constant, name_of
from edgepack.quantization.weights.codebook_scales import KEY

LEAST_VALUES = 64
"""Of a constant; smaller ones are shapes, bounds and the like, and not worth a tie."""


class Tie(NamedTuple):
    """A constant that is gone, the one in its place, and the share of its norm that they differ by."""

    gone: str
    kept: str
    error: float


def share(model: ir.Model, config: Share) -> tuple[ir.Model, tuple[Tie, ...]]:
    """A model in which constants of one shape and type that differ by at most ``config.within`` are one.

    Given: ``Gather(a, ids)``, ``MatMul(x, b)`` with ``|b - a| <= within * |b|``. Result: both read ``a``. The
    constant that stands first is kept. Weights with different grids stay apart. A weight that nearly is a
    table's transposed becomes that.
    """
    tied = clone(model)
    kept: dict[tuple[object, ...], list[tuple[ir.Value, Array]]] = {}
    ties = []
    for value in list(tied.graph.initializers.values()):
        array = constant(value)
        if array is None or array.dtype != np.float32 or array.size < LEAST_VALUES or value.is_graph_output():
            continue
        grid = value.meta.get(KEY)
        group = kept.setdefault((array.shape, None if grid is None else grid.tobytes()), [])
        for first, other in group:
            error = _difference(array, other)
            if error <= config.within:
                ties.append(Tie(name_of(value), name_of(first), error))
                ir.convenience.replace_all_uses_with(value, first)
                del tied.graph.initializers[name_of(value)]
                break
        else:
            group.append((value, array))
    ties += _tables(tied.graph, config.within)
    return tied, tuple(ties)


def _tables(graph: ir.Graph, within: float) -> Iterator[Tie]:
    """Weights of products that nearly are a table's transposed become that: as integers they are one copy."""
    for table in list(tables_of(graph)):
        rows = constant(table)
        assert rows is not None
        for weight in graph.initializers.values():
            array = constant(weight)
            like = array is not None and array.shape == rows.shape[::-1] and array.dtype == rows.dtype
            if array is None or not like or weight is table or not _multiplies(weight):
                continue
            error = _difference(array, rows.T)
            if 0 < error <= within:
                assert table.const_value is not None
                weight.const_value = transposed(table.const_value, [1, 0])
                yield Tie(name_of(weight), f"{name_of(table)} transposed", error)


def _multiplies(weight: ir.Value) -> bool:
    """Whether products read it, and nothing else."""
    uses = weight.uses()
    return bool(uses) and all(u.node.op_type in ("MatMul", "Gemm") and u.idx == 1 for u in uses)


def _difference(array: Array, other: Array) -> float:
    """The norm of the difference over that of ``array``."""
    norm = float(np.linalg.norm(array.astype(np.float64)))
    lost = float(np.linalg.norm(array.astype(np.float64) - other))
    return 0.0 if lost == 0 else lost / max(norm, 1e-30)
