"""The table of operators: what is not in it cannot be trained through."""

from edgepack.tune import (
    ops_activation,
    ops_elementwise,
    ops_index,
    ops_linear,
    ops_norm,
    ops_quantize,
    ops_recurrent,
    ops_reduce,
    ops_resize,
    ops_shape,
    ops_window,
)
from edgepack.tune.step import Operator

CONTROL = frozenset({"If", "Loop", "Scan"})
"""Operators with graphs inside, which :mod:`edgepack.tune.graph` runs itself."""

OPERATORS: dict[str, Operator] = {
    **ops_activation.OPERATORS,
    **ops_elementwise.OPERATORS,
    **ops_index.OPERATORS,
    **ops_linear.OPERATORS,
    **ops_norm.OPERATORS,
    **ops_quantize.OPERATORS,
    **ops_recurrent.OPERATORS,
    **ops_reduce.OPERATORS,
    **ops_resize.OPERATORS,
    **ops_shape.OPERATORS,
    **ops_window.OPERATORS,
}
"""By operator type of the ONNX standard."""
