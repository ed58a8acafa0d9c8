"""Each operator of the ``.tflite`` writer against the same plan in onnxruntime with int8 activations."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import tiny
from support.tflite_cases import CONV, ELEMENTWISE, FLOATS, LINEAR, PRODUCTS, Case, ints
from support.tflite_models import Written, device, run_tflite, write
from support.tflite_moves import MOVES, POOLS, RESIZES

from edgepack.config.target import load_target
from edgepack.errors import ExportError
from edgepack.ir.numerics import sqnr_db
from edgepack.quantization.plan.types import Precision
from edgepack.runtime.litert import open_tflite

HEAVY = {
    f"{group}: {name}": case
    for group, cases in (("Conv", CONV), ("Linear", LINEAR))
    for name, case in cases.items()
}
LIGHT = {
    f"{group}{name}": case.behind_integers()
    for group, cases in (("", ELEMENTWISE), ("", POOLS), ("", MOVES), ("Resize: ", RESIZES))
    for name, case in cases.items()
}
INTEGER: dict[str, Case] = {**HEAVY, **LIGHT}
EIGHT_BITS_DB = 28.0
"""SQNR in dB of normal values after two or three roundings to eight bits."""
FLOAT_DB = 80.0


def quality_db(made: Written) -> float:
    """SQNR of the .tflite against the float model."""
    got = [run_tflite(made, sample)["y"] for sample in made.samples]
    return sqnr_db([o["y"] for o in made.original], got)


@pytest.mark.parametrize("delegate", [True, False], ids=["XNNPACK", "reference kernels"])
@pytest.mark.parametrize("name", INTEGER)
def test_integers_are_those_of_onnxruntime(tmp_path: Path, name: str, delegate: bool) -> None:
    case = INTEGER[name]
    rewritten = case.normalized or name in HEAVY
    made = write(tmp_path, case.body, case.arrays(), opset=case.opset, normalized=rewritten)
    assert "y" in made.plan.activations, "the output is not int8: nothing is compared"
    # The reference kernel interpolates with 10-bit weights, which cannot represent 1/3.
    coarse = not delegate and "linear" in name
    assert made.steps(delegate=delegate) <= case.steps + coarse + 1e-3
    assert quality_db(made) > EIGHT_BITS_DB


@pytest.mark.parametrize("name", PRODUCTS)
def test_int8_matmuls_of_activations(tmp_path: Path, name: str) -> None:
    case = PRODUCTS[name]
    made = write(tmp_path, case.body, target=device(activation_products=True), opset=case.opset)  # type: ignore[arg-type]
    assert "BATCH_MATMUL" in made.summary.operators or "FULLY_CONNECTED" in made.summary.operators
    assert made.steps() <= case.steps + 1e-3
    assert quality_db(made) > EIGHT_BITS_DB


@pytest.mark.parametrize("name", FLOATS)
def test_what_has_no_kernel_is_an_island(tmp_path: Path, name: str) -> None:
    """Between int8 operators on both sides; the reference rounds at the same places."""
    case = FLOATS[name].behind_integers()
    made = write(tmp_path, case.body, case.arrays(), opset=case.opset)
    assert made.summary.float_islands
    got = [run_tflite(made, sample)["y"] for sample in made.samples]
    reference = [o["y"] for o in made.reference]
    assert all(a.shape == b.shape for a, b in zip(got, reference, strict=True))
    assert sqnr_db(reference, got) > 32
    assert sqnr_db([o["y"] for o in made.original], got) > 22


@pytest.mark.parametrize("name", FLOATS)
def test_functions_in_float(tmp_path: Path, name: str) -> None:
    """In float, a composition of other operators equals the function."""
    case = FLOATS[name]
    target = device("float", integer=("Conv",))
    made = write(tmp_path, case.body, case.arrays(), opset=case.opset, io="float", target=target)
    assert quality_db(made) > FLOAT_DB


OUTSIDE: dict[str, Case] = {
    "Softmax": Case("y = Softmax <axis = -1> (x)", "float[2, 4, 5, 6]", inputs="float[2, 4, 5, 6] x"),
    "LogSoftmax": Case("y = LogSoftmax <axis = -1> (x)", "float[2, 4, 5, 6]", inputs="float[2, 4, 5, 6] x"),
    **{name: FLOATS[name] for name in ("PRelu", "Max", "Min")},
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_kernels_outside_of_the_delegate(tmp_path: Path, name: str) -> None:
    """For an int8-only accelerator, see targets/mobile.yaml."""
    case = OUTSIDE[name].behind_integers()
    settings = load_target("mobile").tflite
    assert settings is not None
    target = device(integer=(*settings.kernels.integer, name))
    made = write(tmp_path, case.body, case.arrays(), target=target, normalized=False)
    assert "y" in made.plan.activations
    assert made.steps(delegate=False) <= case.steps + 1e-3
    assert quality_db(made) > 20


def test_rows_of_a_table(tmp_path: Path) -> None:
    table = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    body = "net (int64[1, 5] x) => (float[1, 5, 6] y) { y = Gather (t, x) }"
    rows = {"x": np.array([[3, 0, 19, 7, 7]], np.int64)}
    made = write(tmp_path, body, {"t": table}, feeds=rows, io="float", target=device("float"))
    assert quality_db(made) > EIGHT_BITS_DB
    assert made.summary.operators.get("GATHER") == 1


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_arg_max(tmp_path: Path, axis: int, keepdims: int) -> None:
    shape = [1, 8, 10, 9]
    shape[axis] = 1
    if not keepdims:
        del shape[axis]
    node = f"y = ArgMax <axis = {axis}, keepdims = {keepdims}> (x)"
    body = f"net (float[1, 8, 10, 9] x) => (int64{shape} y) {{ {node} }}"
    made = write(tmp_path, body, io="float", target=device("float"))
    for sample, expected in zip(made.samples, made.original, strict=True):
        np.testing.assert_array_equal(run_tflite(made, sample)["y"], expected["y"])


def test_cast(tmp_path: Path) -> None:
    body = "net (float[1, 20] x) => (float[1, 20] y) { i = Cast <to = 6> (x) y = Cast <to = 1> (i) }"
    made = write(tmp_path, body, io="float", target=device("float"))
    for sample, expected in zip(made.samples, made.original, strict=True):
        np.testing.assert_array_equal(run_tflite(made, sample)["y"], expected["y"])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("net (float[1, 8] x) => (float[1, 8] y) { y = CumSum (x, a) }", "this operator is not supported"),
        ("net (float[1, 2, 6, 6] x) => (float[1, 2, 6, 6] y) { y = LRN <size = 3> (x) }", "not supported"),
    ],
)
def test_unsupported_operators_are_refused_by_name(tmp_path: Path, body: str, reason: str) -> None:
    weights = {"a": ints(1)} if "CumSum" in body else None
    with pytest.raises(ExportError, match=reason) as found:
        write(tmp_path, body, weights, fixed={"y": Precision.FLOAT})
    assert "CumSum" in str(found.value) or "LRN" in str(found.value)


def test_a_scalar_is_fed_as_one(tmp_path: Path) -> None:
    body = "net (float[1, 8] x, float t) => (float[1, 8] y) { y = Mul (x, t) }"
    made = write(tmp_path, body, io="float", target=device("float"), fixed={"y": Precision.FLOAT})
    for sample, expected in zip(made.samples, made.original, strict=True):
        got = open_tflite(made.path, 1).run(sample)
        np.testing.assert_allclose(got["y"], expected["y"], rtol=1e-6)


def test_control_flow_is_refused_by_name(tmp_path: Path) -> None:
    """Its condition is known with the fixed sizes; outer values in its bodies are not."""
    body = """
    net (float[n, 8] x) => (float[n, 8] y) {
        r = Relu (x)
        s = Shape (x)
        first = Gather (s, a)
        one = Equal (first, b)
        y = If (one) <
            then_branch = yes () => (float[n, 8] t) { t = Neg (r) },
            else_branch = no () => (float[n, 8] e) { e = Identity (r) }
        >
    }
    """
    with pytest.raises(ExportError, match=r"If .*control flow"):
        write(tmp_path, body, {"a": ints(0), "b": ints(1)}, fixed={"y": Precision.FLOAT})


def test_what_the_writer_imports() -> None:
    """No TensorFlow, and no other heavy library."""
    code = "import edgepack.export.tflite.export, sys; print(*{n.partition('.')[0] for n in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=tiny.environment(), capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert {"numpy", "onnx_ir", "flatbuffers"} <= loaded
    assert not loaded & {
        "tensorflow",
        "torch",
        "jax",
        "onnxscript",
        "onnx2tf",
        "ai_edge_litert",
        "onnxruntime",
    }
