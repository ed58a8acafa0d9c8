"""What the runtime made of a model: integer kernels, float operators, conversions left between them."""

import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgepack.measure.session import open_session
from edgepack.target import Runtime

INTEGER_OPS = frozenset(
    [
        "ConvInteger",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM",
        "MatMulNBits",
        "QGemm",
        "NhwcMaxPool",
        "QAttention",
        "GatherBlockQuantized",
    ]
)
MOVERS = frozenset(
    [
        "Reshape",
        "Transpose",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Slice",
        "Split",
        "Gather",
        "Identity",
        "Expand",
        "Tile",
        "Concat",
        "Shape",
        "Cast",
        "Constant",
        "ConstantOfShape",
        "Range",
        "Pad",
    ]
)


@dataclass(frozen=True, slots=True)
class FusionReport:
    """Counts by operator type in the graph that the runtime executes."""

    integer_kernels: dict[str, int]
    float_operators: dict[str, int]
    """Those that compute; operators that only move data or shapes are left out."""
    leftover_quantize: int
    leftover_dequantize: int
    transposes: int
    """Of activations: integer convolutions run channels-last, and every change of layout costs a pass."""

    def as_dict(self) -> dict[str, Any]:
        """For the JSON report."""
        return asdict(self)


def what_the_runtime_did(model: Path, runtime: Runtime) -> FusionReport:
    """Load ``model`` as the target does and count what is executed.

    Raises:
        ModelError: the runtime refuses the model.
    """
    with tempfile.TemporaryDirectory(prefix="edgepack-fused-") as folder:
        path = Path(folder) / "optimized.onnx"
        open_session(model, runtime, optimized_path=path)
        graph = ir.load(path).graph
        counts = Counter(node.op_type for node in graph)
    integer = {op: n for op, n in counts.items() if op.startswith("QLinear") or op in INTEGER_OPS}
    conversions = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
    return FusionReport(
        integer_kernels=dict(sorted(integer.items())),
        float_operators={
            op: n
            for op, n in sorted(counts.items())
            if op not in integer and op not in MOVERS and op not in conversions
        },
        leftover_quantize=counts["QuantizeLinear"],
        leftover_dequantize=counts["DequantizeLinear"],
        transposes=counts["Transpose"],
    )
