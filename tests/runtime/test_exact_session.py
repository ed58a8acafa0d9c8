"""Integer kernels that do not saturate on any host, for each precision and file format."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from support import quantizing
from support.onnx_models import Array, parse
from support.quantizing import CHANNEL, DYNAMIC, S8, STATIC, TENSOR, U8, Built, target

from edgepack.config.target import Runtime
from edgepack.errors import ModelError
from edgepack.export.ort import export_ort
from edgepack.ir.files import load_model, save_model
from edgepack.ir.model import clone
from edgepack.ir.numerics import sqnr_db
from edgepack.ir.scheme import Granularity, QuantType
from edgepack.quantization.plan.types import Precision
from edgepack.runtime.host import ExactRuntime, cpu, overflows
from edgepack.runtime.runner import open_model
from edgepack.runtime.unsigned_weights import make_weights_unsigned

CONV, GEMM = "Conv <pads = [1, 1, 1, 1]>", "Gemm <transB = 1>"


def large(*shape: int) -> Array:
    """Weights near the largest magnitude, whose sums of two products saturate."""
    rng = np.random.default_rng(sum(shape))
    signs = np.sign(rng.normal(size=shape))
    return np.asarray(signs * rng.uniform(0.8, 1, size=shape), np.float32)


def net(sizes: str, nodes: str) -> str:
    return f"net (float[{sizes}] x) => (float y) {{ r = Relu (x) {nodes} }}"


STATIC_CASES: dict[str, tuple[str, dict[str, Array]]] = {
    "convolution": (net("1, 16, 6, 6", f"y = {CONV} (r, w)"), {"w": large(32, 16, 3, 3)}),
    "grouped": (net("1, 16, 6, 6", "y = Conv <group = 4> (r, w)"), {"w": large(16, 4, 3, 3)}),
    "odd channels": (net("1, 15, 6, 6", "y = Conv (r, w)"), {"w": large(7, 15, 1, 1)}),
    "depthwise": (net("1, 16, 6, 6", "y = Conv <group = 16> (r, w)"), {"w": large(16, 1, 3, 3)}),
    "one weight twice": (
        net("1, 16, 6, 6", "a = Conv (r, w) b = Relu (a) y = Conv (b, w)"), {"w": large(16, 16, 1, 1)},
    ),
    "gemm": (net("4, 64", f"y = {GEMM} (r, w)"), {"w": large(32, 64)}),
    "two of one size": (
        net("4, 32", f"a = {GEMM} (r, w) b = Relu (a) y = {GEMM} (b, v)"),
        {"w": large(32, 32), "v": large(32, 32)[::-1].copy()},
    ),
    "matmul": (net("2, 8, 64", "y = MatMul (r, w)"), {"w": large(64, 32)}),
}  # fmt: skip
DYNAMIC_CASES: dict[str, tuple[str, dict[str, Array]]] = {
    "matmul": (net("2, 8, 64", "y = MatMul (r, w)"), {"w": large(64, 32)}),
    "gemm": (net("4, 64", f"y = {GEMM} (r, w, b)"), {"w": large(32, 64), "b": large(32)}),
    "one weight twice": (
        net("4, 32", "a = MatMul (r, w) b = Relu (a) y = MatMul (b, w)"), {"w": large(32, 32)},
    ),
    "lstm": (
        net("5, 1, 16", "y = LSTM <hidden_size = 8> (r, w, v)"),
        {"w": large(1, 32, 16) / 5, "v": large(1, 32, 8) / 5},
    ),
}  # fmt: skip


def feeds(model: Path) -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    (spec,) = open_model(model, Runtime()).inputs
    shape = [size for size in spec.shape or () if isinstance(size, int)]
    return [{spec.name: rng.normal(size=shape).astype(np.float32)} for _ in range(3)]


def outputs(model: Path, runtime: Runtime) -> list[Array]:
    runner = open_model(model, runtime)
    return [array for feed in feeds(model) for array in runner.run(feed).values()]


def as_written(model: Path) -> list[Array]:
    """Outputs of the nodes as written: Q and DQ around float operators."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return [array for feed in feeds(model) for array in session.run(None, feed)]


def exactly(runtime: Runtime) -> ExactRuntime:
    return ExactRuntime(**runtime.model_dump())


