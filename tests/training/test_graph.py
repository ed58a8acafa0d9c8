"""ONNX graphs on torch compute what the ONNX project and onnxruntime say they must."""

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `tune`")

from support.onnx_models import conv_net, f32, i64, parse, randoms, run
from support.tune_cases import cases, operators
from support.tune_cases import run as run_case

from edgepack.config.recipe import Data
from edgepack.config.target import Runtime
from edgepack.data.samples import open_samples
from edgepack.errors import ModelError
from edgepack.graph.normalize import normalize
from edgepack.ir.files import load_model
from edgepack.ir.inputs import input_specs
from edgepack.runtime.session import open_session
from edgepack.runtime.session import run as run_session
from edgepack.training.graph import as_tensor, compile_model, run_program, unsupported
from edgepack.training.operators.table import CONTROL, OPERATORS

CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_a_node_test_of_onnx(name: str) -> None:
    case = CASES[name]
    got = run_case(case)
    for key, wanted in case.outputs.items():
        assert got[key].dtype == wanted.dtype and got[key].shape == wanted.shape, key
        half = wanted.dtype == np.float16
        rtol, atol = (max(case.rtol, 2e-3), 1e-3) if half else (case.rtol, max(case.atol, 1e-6))
        np.testing.assert_allclose(got[key], wanted, rtol=rtol, atol=atol)


def test_nearly_every_operator_has_a_node_test() -> None:
    assert len(OPERATORS) + len(CONTROL) >= 150
    tested = set().union(*map(operators, CASES.values()))
    assert set(OPERATORS) | CONTROL == tested - {"Constant"} | {"GlobalLpPool"}


def test_global_lp_pool() -> None:
    model = parse("net (float[1, 3, 4, 5] x) => (float[1, 3, 1, 1] y) { y = GlobalLpPool <p = 3> (x) }")
    feeds = randoms(x=(1, 3, 4, 5))
    assert_as_runtime(model, feeds)


