"""Low-bit weights: which groups have them, their scales, layer-by-layer rounding, the written file."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import tiny
from support.onnx_models import f32, parse
from support.quantizing import target

from edgepack.calibration.frontier import Frontier, stages, supports_frontier
from edgepack.calibration.run import stream_activations
from edgepack.config.recipe import Data, Override, Quantize
from edgepack.config.target import Runtime
from edgepack.data.samples import Samples, open_samples
from edgepack.errors import ConfigError
from edgepack.graph.normalize import normalize
from edgepack.ir.files import load_model, save_model
from edgepack.ir.inputs import input_specs
from edgepack.ir.model import constant
from edgepack.ir.numerics import sqnr_db
from edgepack.ir.scheme import QuantParams, QuantType
from edgepack.quantization.groups import FusionGroup, find_fusion_groups
from edgepack.quantization.plan.plan import make_plan
from edgepack.quantization.plan.preparation import WeightPreparation
from edgepack.quantization.plan.types import Precision, QuantPlan, Request
from edgepack.quantization.rewrite.apply import apply_plan
from edgepack.quantization.weights.low_bit import LowBit, bits_of_groups, scale_by_error
from edgepack.quantization.weights.moments import InputMoments
from edgepack.quantization.weights.rounding import Rounder, round_weights
from edgepack.quantization.weights.sequential import intended_weight
from edgepack.runtime.fused import fusion_report
from edgepack.runtime.session import open_session
from edgepack.runtime.session import run as run_session

Floats = npt.NDArray[np.float32]
NET = """net (float[1, 8, 9, 9] x) => (float[1, 5, 10] y) {
    a = Conv <kernel_shape = [3, 3]> (x, w0)
    b = Relu (a)
    c = Conv <group = 16, pads = [1, 1, 1, 1]> (b, w1)
    d = Relu (c)
    e = Conv (d, w2)
    f = Relu (e)
    shape = Constant <value_ints = [1, 5, 196]> ()
    g = Reshape (f, shape)
    y = MatMul (g, w3)
}"""
SHAPES = {"w0": (16, 8, 3, 3), "w1": (16, 1, 3, 3), "w2": (20, 16, 1, 1), "w3": (196, 10)}


def net() -> ir.Model:
    rng = np.random.default_rng(0)
    weights = {n: f32(rng.standard_t(4, size=s) / np.prod(s[1:]) ** 0.5) for n, s in SHAPES.items()}
    return normalize(parse(NET, weights=weights, opset=21), min_opset=21, max_opset=23)[0]


def inputs(count: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    smooth = np.cumsum(rng.normal(size=(count, 1, 8, 9, 9)), axis=3)
    return f32(smooth + 0.1 * rng.normal(size=smooth.shape))


def samples_of(folder: Path, model: ir.Model, x: Floats) -> Samples:
    np.savez(folder / "x.npz", x=x)
    return open_samples(Data(path=str(folder / "x.npz")), "calibration", input_specs(model), {}, base=folder)


def weight_only(model: ir.Model, groups: tuple[FusionGroup, ...], low_bit: dict[str, LowBit]) -> QuantPlan:
    methods = {u.name: Request(Precision.WEIGHT_ONLY) for u in groups}
    return make_plan(model, groups, {}, target(), methods, WeightPreparation(low_bit=low_bit))


def low_bit_of(model: ir.Model, groups: tuple[FusionGroup, ...], bits: int) -> dict[str, LowBit]:
    return dict(
        bits_of_groups(model, groups, Quantize.model_validate({"weight_bits": bits}), target()).low_bit
    )


def outputs(path: Path, x: Floats) -> list[Any]:
    session = open_session(path, Runtime())
    return [run_session(session, {"x": one})["y"] for one in x]


def db(folder: Path, model: ir.Model, plan: QuantPlan, rounder: Rounder) -> float:
    save_model(model, folder / "float.onnx")
    save_model(apply_plan(model, plan, rounder(plan)), folder / "low_bit.onnx")
    x = inputs(8, 9)
    return sqnr_db(outputs(folder / "float.onnx", x), outputs(folder / "low_bit.onnx", x))


@pytest.mark.parametrize("bits, floor_db", [(4, 14.0), (6, 26.0)])
def test_low_bit_weights_rounded_layer_by_layer_beat_rounding_to_nearest(
    tmp_path: Path, bits: int, floor_db: float
) -> None:
    model = net()
    groups = find_fusion_groups(model, target().kernels)
    plan = weight_only(model, groups, low_bit_of(model, groups, bits))
    nearest = db(tmp_path, model, plan, Rounder(model))
    samples = samples_of(tmp_path, model, inputs(24, 1))
    rounder = round_weights(model, plan, samples, gptq=True, threads=1, seed=0)
    ours = weight_only(model, groups, dict(rounder.low_bit))
    most = (1 << bits - 1) - 1
    assert {u.bits for u in ours.groups if u.weight is not None} == {bits}
    for rounded in rounder(ours).values():
        assert np.abs(rounded.integers.astype(int)).max() <= most
    found = db(tmp_path, model, ours, rounder)
    assert found > max(nearest + 3, floor_db)


def test_four_bits_are_int4_tensors_that_the_runtime_multiplies_or_dequantizes_at_load(
    tmp_path: Path,
) -> None:
    model = net()
    groups = find_fusion_groups(model, target().kernels)
    plan = weight_only(model, groups, low_bit_of(model, groups, 4))
    quantized = apply_plan(model, plan, Rounder(model)(plan))
    stored = [v for v in quantized.graph.initializers.values() if v.name and v.name.endswith("_q")]
    assert len(stored) == 4
    assert {v.const_value.dtype for v in stored if v.const_value is not None} == {ir.DataType.INT4}
    save_model(quantized, tmp_path / "low_bit.onnx")
    again = load_model(tmp_path / "low_bit.onnx")
    names = {v.name for v in stored}
    kept = [v.const_value for v in again.graph.initializers.values() if v.name in names]
    packed = sum(tensor.nbytes for tensor in kept if tensor is not None)
    assert packed == sum(np.prod(s) for s in SHAPES.values()) // 2
    fused = fusion_report(tmp_path / "low_bit.onnx", target().runtime)
    assert "MatMulNBits" in str(fused.as_dict())


def test_six_bits_and_integer_groups_are_stored_as_int8(tmp_path: Path) -> None:
    model = net()
    groups = find_fusion_groups(model, target().kernels)
    plan = weight_only(model, groups, low_bit_of(model, groups, 6))
    quantized = apply_plan(model, plan, Rounder(model)(plan))
    kinds = {
        v.const_value.dtype
        for v in quantized.graph.initializers.values()
        if v.const_value is not None and (v.name or "").endswith("_q")
    }
    assert kinds == {ir.DataType.INT8}


def test_bits_that_a_target_does_not_support_are_an_error_with_its_name() -> None:
    model = net()
    groups = find_fusion_groups(model, target().kernels)
    bare = target(weight_bits={})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="target 'x86-cpu' has no 4-bit weights for Conv"):
        bits_of_groups(model, groups, Quantize(weight_bits=4), bare)
    some = target(weight_bits={"MatMul": (4, 8)})  # type: ignore[arg-type]
    found = bits_of_groups(model, groups, Quantize(weight_bits=4), some)
    assert [n.split("/")[-1] for n in found.low_bit] == [u.name for u in groups if u.op_type == "MatMul"]
    assert found.notes == ("target 'x86-cpu' has no 4-bit weights for Conv: 8 bits",)
    by_type = Quantize(overrides=(Override(op_types=("Conv",), bits=4),))
    with pytest.raises(ConfigError, match=r"override: node .* has no 4-bit weights for Conv"):
        bits_of_groups(model, groups, by_type, some)


def test_an_override_by_name_wins_over_one_by_type() -> None:
    model = net()
    groups = find_fusion_groups(model, target().kernels)
    first = next(u.name for u in groups if u.op_type == "Conv")
    wanted = Quantize(
        weight_bits=8,
        overrides=(Override(op_types=("Conv",), bits=4), Override(nodes=(first,), bits=6)),
    )
    low_bit = bits_of_groups(model, groups, wanted, target()).low_bit
    assert {low_bit[u.name].bits for u in groups if u.name in low_bit and u.name != first} == {4}
    assert low_bit[first].bits == 6
    assert not any(u.name in low_bit for u in groups if u.op_type == "MatMul")


@given(seed=st.integers(0, 100), bits=st.sampled_from([4, 6]), per_tensor=st.booleans())
def test_scales_by_error_are_never_worse_than_the_full_range(seed: int, bits: int, per_tensor: bool) -> None:
    rng = np.random.default_rng(seed)
    w, most = f32(rng.standard_t(3, size=(2, 3, 12))), (1 << bits - 1) - 1
    second = np.einsum("gi,ij->gij", f32(rng.random((2, 12))), np.eye(12, dtype=np.float32))
    peak = np.abs(w).max(2).reshape(-1) / most
    scale = f32(peak.max()) if per_tensor else f32(peak)
    axis = None if per_tensor else 0
    params = QuantParams(QuantType.INT8, np.asarray(scale), np.zeros(scale.shape, np.int8), axis)

    def error(found: Floats) -> float:
        by_output = np.broadcast_to(found.reshape(-1), (6,)).reshape(2, 3, 1)
        lost = np.clip(np.rint(w / by_output), -most, most) * by_output - w
        return float(np.einsum("gok,gkk->", lost**2, second))

    found = scale_by_error(w, second, params, most)
    assert found.shape == params.scale.shape
    assert found.dtype == np.float32
    assert error(found) <= error(np.asarray(scale)) * (1 + 1e-4) + 1e-9


def test_a_frontier_computes_what_the_whole_model_does(tmp_path: Path) -> None:
    model = net()
    samples = samples_of(tmp_path, model, inputs(3, 2))
    names = ["b", "d", "g"]
    expected = [arrays for _, arrays in stream_activations(model, samples, names, threads=1)]
    (tmp_path / "frontier").mkdir()
    frontier = Frontier(model, samples, names, tmp_path / "frontier", threads=1)
    for name in names:
        frontier.advance([name])
        for number, arrays in enumerate(expected):
            np.testing.assert_allclose(f32(frontier.value(number, name)), arrays[name], rtol=1e-5, atol=1e-5)


def test_a_frontier_keeps_in_files_what_does_not_fit_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgepack.calibration.frontier.MEMORY_BYTES", 0)
    body = "net (float[1, 256, 128] x) => (float[1, 256, 128] y) { a = Relu (x)  y = Neg (a) }"
    model = normalize(parse(body), min_opset=13, max_opset=23)[0]
    x = f32(np.random.default_rng(0).normal(size=(2, 1, 256, 128)))
    frontier = Frontier(model, samples_of(tmp_path, model, x), ["a", "y"], tmp_path, threads=1)
    frontier.advance(["a"])
    assert len(list(tmp_path.glob("*.npy"))) == 2
    np.testing.assert_array_equal(frontier.value(1, "a"), np.maximum(x[1], 0))
    frontier.advance(["y"])
    np.testing.assert_array_equal(frontier.value(1, "y"), -np.maximum(x[1], 0))


def test_stages_follow_dependencies() -> None:
    model = net()
    heavy = {n.name: n for n in model.graph if n.op_type in ("Conv", "MatMul") and n.name}
    assert [len(s) for s in stages(heavy, model.graph)] == [1, 1, 1, 1]
    assert supports_frontier(model)


def test_drift_is_compensated_and_zeros_stay_zeros() -> None:
    rng = np.random.default_rng(0)
    w, meant = f32(rng.normal(size=(1, 4, 6))), f32(rng.normal(size=(1, 6, 5000)))
    w[0, 1, 2] = 0
    moments = InputMoments(np.zeros((1, 6), np.float32), np.zeros((1, 6, 6), np.float32))
    actual = f32(0.8 * meant)
    moments.add(actual, meant)
    moments.finish()
    found = intended_weight(w, moments)
    assert found[0, 1, 2] == 0
    before, after = (float(((v @ actual - w @ meant) ** 2).mean()) for v in (w, found))
    assert after < 0.25 * before


@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_a_build_writes_four_bits(tmp_path: Path, preset: str) -> None:
    quantize = {"method": "weight_only", "weight_bits": 4}
    folder = tiny.project(tmp_path / "p", preset=preset, quantize=quantize)
    done = tiny.run(folder, "build")
    assert done.returncode == 0, done.stderr
    graph = load_model(folder / "dist/x86-cpu/model.onnx").graph
    kinds = {v.name: v.const_value.dtype for v in graph.initializers.values() if v.const_value is not None}
    int4 = [v for v in graph.initializers.values() if kinds[v.name] == ir.DataType.INT4]
    assert sorted(tuple(v.shape or ()) for v in int4) == [(4, 24), (24, 16)]


def test_a_tflite_without_support_is_an_error_with_its_reason(tmp_path: Path) -> None:
    folder = tiny.project(tmp_path / "p", target="mobile", quantize={"method": "static", "weight_bits": 6})
    done = tiny.run(folder, "build")
    assert "model.tflite is not built" in done.stderr
    assert "has 8-bit weights only" in done.stderr
    weights = constant(next(n for n in load_model(folder / "dist/mobile/model.onnx").graph).inputs[0])
    assert weights is None or np.abs(weights).max() <= 31
