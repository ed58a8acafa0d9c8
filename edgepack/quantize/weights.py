"""Weights of planned nodes as matrices ``[groups, outputs, K]``, and back."""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.model import constant
from edgepack.quantize.plan import UnitPlan

Floats = npt.NDArray[np.float32]


def weight_of(node: ir.Node) -> Floats:
    """The constant weight of a planned node: the table of a Gather, the second operand of others."""
    array = constant(node.inputs[0] if node.op_type == "Gather" else node.inputs[1])
    assert array is not None, f"{node.name} was planned with a constant weight"
    return np.asarray(array, np.float32)


def bias_of(node: ir.Node, unit_plan: UnitPlan) -> Floats | None:
    """The constant bias of a node, float32 ``[channels]``, or ``None``."""
    array = constant(node.inputs[2]) if unit_plan.unit.bias is not None else None
    return None if array is None else np.asarray(array, np.float32).reshape(-1)


def has_rows(node: ir.Node) -> bool:
    """Whether the weight is a matrix that rows of the input are multiplied with."""
    return node.op_type in ("Conv", "MatMul", "Gemm")


def groups_of_weight(node: ir.Node, weight: npt.NDArray[np.generic] | None = None) -> npt.NDArray[np.generic]:
    """The weight (or an array in its layout) as ``[groups, outputs per group, K]``; a view where it can be."""
    array = weight_of(node) if weight is None else weight
    if node.op_type == "Conv":
        group = node.attributes.get_int("group", 1)
        return array.reshape(group, array.shape[0] // group, -1)
    return (array if _is_transposed(node) else array.T)[None]


def weight_from_groups(node: ir.Node, matrix: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """The inverse of :func:`groups_of_weight`."""
    if node.op_type == "Conv":
        return matrix.reshape(weight_of(node).shape)
    return np.ascontiguousarray(matrix[0] if _is_transposed(node) else matrix[0].T)


def _is_transposed(node: ir.Node) -> bool:
    return node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