@pytest.mark.parametrize("granularity", [CHANNEL, TENSOR])
@pytest.mark.parametrize("activation", [U8, S8])
@pytest.mark.parametrize("case", STATIC_CASES)
def test_static_kernels(case: str, activation: QuantType, granularity: Granularity, tmp_path: Path) -> None:
    body, weights = STATIC_CASES[case]
    device = target(activation, granularity)
    built = quantizing.build(tmp_path, body, weights, precision=STATIC, device=device)
    expected = as_written(built.path)
    for runtime in (
        device.runtime,
        Runtime(),
    ):  # int8 activations as they are, or as the runtime converts them
        assert sqnr_db(expected, outputs(built.path, exactly(runtime))) > 100
    assert integer_kernels(built) >= 1


def integer_kernels(built: Built) -> int:
    return sum(built.fused.integer_kernels.values())


@pytest.mark.parametrize("case", DYNAMIC_CASES)
def test_dynamic_matmuls(case: str, tmp_path: Path) -> None:
    body, weights = DYNAMIC_CASES[case]
    built = quantizing.build(tmp_path, body, weights, precision=DYNAMIC)
    got = outputs(built.path, exactly(Runtime()))
    assert sqnr_db(outputs(tmp_path / "float.onnx", Runtime()), got) > 40, "saturated: 19 to 37 dB"


@pytest.mark.parametrize("precision", [STATIC, DYNAMIC])
def test_sums_are_exact(precision: Precision, tmp_path: Path) -> None:
    """255 times 127, twice: does not fit 16 bits, and needs no runtime to compute."""
    body = "net (float[1, 4] x) => (float[1, 2] y) { y = MatMul (x, w) }"
    weights = {"w": np.asarray([[1, -1]] * 4, np.float32)}
    ones = {"x": np.ones((1, 4), np.float32)}
    built = quantizing.build(tmp_path, body, weights, precision=precision, feeds=ones)
    got = open_model(built.path, exactly(Runtime())).run(ones)["y"]
    np.testing.assert_allclose(got, [[4, -4]], rtol=0.01)


FORMS = [
    *((body, weights, STATIC) for body, weights in STATIC_CASES.values()),
    *((body, weights, DYNAMIC) for body, weights in DYNAMIC_CASES.values()),
]
IDS = [
    f"{kind} {name}"
    for kind, precisions in (("static", STATIC_CASES), ("dynamic", DYNAMIC_CASES))
    for name in precisions
]


@pytest.mark.parametrize(("body", "weights", "precision"), FORMS, ids=IDS)
def test_an_ort_computes_what_its_onnx_computes(
    body: str, weights: dict[str, Array], precision: Precision, tmp_path: Path
) -> None:
    for activation in (U8, S8):
        device = target(activation)
        built = quantizing.build(tmp_path, body, weights, precision=precision, device=device)
        export_ort(built.path, tmp_path / "model.ort", device.runtime, feeds(built.path))
        exact = exactly(device.runtime)
        for a, b in zip(outputs(built.path, exact), outputs(tmp_path / "model.ort", exact), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(not cpu()[1], reason="this system does not tell the processor's instruction sets")
@pytest.mark.parametrize(("body", "weights"), [STATIC_CASES["convolution"], STATIC_CASES["gemm"]])
def test_the_host_computes_as_its_instruction_sets_tell(
    body: str, weights: dict[str, Array], tmp_path: Path
) -> None:
    built = quantizing.build(tmp_path, body, weights)
    assert (sqnr_db(as_written(built.path), outputs(built.path, Runtime())) < 60) is overflows()


def test_a_float_model_is_not_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body, weights = STATIC_CASES["gemm"]
    save_model(parse(body, weights=weights), tmp_path / "model.onnx")
    monkeypatch.setattr("edgepack.ir.files.save_model", lambda *_, **__: pytest.fail("a copy is written"))
    outputs(tmp_path / "model.onnx", exactly(Runtime()))


def test_int8_activations_that_the_runtime_keeps_need_int8_weights(tmp_path: Path) -> None:
    body, weights = STATIC_CASES["gemm"]
    model = load_model(quantizing.build(tmp_path, body, weights, device=target(S8)).path)
    assert not make_weights_unsigned(clone(model), int8_activations=True)
    assert make_weights_unsigned(model, int8_activations=False)
    types = {
        value.dtype for value in model.graph.initializers.values() if value.name and value.name[0] == "w"
    }
    assert ir.DataType.UINT8 in types


def test_weights_that_are_used_in_float_stay(tmp_path: Path) -> None:
    body, weights = STATIC_CASES["matmul"]
    built = quantizing.build(tmp_path, body, weights, precision=quantizing.WEIGHT_ONLY)
    assert not make_weights_unsigned(load_model(built.path), int8_activations=False)


def test_a_file_that_is_no_model_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match=r"no\.onnx"):
        open_model(tmp_path / "no.onnx", exactly(Runtime()))
