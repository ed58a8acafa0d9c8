"""Cross-layer equalization: the same function, less error of weights with one scale."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import tiny
from support.onnx_models import Array, f32, parse, run
from support.quantizing import U8, draw, target

from edgepack.config.recipe import Data
from edgepack.data.samples import Samples, open_samples
from edgepack.graph.normalize import normalize
from edgepack.ir.fingerprint import fingerprint
from edgepack.ir.inputs import input_specs
from edgepack.ir.model import constant
from edgepack.ir.numerics import dequantize, quantize, sqnr_db
from edgepack.ir.scheme import Granularity
from edgepack.quantization.weights.cross_layer_equalization import equalize, find_pairs
from edgepack.quantization.weights.params import weight_params

NET = """net (float[1, 6, 8, 8] x) => (float[1, 5] y) {{
    a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w0, b0)
    b = {one}
    c = Conv <group = 12, pads = [1, 1, 1, 1]> (b, w1, b1)
    d = {two}
    e = Conv <group = 2, strides = [2, 2]> (d, w2)
    shape = Constant <value_ints = [1, 128]> ()
    f = Reshape (e, shape)
    g = Gemm <transB = 1> (f, w3, b3)
    h = Relu (g)
    y = Gemm (h, w4)
}}"""
SHAPES = {
    "w0": (12, 6, 3, 3), "b0": (12,), "w1": (12, 1, 3, 3), "b1": (12,), "w2": (8, 6, 1, 1),
    "w3": (9, 128), "b3": (9,), "w4": (9, 5),
}  # fmt: skip
THROUGH = {"relu": "Relu ({})", "leaky": "LeakyRelu <alpha = 0.2> ({})", "prelu": "PRelu ({}, slope)"}


def net(one: str, two: str, seed: int = 0, spread: float = 1.5) -> ir.Model:
    """A network whose weight channels differ in range by about ``e^spread``."""
    rng = np.random.default_rng(seed)
    weights = {}
    shape: tuple[int, ...]
    for name, shape in SHAPES.items():
        size = np.exp(rng.normal(size=(shape[0], *[1] * (len(shape) - 1))) * spread)
        weights[name] = f32(rng.normal(size=shape) * size / float(np.prod(shape[1:])) ** 0.5)
    weights["slope"] = f32(rng.random((12, 1, 1)))
    body = NET.format(one=one.format("a"), two=two.format("c"))
    return normalize(parse(body, weights=weights), min_opset=13, max_opset=23)[0]


def samples_of(folder: Path, model: ir.Model, x: dict[str, Array]) -> Samples:
    np.savez(folder / "x.npz", **x)  # type: ignore[arg-type]
    return open_samples(Data(path=str(folder / "x.npz")), "calibration", input_specs(model), {}, base=folder)


def with_rounded_weights(model: ir.Model) -> ir.Model:
    """The model with each weight quantized with one scale, and dequantized."""
    scheme = target(U8, Granularity.PER_TENSOR).quantization.weight
    rounded = model.clone()
    for node in rounded.graph:
        if node.op_type in ("Conv", "Gemm"):
            weight = constant(node.inputs[1])
            assert weight is not None
            params = weight_params(node, f32(weight), scheme)
            stored = dequantize(quantize(f32(weight), params), params)
            value = ir.Value(name=f"{node.name}_r", const_value=ir.tensor(stored, name=f"{node.name}_r"))
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(stored.shape)
            rounded.graph.register_initializer(value)
            node.replace_input_with(1, value)
    return rounded


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    one=st.sampled_from(sorted(THROUGH)),
    two=st.sampled_from(sorted(THROUGH)),
    seed=st.integers(0, 1000),
    spread=st.floats(0.0, 3.0),
)
def test_outputs_are_not_changed(tmp_path: Path, one: str, two: str, seed: int, spread: float) -> None:
    model = net(THROUGH[one], THROUGH[two], seed, spread)
    drawn = draw(model, {})
    before = fingerprint(model)
    equal, _ = equalize(model, samples_of(tmp_path, model, drawn), threads=1)
    assert fingerprint(model) == before, "the model was changed"
    other = {"x": f32(np.random.default_rng(seed + 1).normal(size=(1, 6, 8, 8)) * 3)}
    expected, got = run(model, other)["y"], run(equal, other)["y"]
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def test_one_scale_for_a_weight_gets_finer(tmp_path: Path) -> None:
    model = net(THROUGH["relu"], THROUGH["relu"])
    drawn = draw(model, {})
    equal, pairs = equalize(model, samples_of(tmp_path, model, drawn), threads=1)
    assert pairs == 3
    x = {"x": drawn["x"][0]}
    expected = f32(run(model, x)["y"])
    plain, finer = (sqnr_db(expected, f32(run(with_rounded_weights(m), x)["y"])) for m in (model, equal))
    assert finer > plain + 6


def test_channels_of_equal_range_are_not_changed(tmp_path: Path) -> None:
    weights = {"w0": f32(np.ones((4, 6, 1, 1))), "w1": f32(np.ones((5, 4, 1, 1)))}
    body = "net (float[1, 6, 4, 4] x) => (float y) { a = Conv (x, w0) b = Relu (a) y = Conv (b, w1) }"
    model = normalize(parse(body, weights=weights), min_opset=13, max_opset=23)[0]
    assert len(find_pairs(model)) == 1
    same, pairs = equalize(model, samples_of(tmp_path, model, draw(model, {})), threads=1)
    assert pairs == 0
    assert fingerprint(same) == fingerprint(model)


CONVS = (
    "net (float[1, 6, 4, 4] x) => (float y{more}) {{ a = Conv (x, w0) b = {act} y = Conv (b, {w1}) {end} }}"
)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(CONVS.format(more="", act="Clip (a, zero, six)", w1="w1", end=""), id="clip"),
        pytest.param(CONVS.format(more="", act="Relu (a)", w1="w0", end=""), id="one weight for both"),
        pytest.param(
            CONVS.format(more=", float z", act="Relu (a)", w1="w1", end="z = Neg (b)"), id="read twice"
        ),
        pytest.param(CONVS.format(more=", float b", act="Relu (a)", w1="w1", end=""), id="an output"),
        pytest.param(CONVS.format(more="", act="Sigmoid (a)", w1="w1", end=""), id="not homogeneous"),
    ],
)
def test_no_pair(body: str) -> None:
    rng = np.random.default_rng(0)
    weights = {"w0": f32(rng.normal(size=(6, 6, 1, 1))), "w1": f32(rng.normal(size=(6, 6, 1, 1)))}
    weights |= {"zero": f32(0), "six": f32(6)}
    used = {n: w for n, w in weights.items() if n in body}
    model = normalize(parse(body, weights=used), min_opset=13, max_opset=23)[0]
    assert find_pairs(model) == []


def test_a_build_with_one_scale_per_weight_equalizes(tmp_path: Path) -> None:
    folder = tiny.project(tmp_path / "p")
    shipped = Path(__file__).parents[2] / "targets/x86-cpu.yaml"
    text = shipped.read_text().replace("weight_granularity: per_channel", "weight_granularity: per_tensor")
    (folder / "coarse.yaml").write_text(text.replace("name: x86-cpu", "name: coarse"))
    done = tiny.run(folder, "build", "--target", "coarse.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert '"equalize"' in done.stdout
