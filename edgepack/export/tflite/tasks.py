"""What lowering works on: views of tensors, a group's task, types and parameters."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepack.errors import ExportError
from edgepack.export.tflite.flatbuffer import Quant
from edgepack.export.tflite.layout import Order, Shape
from edgepack.ir.arrays import Array
from edgepack.ir.numerics import quantize
from edgepack.ir.scheme import QuantParams, QuantScheme, QuantType
from edgepack.quantization.plan.types import GroupPlan
from edgepack.quantization.weights.rounding import Rounded

FLOAT = np.dtype(np.float32)
Bounds = tuple[float, float]
UNBOUNDED: Bounds = (-np.inf, np.inf)
SCHEME = QuantScheme(QuantType.INT8, symmetric=False)


@dataclass(frozen=True, slots=True)
class View:
    """A tensor of the file that holds a value; its bytes are the value's in ``order``, whatever its shape."""

    tensor: int
    order: Order


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """How an operator leaves the output of its group in the file."""

    order: Order
    shape: Shape | None = None
    """Where the operator's own differs from the value's in ``order``, by axes of one entry."""
    kind: Quant | None = None
    """Where the operator's parameters are not those planned, so that they are converted."""


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One group to be written."""

    node: ir.Node
    plan: GroupPlan
    rounded: Rounded | None
    output: ir.Value
    """What leaves the group, behind its activation."""
    bounds: Bounds
    """What its activation clamps to; unbounded where saturation does it."""
    integer: bool

    def refuse(self, reason: str) -> ExportError:
        """An error that names the node."""
        return ExportError(
            f"{self.node.op_type} {self.node.name!r} cannot be written as .tflite: {reason}; "
            "change the model, or take tflite out of the target's formats"
        )


def quant_of(params: QuantParams, axis: int = 0) -> Quant:
    """Parameters of the file for those of a plan: int8, where the plan may say uint8 with the same scale."""
    shift = 128 if params.type is QuantType.UINT8 else 0
    zero_point = np.atleast_1d(params.zero_point).astype(np.int64) - shift
    scale = np.atleast_1d(params.scale).astype(np.float32)
    return Quant(scale, np.broadcast_to(zero_point, scale.shape).copy(), axis)


def quant(scale: float, zero_point: int) -> Quant:
    """Parameters of a whole tensor."""
    return Quant(np.asarray([scale], np.float32), np.asarray([zero_point], np.int64))


def dtype_of(value: ir.Value) -> np.dtype[np.generic]:
    """The NumPy type of a value that is not quantized."""
    assert value.dtype is not None
    return np.dtype(value.dtype.numpy())


def stored_as(array: Array, kind: Quant) -> Array:
    """int8 integers of real numbers."""
    params = QuantParams(QuantType.INT8, kind.scale[0], kind.zero_point.astype(np.int8)[0])
    return quantize(np.asarray(array, np.float32), params)
