"""The grid of a weight: scales at which all of its values are integers, where a pass has put them there.

It stands with the constant in the graph, outside of what is saved, and goes with it into copies. Whoever
chooses parameters for such a weight takes these scales, so that nothing is rounded a second time.
"""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

KEY = "edgepack.grid"


def set_codebook_scales(value: ir.Value, scale: npt.NDArray[np.float32]) -> None:
    """Note that a constant's values are integers of int8 times ``scale``, one an output channel, in order."""
    value.meta[KEY] = scale


def codebook_scales_of(node: ir.Node) -> npt.NDArray[np.float32] | None:
    """The scales of a node's weight, or ``None`` where it has no grid."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    return None if value is None else value.meta.get(KEY)
