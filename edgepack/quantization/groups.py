"""Fusion groups: nodes that the runtime executes as one integer kernel.

Given::

    x -> Conv(w, b) -> y -> Clip(0, 6) -> z

Result: one group ``Conv`` from ``x`` to ``z``. Q/DQ stand around it, never between its nodes.
"""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.config.recipe import Override
from edgepack.config.target import Kernels
from edgepack.graph.tied_embeddings import tied_weights
from edgepack.ir.model import constant, walk_nodes
from edgepack.quantization.storable import holds_a_mask, storable
from edgepack.results import NO_REASON, Cause, Reason


class Role(StrEnum):
    """How a group can be quantized on the target."""

    HEAVY = "heavy"
    """Convolution, matrix product or recurrent operator: an integer kernel saves time by itself."""
    LIGHT = "light"
    """Elementwise, pooling, concat: integer only to avoid conversions between integer neighbours."""
    MOVE = "move"
    """Moves data: runs on the quantized values, its output has the scale of its input."""
    FLOAT = "float"
    """No integer kernel on this target."""


HEAVY_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU"})
RECURRENT_OPS = frozenset({"LSTM", "GRU"})
ACTIVATIONS = frozenset({"Relu", "Clip"})

# Operators with one data input; their other inputs (shapes, indices, axes) are never quantized.
# fmt: off
_FIRST_INPUT_ONLY = frozenset([
    "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "MaxPool", "Resize", "Slice", "Split",
    "Gather", "Identity", "DepthToSpace", "SpaceToDepth", "Expand", "Tile", "Pad", "AveragePool",
    "GlobalAveragePool", "Sigmoid", "LeakyRelu", "Softmax", "Conv", "ConvTranspose", "Gemm", "Relu",
    "Clip", "LSTM", "GRU", "HardSigmoid", "HardSwish", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin",
    "BatchNormalization", "PRelu",
])
# fmt: on


