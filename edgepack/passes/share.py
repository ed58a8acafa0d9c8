"""Sharing in a model: constants that are equal, or nearly, become one."""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from edgepack.config_passes import Share
from edgepack.model import Array, clone, constant, name_of
from edgepack.quantize.grid import KEY

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
    constant that stands first is kept. Weights with different grids stay apart.
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
    return tied, tuple(ties)


def _difference(array: Array, other: Array) -> float:
    """The norm of the difference over that of ``array``."""
    norm = float(np.linalg.norm(array.astype(np.float64)))
    lost = float(np.linalg.norm(array.astype(np.float64) - other))
    return 0.0 if lost == 0 else lost / max(norm, 1e-30)
