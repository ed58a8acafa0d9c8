"""Graph that the runtime executes: integer kernels, float operators, and Q/DQ left between them."""

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
"""Integer operators other than ``QLinear...``."""

MOVERS = frozenset(
    [
        "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather",
        "GatherElements", "GatherND", "Identity", "Expand", "Tile", "Concat", "Shape", "Cast", "Constant",
        "ConstantOfShape", "Range", "Pad", "ReorderInput", "ReorderOutput", "DepthToSpace", "SpaceToDepth",
    ]
)  # fmt: skip
"""Operators that only move data or compute shapes; with float values they do not count as float operators."""

LEFTOVER = ("QuantizeLinear", "DequantizeLinear")
CONVERSIONS = frozenset([*LEFTOVER, "DynamicQuantizeLinear"])
LAYOUT_CHANGES = frozenset(["Transpose", "ReorderInput", "ReorderOutput"])
STORED = frozenset([ir.DataType.INT8, ir.DataType.UINT8])
FLOATS = frozenset([ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE])


@dataclass(frozen=True, slots=True)
class Conversion:
    """An executed QuantizeLinear or DequantizeLinear."""

    op_type: str
    node: str
    tensor: str
    """Name of the tensor it converts."""
    at_border: bool
    """At an input or output of the model, where it cannot be avoided."""


@dataclass(frozen=True, slots=True)
class FusionReport:
    """Counts by operator type in the graph that the runtime executes, with subgraphs."""

    integer_kernels: dict[str, int]
    """Integer operators, with pooling and resizing of quantized tensors."""
    float_operators: dict[str, int]
    """Float operators, without those that only move data or compute shapes."""
    float_nodes: dict[str, tuple[str, ...]]
    """Names of the nodes counted in ``float_operators``."""
    leftover_quantize: int
    leftover_dequantize: int
    leftover: tuple[Conversion, ...]
    """The nodes counted above."""
    transposes: int
    """Transposes of activations: integer convolutions run channels-last, a layout change costs a pass."""
    inserted_layout_changes: int
    """Transpose, ReorderInput and ReorderOutput nodes that the runtime added."""

    def as_dict(self) -> dict[str, Any]:
        """As for the JSON report."""
        return asdict(self)


def fusion_report(model: Path, runtime: Runtime) -> FusionReport:
    """Load ``model`` with the target's settings and count the operators of the optimized graph.

    Raises:
        ModelError: the runtime rejects the model, or it cannot be read.
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
    """Types of all values, also of those for which the runtime stores no type."""
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
    """The output type of ``node``; that of its input where the operator does not define it."""
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
    """Whether a node that does more than move data has a float input or output; true for unknown types."""
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
