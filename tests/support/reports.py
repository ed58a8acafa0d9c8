"""A made-up report of a build."""

from edgepack.results import (
    BuildReport,
    Candidate,
    Cause,
    Fidelity,
    GateLine,
    GroupRow,
    Limit,
    ModelFigures,
    StageReport,
)

ORIGINAL = ModelFigures(
    "original", "net.onnx", 4_000_000, 4.0, 4.4, 3.9, 1.0, 20.0, 9_000_000,
    Fidelity(50, None, 1.0, 0.91, "top1"),
)  # fmt: skip


BUILT = ModelFigures(
    "onnx", "model.onnx", 1_000_000, 2.0, 2.2, 1.9, 2.0, 15.0, 5_000_000,
    Fidelity(50, 31.26, 0.98, 0.9, "top1"),
)  # fmt: skip


FLOAT_INPUT = Cause.NEIGHBOURS, "an input is float"
GROUPS = (
    GroupRow("stem", "Conv", "static", "", 432, 28.1, 900.0, 300.0),
    GroupRow("mix", "Add", "static", "", 0, 25.0, 10.0, 31.0),
    GroupRow("head", "Conv", "float", "an override of the recipe", 100, 24.0, 50.0, 50.0),
    GroupRow("gate1", "Mul", "float", "its input 'a' is float", 0, 40.0, 1.0, 1.0, *FLOAT_INPUT),
    GroupRow("gate2", "Mul", "float", "its input 'b' is float", 0, None, None, None, *FLOAT_INPUT),
)


REPORT = BuildReport(
    edgepack_version="0.1.0",
    model="net.onnx",
    target="x86-cpu",
    command="edgepack build",
    passed=True,
    models=(ORIGINAL, BUILT),
    refused=(),
    waterfall=(),
    parity=(),
    gate=(GateLine(Limit.METRIC_DROP, 0.02, 0.01, True), GateLine(Limit.BYTES, 2e6, 1e6, True)),
    candidates=(
        Candidate("static", 1_000_000, 2.0, 31.2, 0.9, True, ""),
        Candidate("static, depthwise 3x3 Conv in float", 1_200_000, 1.5, 33.0, None, False, ""),
        Candidate("float", 4_000_000, 1.0, None, None, False, "larger"),
    ),
    units=GROUPS,
    sensitivity=(),
    runtime={"integer_kernels": {"QLinearConv": 1, "QLinearAdd": 1}, "leftover_quantize": 1,
             "leftover_dequantize": 2, "conversions_us": 42.0},
    stages=(StageReport("load", 0.1, ("a note",)),),
    environment={"cpu": "Some CPU", "threads": 1, "onnxruntime": "1.32.0"},
    fingerprints={"model": "00"},
)  # fmt: skip