@dataclass(frozen=True, slots=True)
class FusionGroup:
    """A main node with the activation that follows it.

    ``inputs`` and ``outputs``: names of its activations; ``weight`` and ``bias``: names of initializers,
    where it has them; ``constants``: names of its other constant operands.
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
    """Name of the Relu or Clip node inside the group."""
    reason: Reason = NO_REASON
    """Why the group has no integer kernel, where it has none."""
    kind: str = ""
    """Groups of one kind take similar time: the operator, for convolutions with the shape of the kernel."""
    table: str | None = None
    """Name of the embedding table that the weight, or its transpose, is tied to: both store one tensor."""
    stored: tuple[str, ...] = ()
    """Names of initializers that are worth storing as int8 where the group has no integer kernel."""


def override_for(group: FusionGroup, overrides: Iterable[Override]) -> Override | None:
    """The override that applies to ``group``: the first by name, else the first by operator type."""
    overrides = tuple(overrides)
    by_name = [o for o in overrides if any(fnmatch.fnmatch(group.name, p) for p in o.nodes)]
    return next(iter([*by_name, *(o for o in overrides if group.op_type in o.op_types)]), None)


def find_fusion_groups(model: ir.Model, kernels: Kernels) -> tuple[FusionGroup, ...]:
    """All groups of the main graph in topological order; every node is in exactly one."""
    taken: set[ir.Node] = set()
    groups = []
    for node in model.graph:
        if node in taken:
            continue
        activation = _fused_activation(node) if node.op_type in kernels.fuses_activation else None
        if activation is not None:
            taken.add(activation)
        groups.append(_group(node, activation, kernels))
    tied = tied_weights(model.graph) if "Gather" in kernels.weight_only else {}
    return (
        tuple(replace(group, table=tied.get(group.weight or "")) for group in groups)
        if tied
        else tuple(groups)
    )


def _group(node: ir.Node, activation: ir.Node | None, kernels: Kernels) -> FusionGroup:
    role, reason = _role(node, kernels)
    data = [v for v in _data_inputs(node) if v is not None]
    weight, bias = _weight_and_bias(node)
    operands = [v for v in data if constant(v) is not None and v is not weight]
    if node.op_type in RECURRENT_OPS and weight is not None:
        operands += [v for v in node.inputs[2:3] if v is not None]
    constants = tuple(_name(v) for v in operands)
    inputs = tuple(_name(v) for v in data if constant(v) is None)
    last = activation or node
    outputs = tuple(_name(v) for v in _used(last.outputs))
    return FusionGroup(
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
        stored=storable(node) if kernels.folds_constants and role is not Role.HEAVY and inputs else (),
    )


def _kind(node: ir.Node) -> str:
    if node.op_type != "Conv" or node.inputs[1] is None or node.inputs[1].shape is None:
        return node.op_type
    shape = node.inputs[1].shape
    group = node.attributes.get_int("group", 1)
    spread = "depthwise" if group > 1 and shape[1] == 1 else "grouped" if group > 1 else "dense"
    size = "x".join(str(d) for d in shape[2:])
    return f"{spread} {size} Conv"


def _role(node: ir.Node, kernels: Kernels) -> tuple[Role, Reason]:
    op = node.op_type
    if not _used(node.outputs):
        return _in_float(Cause.NEIGHBOURS, "nothing uses its output")
    if node.domain not in ("", "ai.onnx"):
        return _in_float(Cause.NO_KERNEL, f"operator of domain {node.domain}")
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return _in_float(Cause.OPERATOR, "control flow: its subgraphs stay in float")
    other = next(
        (v for v in (*_data_inputs(node), *_used(node.outputs)) if v is not None and not _is_float(v)), None
    )
    if other is not None:
        kind = "of unknown type" if other.dtype is None else other.dtype.name.lower()
        what = f"is {kind}, not float32"
        return Role.FLOAT, Reason(Cause.OPERATOR, f"{other.name!r} {what}", f"an input {what}")
    if op in kernels.same_scale:
        reason = _not_a_mere_move(node, kernels)
        return _in_float(Cause.OPERATOR, reason) if reason else (Role.MOVE, NO_REASON)
    if op in HEAVY_OPS:
        return _heavy_role(node, kernels)
    if op not in kernels.integer:
        return Role.FLOAT, no_kernel("integer", op)
    if op == "HardSigmoid" and node.attributes.get_float("alpha", 0.2) <= 0:
        return _in_float(Cause.OPERATOR, "alpha is not positive, its int8 substitute rises")
    if op == "AveragePool" and (reason := _odd_average(node)):
        return _in_float(Cause.OPERATOR, reason)
    if any(_is_mask(constant(v)) for v in _data_inputs(node)):
        return _in_float(
            Cause.OPERATOR, "a constant operand has infinity, or a large value for it, as masks do"
        )
    return Role.LIGHT, NO_REASON


def no_kernel(kind: str, op_type: str) -> Reason:
    """The reason where the target's runtime has no kernel of this ``kind`` for the operator."""
    summary = f"the target's runtime has no {kind} kernel"
    return Reason(Cause.NO_KERNEL, f"{summary} for {op_type}", summary)


def _in_float(cause: Cause, text: str) -> tuple[Role, Reason]:
    return Role.FLOAT, Reason(cause, text)


