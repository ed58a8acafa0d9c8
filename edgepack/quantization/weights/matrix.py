"""Weights of planned nodes as matrices ``[groups, outputs, K]``, and back."""

from typing import TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.ir.model import constant
from edgepack.quantization.plan.types import GroupPlan

Floats = npt.NDArray[np.float32]
Scalar = TypeVar("Scalar", bound=np.generic)


def weight_of(node: ir.Node) -> Floats:
    """The constant weight of a planned node: the table of a Gather, the second operand of others."""
    array = constant(node.inputs[0] if node.op_type == "Gather" else node.inputs[1])
    assert array is not None, f"{node.name} was planned with a constant weight"
    return np.asarray(array, np.float32)


def bias_of(node: ir.Node, group_plan: GroupPlan) -> Floats | None:
    """The constant bias of a node, float32 ``[channels]``, or ``None``."""
    array = constant(node.inputs[2]) if group_plan.group.bias is not None else None
    return None if array is None else np.asarray(array, np.float32).reshape(-1)


def has_rows(node: ir.Node) -> bool:
    """Whether the operator multiplies rows (or patches) of the input with a weight matrix."""
    return node.op_type in ("Conv", "MatMul", "Gemm")


def to_groups(node: ir.Node, array: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """An array in the weight's layout as ``[groups, outputs per group, K]``; a view where it can be."""
    if node.op_type == "Conv":
        return array.reshape(node.attributes.get_int("group", 1), -1, int(np.prod(array.shape[1:])))
    return (array if _is_transposed(node) else array.T)[None]


def from_groups(node: ir.Node, matrix: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """The inverse of :func:`to_groups`."""
    if node.op_type == "Conv":
        return matrix.reshape(weight_of(node).shape)
    return np.ascontiguousarray(matrix[0] if _is_transposed(node) else matrix[0].T)


def _is_transposed(node: ir.Node) -> bool:
    return node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
