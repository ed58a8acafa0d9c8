"""Types of the lowering: views of tensors, the task of a fusion group, types and parameters."""

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
    """A tensor of the file that holds a value; its bytes are the value's in ``order``, in any shape."""

    tensor: int
    order: Order


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """The layout and the parameters of an operator's output."""

    order: Order
    shape: Shape | None = None
    """The operator's own shape, where it differs from the value's in ``order`` by axes of size 1."""
    kind: Quant | None = None
    """The operator's own parameters, where they differ from the planned ones and are converted."""


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A group to be written."""

    node: ir.Node
    plan: GroupPlan
    rounded: Rounded | None
    output: ir.Value
    """The group's output, after its activation."""
    bounds: Bounds
    """The bounds of its activation; unbounded where saturation clamps."""
    integer: bool

    def refuse(self, reason: str) -> ExportError:
        """An error with the node's name."""
        return ExportError(
            f"{self.node.op_type} {self.node.name!r} cannot be written as .tflite: {reason}; "
            "change the model, or take tflite out of the target's formats"
        )


def quant_of(params: QuantParams, axis: int = 0) -> Quant:
    """The int8 parameters for those of a plan, which may be uint8 with the same scale."""
    shift = 128 if params.type is QuantType.UINT8 else 0
    zero_point = np.atleast_1d(params.zero_point).astype(np.int64) - shift
    scale = np.atleast_1d(params.scale).astype(np.float32)
    return Quant(scale, np.broadcast_to(zero_point, scale.shape).copy(), axis)


def quant(scale: float, zero_point: int) -> Quant:
    """Per-tensor parameters."""
    return Quant(np.asarray([scale], np.float32), np.asarray([zero_point], np.int64))


def dtype_of(value: ir.Value) -> np.dtype[np.generic]:
    """The NumPy type of a value that is not quantized."""
    assert value.dtype is not None
    return np.dtype(value.dtype.numpy())


def stored_as(array: Array, kind: Quant) -> Array:
    """Real numbers quantized to int8."""
    params = QuantParams(QuantType.INT8, kind.scale[0], kind.zero_point.astype(np.int8)[0])
    return quantize(np.asarray(array, np.float32), params)
