"""The table of differentiable operators; a model with any other operator cannot be trained."""

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
"""Operators with subgraphs, which :mod:`edgepack.training.graph` runs."""

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
