"""The table of operators: what is not in it cannot be trained through."""

from edgepack.training.operators import (
    activation,
    elementwise,
    indexing,
    linear,
    normalization,
    quantize,
    recurrent,
    reduce,
    resize,
    shapes,
    window,
)
from edgepack.training.step import Operator

CONTROL = frozenset({"If", "Loop", "Scan"})
"""Operators with graphs inside, which :mod:`edgepack.training.graph` runs itself."""

OPERATORS: dict[str, Operator] = {
    **activation.OPERATORS,
    **elementwise.OPERATORS,
    **indexing.OPERATORS,
    **linear.OPERATORS,
    **normalization.OPERATORS,
    **quantize.OPERATORS,
    **recurrent.OPERATORS,
    **reduce.OPERATORS,
    **resize.OPERATORS,
    **shapes.OPERATORS,
    **window.OPERATORS,
}
"""By operator type of the ONNX standard."""
