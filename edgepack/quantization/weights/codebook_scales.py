"""Codebook scales: scales at which all values of a weight are integers, set by a pass.

They are metadata of the initializer in the graph, are copied with it, and are not saved. Quantization
parameters of such a weight use these scales, so that it is not rounded a second time.
"""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

KEY = "edgepack.codebook_scales"


def set_codebook_scales(value: ir.Value, scale: npt.NDArray[np.float32]) -> None:
    """Record that the values of an initializer are int8 values times ``scale`` [output channels]."""
    value.meta[KEY] = scale


def codebook_scales_of(node: ir.Node) -> npt.NDArray[np.float32] | None:
    """The codebook scales of a node's weight, or ``None``."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    return None if value is None else value.meta.get(KEY)
