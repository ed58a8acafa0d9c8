"""Units: the groups of nodes that the runtime executes as one integer kernel.

Given::

    x -> Conv(w, b) -> y -> Clip(0, 6) -> z

Result: one unit ``Conv`` from ``x`` to ``z``: Q/DQ belong around it, never between its nodes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import onnx_ir as ir

from edgepack.model import constant
from edgepack.target import Kernels


class Role(StrEnum):
    """What a unit can become on the target."""

    HEAVY = "heavy"
    """Has weights or a matrix product: worth an integer kernel for its own sake."""
    LIGHT = "light"
    """Elementwise, pooling, concat: integer only to keep its neighbours integer."""
    MOVE = "move"
    """Moves data: runs on stored integers, with the scale of its input."""
    FLOAT = "float"
    """No integer kernel on this target."""


HEAVY_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU"})
ACTIVATIONS = frozenset({"Relu", "Clip"})

# Inputs that carry data, by operator; the others (shapes, indices, axes) are never quantized.
_FIRST_INPUT_ONLY = frozenset(
    ["Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "MaxPool", "Resize", "Slice", "Split", "Gather", "Identity", "DepthToSpace", "SpaceToDepth", "Expand", "Tile", "Pad", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu", "Softmax", "Conv", "ConvTranspose", "Gemm", "Relu", "Clip", "LSTM", "GRU"]
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Unit:
    """A main node with the activation that follows it.

    ``inputs``: names of the activations that it reads; ``outputs``: names of the values that leave it;
    ``weight`` and ``bias``: names of constants, where it has them; ``constants``: other constant operands.
    """

    name: str
    op_type: str
    role: Role
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weight: str | None = None
    bias: str | None = None
    constants: tuple[str, ...] = ()
    activation: str | None = None
    """Name of the Relu or Clip node inside the unit."""
    reason: str = ""
    """Why the unit has no integer form, where it has none."""
    kind: str = ""
    """Units of one kind cost alike: the operator, for convolutions with the shape of the kernel."""


def find_units(model: ir.Model, kernels: Kernels) -> tuple[Unit, ...]:
    """All units of the main graph in topological order; every node is in exactly one."""
    taken: set[ir.Node] = set()
    units = []
    for node in model.graph:
        if node in taken:
            continue
        activation = _fused_activation(node) if node.op_type in ("Conv", "Gemm", "MatMul", "Add") else None
        if activation is not None:
            taken.add(activation)
        units.append(_unit(node, activation, kernels))
    return tuple(units)


def _unit(node: ir.Node, activation: ir.Node | None, kernels: Kernels) -> Unit:
    role, reason = _role(node, kernels)
    data = [v for v in _data_inputs(node) if v is not None]
    weight, bias = _weight_and_bias(node)
    constants = tuple(_name(v) for v in data if constant(v) is not None and v is not weight)
    inputs = tuple(_name(v) for v in data if constant(v) is None)
    last = activation or node
    outputs = tuple(_name(v) for v in last.outputs if v.name)
    return Unit(
        name=_node_name(node),
        op_type=node.op_type,
        role=role,
        inputs=inputs,
        outputs=outputs,
        weight=_name(weight) if weight is not None else None,
        bias=_name(bias) if bias is not None else None,
        constants=constants,
        activation=_node_name(activation) if activation is not None else None,
        reason=reason,
        kind=_kind(node),
    )


def _kind(node: ir.Node) -> str:
    if node.op_type != "Conv" or node.inputs[1] is None or node.inputs[1].shape is None:
        return node.op_type
    shape = node.inputs[1].shape
    group = node.attributes.get_int("group", 1)
    spread = "depthwise" if group > 1 and shape[1] == 1 else "grouped" if group > 1 else "dense"
    size = "x".join(str(d) for d in shape[2:])
    return f"{spread} {size} Conv"


def _role(node: ir.Node, kernels: Kernels) -> tuple[Role, str]:
    op = node.op_type
    if node.domain not in ("", "ai.onnx"):
        return Role.FLOAT, f"operator of domain {node.domain}"
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return Role.FLOAT, "control flow: its bodies stay as they are"
    if any(v is not None and not _is_float(v) for v in _data_inputs(node)):
        return Role.FLOAT, "works on integers already, or its type is unknown"
    if op in kernels.same_scale:
        if op == "Resize" and _attribute(node, "mode", "nearest") == "cubic":
            return Role.FLOAT, "cubic interpolation leaves the range of its input"
        return Role.MOVE, ""
    if op in HEAVY_OPS:
        return _heavy_role(node, kernels)
    if op in kernels.integer:
        return Role.LIGHT, ""
    return Role.FLOAT, f"the target's runtime has no integer kernel for {op}"


def _heavy_role(node: ir.Node, kernels: Kernels) -> tuple[Role, str]:
    weight, _ = _weight_and_bias(node)
    if node.op_type == "MatMul" and weight is None and any(constant(v) is not None for v in node.inputs if v):
        return Role.FLOAT, "the constant operand stands on the left, or has more than two dimensions"
    if node.op_type in ("Conv", "ConvTranspose", "Gemm") and weight is None:
        return Role.FLOAT, "its weight is computed at run time"
    if node.op_type == "Gemm":
        if _attribute(node, "transA", 0):
            return Role.FLOAT, "transA is set"
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and constant(bias) is None:
            return Role.FLOAT, "its bias is computed at run time"
    reachable = node.op_type in (*kernels.integer, *kernels.dynamic, *kernels.weight_only)
    if not reachable:
        return Role.FLOAT, f"the target's runtime has no integer kernel for {node.op_type}"
    return Role.HEAVY, ""


def _data_inputs(node: ir.Node) -> list[ir.Value | None]:
    if node.op_type in _FIRST_INPUT_ONLY:
        return list(node.inputs[:1])
    if node.op_type == "Where":
        return list(node.inputs[1:])
    return list(node.inputs)


def _weight_and_bias(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """The constant weight (of two dimensions for MatMul and Gemm) and the constant bias of a heavy node."""
    if node.op_type in ("LSTM", "GRU"):
        return node.inputs[1], None
    if node.op_type not in HEAVY_OPS or len(node.inputs) < 2:
        return None, None
    weight = node.inputs[1]
    array = constant(weight) if weight is not None else None
    if weight is None or array is None or (node.op_type in ("MatMul", "Gemm") and len(array.shape) != 2):
        return None, None
    bias = node.inputs[2] if len(node.inputs) > 2 and node.op_type != "MatMul" else None
    return weight, bias


def _fused_activation(node: ir.Node) -> ir.Node | None:
    """The Relu or constant Clip that alone reads the node's only output."""
    if len(node.outputs) != 1 or node.outputs[0].is_graph_output():
        return None
    uses = list(node.outputs[0].uses())
    if len(uses) != 1:
        return None
    after = uses[0].node
    if after.op_type not in ACTIVATIONS or after.graph is not node.graph or uses[0].idx != 0:
        return None
    if any(v is not None and constant(v) is None for v in after.inputs[1:]):
        return None
    return after


def activation_bounds(node: ir.Node) -> tuple[float, float]:
    """What a Relu or constant Clip clamps to; an absent bound is infinite."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    bounds = [-np.inf, np.inf]
    for i in (1, 2):
        value = node.inputs[i] if len(node.inputs) > i else None
        array = constant(value) if value is not None else None
        if array is not None:
            bounds[i - 1] = float(np.asarray(array).reshape(-1)[0])
    return bounds[0], bounds[1]


def consumers(model: ir.Model) -> Mapping[str, list[ir.Node]]:
    """Nodes that read each value, subgraph bodies included."""
    found: dict[str, list[ir.Node]] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for value in node.inputs:
            if value is not None and value.name:
                found.setdefault(value.name, []).append(node)
    return found


def _is_float(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT


def _attribute(node: ir.Node, name: str, default: int | str) -> int | str:
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    return attribute.value  # type: ignore[no-any-return]


def _name(value: ir.Value) -> str:
    assert value.name, "normalize names every value"
    return value.name


def _node_name(node: ir.Node) -> str:
    assert node.name, "normalize names every node"
    return node.name