def assert_as_runtime(model: ir.Model, feeds: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        got = run_program(compile_model(model), {k: as_tensor(v) for k, v in feeds.items()})
    for name, wanted in run(model, feeds, optimize=False).items():
        assert got[name].numpy().shape == wanted.shape and got[name].numpy().dtype == wanted.dtype
        np.testing.assert_allclose(got[name].numpy(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("opset", "body", "shape"),
    [
        (7, "y = Upsample <mode = \"nearest\", scales = [1.0, 1.0, 2.0, 2.0]> (x)", (1,)),
        (9, "y = Slice <starts = [1, 0], ends = [3, 9], axes = [1, 3]> (x)", (1,)),
        (10, "y = Pad <pads = [0, 0, 1, 2, 0, 0, -1, 2]> (x)", (1,)),
        (10, "y = Clip <min = -0.5, max = 0.25> (x)", (1,)),
        (11, "y = Softmax (x)", (1,)),
        (11, "y = Squeeze <axes = [0]> (x)", (1,)),
        (11, "y = ReduceSum <axes = [1, 2], keepdims = 0> (x)", (1,)),
        (12, "y = Hardmax <axis = 2> (x)", (1,)),
    ],
)  # fmt: skip
def test_older_opsets_say_the_same_differently(opset: int, body: str, shape: tuple[int, ...]) -> None:
    model = parse(
        f"net (float[1, 3, 4, 5] x) => (float[?, ?, ?, ?] y) {{ {body} }}",
        opset=opset,
        weights=randoms(b=shape),
    )
    for value in model.graph.outputs:
        value.shape = None
    assert_as_runtime(model, randoms(x=(1, 3, 4, 5)))


def test_before_opset_7_an_axis_says_where_the_second_operand_begins() -> None:
    body = "net (float[1, 3, 4, 5] x) => (float[1, 3, 4, 5] y) { y = Add <axis = 1, broadcast = 1> (x, b) }"
    weights, feeds = randoms(b=(3,)), randoms(x=(1, 3, 4, 5))
    got = run_program(compile_model(parse(body, opset=6, weights=weights)), {"x": as_tensor(feeds["x"])})
    assert np.array_equal(got["y"].numpy(), feeds["x"] + weights["b"][:, None, None])


def test_uneven_padding_dilation_and_groups() -> None:
    body = """net (float[1, 4, 9, 8] x) => (float[?, ?, ?, ?] y) {
        a = Conv <pads = [0, 1, 2, 3], dilations = [2, 1], group = 2> (x, w1)
        b = ConvTranspose <strides = [2, 3], pads = [1, 0, 0, 2], output_padding = [1, 1]> (a, w2, b2)
        c = MaxPool <kernel_shape = [3, 2], strides = [2, 2], pads = [1, 0, 1, 1], ceil_mode = 1> (b)
        y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], auto_pad = "SAME_LOWER"> (c)
    }"""
    model = parse(body, opset=13, weights=randoms(w1=(6, 2, 3, 3), w2=(6, 5, 3, 3), b2=(5,)))
    assert_as_runtime(model, randoms(x=(1, 4, 9, 8)))


def test_constants_in_branches_and_loops() -> None:
    body = """net (bool c, float[2] x, int64 n) => (float[2] y, float[2] z) {
        y = If (c) <
            then_branch = yes () => (float[2] a) { a = Add (x, x) },
            else_branch = no () => (float[2] b) { k = Constant <value_floats = [3.0, 4.0]> () b = Mul (x, k) }
        >
        z = Loop (n, c, x) <
            body = step (int64 i, bool go, float[2] s) => (bool on, float[2] t) {
                on = Identity (go)
                t = Add (s, x)
            }
        >
    }"""
    for condition in (True, False):
        feeds = {"c": np.asarray(condition), "x": f32([1, -2]), "n": i64(3)}
        assert_as_runtime(parse(body), feeds)


def test_all_that_is_not_supported_is_listed() -> None:
    body = """net (float[4, 4] x) => (float[4, 4] y) {
        a = Bernoulli (x)
        b = Bernoulli (a)
        c = com.other.Thing (b)
        y = Relu (c)
    }"""
    model = parse(body)
    model.graph.opset_imports["com.other"] = 1
    assert [line.split(" (")[0] for line in unsupported(model)] == ["Bernoulli", "Thing of domain com.other"]
    with pytest.raises(ModelError, match=r"Bernoulli .*; Thing of domain com\.other"):
        compile_model(model)


def test_a_node_that_fails_is_named() -> None:
    model = parse("net (float[a, b] x) => (float[a, b] y) { [broken] y = MatMul (x, x) }")
    with pytest.raises(ModelError, match=r"MatMul of \[2, 3\], \[2, 3\]\) fails on torch"):
        run_program(compile_model(model), {"x": torch.zeros(2, 3)})


def test_what_no_constant_changes_is_computed_once() -> None:
    model = conv_net()
    program = compile_model(model, ["w1"])
    assert len(program.body.steps) == len(list(model.graph))
    normalized, _ = normalize(model, min_opset=13, max_opset=23)
    assert_as_runtime(normalized, randoms(x=(2, 3, 8, 8)))


def test_values_are_kept_on_demand_and_constants_replaced() -> None:
    model = conv_net()
    program = compile_model(model, ["w1"])
    x = as_tensor(randoms(x=(2, 3, 8, 8))["x"])
    made = run_program(program, {"x": x}, {"w1": torch.zeros(4, 3, 3, 3)}, keep=["c"])
    assert set(made) == {"c", "y"}
    assert not made["c"].any()
    assert run_program(program, {"x": x}, keep=["c"])["c"].any()


SUITE = os.environ.get("EDGEPACK_SUITE")
INPUTS = {
    "efficientnet_lite0": (1, 3, 224, 224),
    "fastestdet": (1, 3, 352, 352),
    "ppocrv4_rec": (1, 3, 48, 320),
}


@pytest.mark.skipif(SUITE is None, reason="EDGEPACK_SUITE does not name the folder of real models")
@pytest.mark.parametrize(
    "task", [*INPUTS, "minilm_sst2", "dscnn_fsdd", "dlrm_ml100k"]
)  # fmt: skip
def test_real_models_agree_with_the_runtime(task: str) -> None:
    folder = Path(str(SUITE)) / task
    model = load_model(folder / "model.onnx")
    if task in INPUTS:
        rng = np.random.default_rng(0)
        name = input_specs(model)[0].name
        feeds = [{name: f32(rng.uniform(-1, 1, INPUTS[task]))} for _ in range(2)]
    else:
        data = Data(path=str(folder / "calib.npz"), samples=4)
        feeds = [s.feeds for s in open_samples(data, "calibration", input_specs(model), {}, base=folder)]
    program, session = compile_model(model), open_session(folder / "model.onnx", Runtime())
    for sample in feeds:
        with torch.no_grad():
            got = run_program(program, {k: as_tensor(v) for k, v in sample.items()})
        for name, wanted in run_session(session, sample).items():
            scale = float(np.abs(wanted).max())
            np.testing.assert_allclose(got[name].numpy() / scale, wanted / scale, atol=5e-4)