def _not_a_mere_move(node: ir.Node, kernels: Kernels) -> str:
    """Why an operator does not only move quantized values in this runtime; empty if it does."""
    if node.op_type == "Split" and len(_used(node.outputs)) < len(node.outputs):
        return "the runtime splits integers only where every output is used"
    if node.op_type == "Pad" and _attribute(node, "mode", "constant") == "constant":
        filling = node.inputs[2] if len(node.inputs) > 2 else None
        array = constant(filling)
        zero = filling is None or (array is not None and not np.any(array))
        return "" if zero else "it pads with a value other than zero"
    if node.op_type != "Resize":
        return ""
    if _attribute(node, "mode", "nearest") not in kernels.resize_modes:
        return "the runtime interpolates in float"
    if _attribute(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return "it extrapolates with a constant"
    return ""


def _odd_average(node: ir.Node) -> str:
    """Why the integer kernel of AveragePool does not support these attributes; empty if it does."""
    dilations = node.attributes.get("dilations")
    if dilations is not None and set(dilations.as_ints()) != {1}:
        return "the integer kernel has no dilations"
    if _attribute(node, "ceil_mode", 0) and _attribute(node, "count_include_pad", 0):
        return "ceil_mode with count_include_pad: the integer kernel counts elements beyond the padding"
    return ""


def _is_mask(array: npt.NDArray[Any] | None) -> bool:
    return array is not None and holds_a_mask(array)


def _heavy_role(node: ir.Node, kernels: Kernels) -> tuple[Role, Reason]:
    op = node.op_type
    if op not in (*kernels.integer, *kernels.dynamic, *kernels.weight_only):
        return Role.FLOAT, no_kernel("integer", op)
    weight, bias = _weight_and_bias(node)
    if op == "MatMul" and weight is None and any(constant(v) is not None for v in node.inputs):
        why = "its constant operand is the left one, or has not two dimensions"
        return _in_float(Cause.OPERATOR, why)
    if op == "MatMul" and weight is None and not kernels.activation_products:
        why = "the target's runtime has no integer kernel for a MatMul of two activations"
        return _in_float(Cause.NO_KERNEL, why)
    if op != "MatMul" and weight is None:
        return _in_float(Cause.OPERATOR, "its weight is computed at run time")
    if bias is not None and constant(bias) is None:
        return _in_float(Cause.OPERATOR, "its bias is computed at run time")
    reason = _gemm_reason(node) if op == "Gemm" else _recurrent_reason(node) if op in RECURRENT_OPS else ""
    return _in_float(Cause.OPERATOR, reason) if reason else (Role.HEAVY, NO_REASON)


def _gemm_reason(node: ir.Node) -> str:
    """Why no integer kernel supports this Gemm: they take no factors and one bias value per output."""
    if _attribute(node, "transA", 0):
        return "transA is set"
    weight, bias = _weight_and_bias(node)
    if _attribute(node, "alpha", 1.0) != 1.0 or (bias is not None and _attribute(node, "beta", 1.0) != 1.0):
        return "alpha or beta is not 1"
    array = constant(bias)
    if array is None or weight is None or weight.shape is None:
        return ""
    outputs = weight.shape[0 if _attribute(node, "transB", 0) else 1]
    return "" if array.size == 1 or array.shape in ((outputs,), (1, outputs)) else "its bias differs by row"


def _recurrent_reason(node: ir.Node) -> str:
    """Why DynamicQuantizeLSTM, an LSTM of opset 7 with constant weights, does not support this node."""
    if constant(node.inputs[2]) is None:
        return "its recurrent weight is computed at run time"
    return "layout is set" if _attribute(node, "layout", 0) else ""


def _used(values: Sequence[ir.Value]) -> list[ir.Value]:
    return [v for v in values if v.name and (v.uses() or v.is_graph_output())]


def _data_inputs(node: ir.Node) -> list[ir.Value | None]:
    if node.op_type in _FIRST_INPUT_ONLY:
        return list(node.inputs[:1])
    if node.op_type == "Where":
        return list(node.inputs[1:])
    return list(node.inputs)


def _weight_and_bias(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """The constant weight (of two dimensions for MatMul and Gemm) and the constant bias of a heavy node."""
    if node.op_type not in HEAVY_OPS or len(node.inputs) < 2:
        return None, None
    weight = node.inputs[1]
    array = constant(weight) if weight is not None else None
    if weight is None or array is None or (node.op_type in ("MatMul", "Gemm") and len(array.shape) != 2):
        return None, None
    has_bias = len(node.inputs) > 2 and node.op_type in ("Conv", "ConvTranspose", "Gemm")
    return weight, node.inputs[2] if has_bias else None


def _fused_activation(node: ir.Node) -> ir.Node | None:
    """The Relu or constant Clip that is the only consumer of the node's only output."""
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
    """The bounds of a Relu or constant Clip; an absent bound is infinite."""
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
    """Nodes of the main graph that consume each value, by its name, directly or in a subgraph of theirs.

    Nodes in subgraphs may share names with nodes outside, so only those of the main graph are given.
    """
    found: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        subgraphs = (
            a.as_graphs() if a.type is ir.AttributeType.GRAPHS else [a.as_graph()]
            for a in node.attributes.values()
            if a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        )
        inner = (n for graphs in subgraphs for graph in graphs for n in walk_nodes(graph))
        for value in (v for n in (node, *inner) for v in n.inputs):
            if value is not None and value.name:
                found.setdefault(value.name, []).append(node)
    return found


def _is_float(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT


def _attribute(node: ir.Node, name: str, default: float | str) -> float | str:
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
