"""Weight sharing: replaces equal and nearly equal initializers by one."""

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
"""Smallest initializer that is shared, in values; smaller ones are shapes, bounds and the like."""


class Replacement(NamedTuple):
    """A removed initializer, the one that replaces it, and the relative difference of their norms."""

    gone: str
    kept: str
    error: float


def share(model: ir.Model, config: Share) -> tuple[ir.Model, tuple[Replacement, ...]]:
    """Merge initializers of one shape and type whose relative difference is at most ``config.within``.

    Given: ``Gather(a, ids)``, ``MatMul(x, b)`` with ``|b - a| <= within * |b|``. Result: both consume ``a``.
    The first initializer is kept. Weights with different codebook scales are not merged. A weight that nearly
    equals a transposed embedding table becomes equal to it.
    """
    shared = clone(model)
    kept: dict[tuple[object, ...], list[tuple[ir.Value, Array]]] = {}
    replaced = []
    for value in list(shared.graph.initializers.values()):
        array = constant(value)
        if array is None or array.dtype != np.float32 or array.size < LEAST_VALUES or value.is_graph_output():
            continue
        scales = value.meta.get(KEY)
        group = kept.setdefault((array.shape, None if scales is None else scales.tobytes()), [])
        for first, other in group:
            error = _difference(array, other)
            if error <= config.within:
                replaced.append(Replacement(name_of(value), name_of(first), error))
                ir.convenience.replace_all_uses_with(value, first)
                del shared.graph.initializers[name_of(value)]
                break
        else:
            group.append((value, array))
    replaced += _tables(shared.graph, config.within)
    return shared, tuple(replaced)


def _tables(graph: ir.Graph, within: float) -> Iterator[Replacement]:
    """Make MatMul weights that nearly equal a transposed embedding table equal to it: int8 stores one
    copy."""
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
                yield Replacement(name_of(weight), f"{name_of(table)} transposed", error)


def _multiplies(weight: ir.Value) -> bool:
    """Whether only MatMul and Gemm nodes consume it, as the weight."""
    uses = weight.uses()
    return bool(uses) and all(u.node.op_type in ("MatMul", "Gemm") and u.idx == 1 for u in uses)


def _difference(array: Array, other: Array) -> float:
    """The norm of the difference over that of ``array``."""
    norm = float(np.linalg.norm(array.astype(np.float64)))
    lost = float(np.linalg.norm(array.astype(np.float64) - other))
    return 0.0 if lost == 0 else lost / max(norm, 1e-30)
