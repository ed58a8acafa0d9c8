"""What the runtime made of a model: integer kernels, float operators, conversions left between them."""

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgepack.config.target import Runtime
from edgepack.ir.files import load_model
from edgepack.ir.model import walk_nodes
from edgepack.runtime.session import open_optimized

INTEGER_OPS = frozenset(
    [
        "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM", "MatMulNBits", "QGemm", "QAttention", "QEmbedLayerNormalization",
        "GatherBlockQuantized",
    ]
)  # fmt: skip
"""Operators on integers beside those called ``QLinear...``."""

MOVERS = frozenset(
    [
        "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather",
        "GatherElements", "GatherND", "Identity", "Expand", "Tile", "Concat", "Shape", "Cast", "Constant",
        "ConstantOfShape", "Range", "Pad", "ReorderInput", "ReorderOutput", "DepthToSpace", "SpaceToDepth",
    ]
)  # fmt: skip
"""Operators that compute nothing: with float values they are no sign of a bad plan."""

LEFTOVER = ("QuantizeLinear", "DequantizeLinear")
CONVERSIONS = frozenset([*LEFTOVER, "DynamicQuantizeLinear"])
LAYOUT_CHANGES = frozenset(["Transpose", "ReorderInput", "ReorderOutput"])
STORED = frozenset([ir.DataType.INT8, ir.DataType.UINT8])
FLOATS = frozenset([ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE])


@dataclass(frozen=True, slots=True)
class Conversion:
    """A QuantizeLinear or DequantizeLinear that is executed."""

    op_type: str
    node: str
    tensor: str
    """What it converts."""
    at_border: bool
    """At an input or output of the model, where nothing can spare it."""


@dataclass(frozen=True, slots=True)
class FusionReport:
    """Counts by operator type in the graph that the runtime executes, subgraphs included."""

    integer_kernels: dict[str, int]
    """Those that compute on integers; pooling and resizing of stored integers among them."""
    float_operators: dict[str, int]
    """Those that compute on floats; operators that only move data or compute shapes are left out."""
    float_nodes: dict[str, tuple[str, ...]]
    """Names of the nodes behind ``float_operators``."""
    leftover_quantize: int
    leftover_dequantize: int
    leftover: tuple[Conversion, ...]
    """The nodes behind the two counts."""
    transposes: int
    """Of activations: integer convolutions run channels-last, and every change of layout costs a pass."""
    inserted_layout_changes: int
    """Transpose, ReorderInput and ReorderOutput nodes that the model itself does not have."""

    def as_dict(self) -> dict[str, Any]:
        """For the JSON report."""
        return asdict(self)


def what_the_runtime_did(model: Path, runtime: Runtime) -> FusionReport:
    """Load ``model`` as the target does and count what is executed.

    Raises:
        ModelError: the runtime refuses the model, or it cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="edgepack-fused-") as folder:
        _session, optimized = open_optimized(model, runtime, Path(folder))
        nodes = list(walk_nodes(optimized.graph))
        types = _types(nodes)
    own = {node.name for node in walk_nodes(load_model(model).graph)} if model.suffix == ".onnx" else set()
    counts = Counter(node.op_type for node in nodes)
    integers = [node for node in nodes if _computes_on_integers(node, types)]
    floats = [node for node in nodes if node not in integers and _computes_on_floats(node, types)]
    names: dict[str, list[str]] = {}
    for node in sorted(floats, key=lambda n: n.op_type):
        names.setdefault(node.op_type, []).append(node.name or "")
    return FusionReport(
        integer_kernels=_counted(integers),
        float_operators=_counted(floats),
        float_nodes={op: tuple(found) for op, found in names.items()},
        leftover_quantize=counts["QuantizeLinear"],
        leftover_dequantize=counts["DequantizeLinear"],
        leftover=tuple(_conversion(node) for node in nodes if node.op_type in LEFTOVER),
        transposes=counts["Transpose"],
        inserted_layout_changes=sum(n.op_type in LAYOUT_CHANGES and n.name not in own for n in nodes),
    )


def _counted(nodes: Iterable[ir.Node]) -> dict[str, int]:
    return dict(sorted(Counter(node.op_type for node in nodes).items()))


def _types(nodes: Iterable[ir.Node]) -> dict[ir.Value, ir.DataType]:
    """Types of all values, also of those that the runtime made and wrote no type down for."""
    types: dict[ir.Value, ir.DataType] = {}
    for node in nodes:
        for value in (*node.inputs, *node.outputs):
            if value is not None and value.dtype is not None:
                types[value] = value.dtype
        guess = _output_type(node, types)
        for value in node.outputs:
            if guess is not None:
                types.setdefault(value, guess)
    return types


def _output_type(node: ir.Node, types: Mapping[ir.Value, ir.DataType]) -> ir.DataType | None:
    """The type of what leaves ``node``; that of what enters it, where the operator does not say."""
    op = node.op_type
    if op == "QuantizeLinear" or op.startswith("QLinear") or (op == "QGemm" and len(node.inputs) > 7):
        return ir.DataType.UINT8
    if op in INTEGER_OPS or op == "DequantizeLinear":
        return ir.DataType.FLOAT
    if op in ("Shape", "Size"):
        return ir.DataType.INT64
    if op == "Cast":
        return ir.DataType(node.attributes.get_int("to", int(ir.DataType.FLOAT)))
    first = node.inputs[0] if node.inputs else None
    return types.get(first) if first is not None else None


def _computes_on_integers(node: ir.Node, types: Mapping[ir.Value, ir.DataType]) -> bool:
    if node.op_type.startswith("QLinear") or node.op_type in INTEGER_OPS:
        return True
    if node.op_type in MOVERS or node.op_type in CONVERSIONS or not node.inputs:
        return False
    first = node.inputs[0]
    return first is not None and types.get(first) in STORED and types.get(node.outputs[0]) in STORED


def _computes_on_floats(node: ir.Node, types: Mapping[ir.Value, ir.DataType]) -> bool:
    """Whether a float enters or leaves a node that does more than move data; true where types are unknown."""
    if node.op_type in MOVERS or node.op_type in CONVERSIONS:
        return False
    found = {types.get(value) for value in (*node.inputs, *node.outputs) if value is not None}
    return bool(found & FLOATS) or None in found


def _conversion(node: ir.Node) -> Conversion:
    source = node.inputs[0]
    border = source.is_graph_input() if source is not None else False
    border = border or any(value.is_graph_output() for value in node.outputs)
    tensor = source.name or "" if source is not None else ""
    return Conversion(node.op_type, node.name or "", tensor, border)
