"""Biases: right where 32 bits do not hold them, and corrected for what rounding does on average."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.onnx_models import f32, parse, run
from support.quantizing import build, target, weight

from edgepack.calibration.ranges import Range
from edgepack.graph.normalize import normalize
from edgepack.quantization.groups import find_fusion_groups
from edgepack.quantization.plan.plan import make_plan, tensors_to_observe
from edgepack.quantization.plan.types import GroupPlan, Precision, Request
from edgepack.quantization.weights.rounding import Rounder

Floats = npt.NDArray[np.float32]


@pytest.mark.parametrize("shape", ["5,16", "2,5,16"])  # a Gemm, and a MatMul with an Add behind it
@pytest.mark.parametrize("magnitude", [1e-5, 1e-7, 1e-9, 1e-13])
def test_a_bias_is_right_however_small_the_weights_of_its_channel_are(
    magnitude: float, shape: str, tmp_path: Path
) -> None:
    """In steps of input scale times weight scale, 1.0 is 4e8 for weights of 1e-5 and 4e10 for 1e-7."""
    w = weight(16, 8)
    w[:, 0] *= magnitude / np.abs(w[:, 0]).max()
    output = "a,b" if shape == "5,16" else "a,b,c"
    body = f"net (float[{shape}] x) => (float[{output}] y) {{ m = MatMul(x, w) y = Add(m, b) }}"
    made = build(tmp_path, body, {"w": w, "b": f32(np.ones(8))})
    x = f32(np.random.default_rng(1).normal(size=[int(size) for size in shape.split(",")]))
    (y,) = run(made.quantized, {"x": x}).values()
    np.testing.assert_allclose(y[..., 0], 1.0, atol=0.02)


def gemm(w: Floats, b: Floats) -> tuple[Rounder, GroupPlan]:
    body = "net (float[n,6] x) => (float[n,4] y) { y = Gemm<transB=1>(x, w, b) }"
    model, _ = normalize(parse(body, weights={"w": w, "b": b}), min_opset=13, max_opset=21)
    (group,) = groups = find_fusion_groups(model, target().kernels)
    ranges = dict.fromkeys(tensors_to_observe(groups), Range(-3, 3, -3, 3))
    plan = make_plan(model, groups, ranges, target(), {group.name: Request(Precision.STATIC)})
    return Rounder(model), plan.groups[0]


@given(st.integers(0, 1000), st.booleans())
def test_the_mean_of_an_output_is_what_the_float_layer_gives_on_float_inputs(
    seed: int, rounded_by_gptq: bool
) -> None:
    """Behind quantized layers inputs differ on average. Weights that GPTQ rounded for these inputs get a bias
    that makes up for both; weights that were rounded to nearest after all, one for their rounding alone."""
    rng = np.random.default_rng(seed)
    w, b = f32(rng.normal(size=(4, 6))), f32(rng.normal(size=4))
    actual, intended = f32(rng.normal(size=(2, 1, 6)))
    rounder, planned = gemm(w, b)
    params = planned.weight
    assert params is not None
    stored = np.clip(np.rint(w / params.scale[:, None]) + rng.integers(-1, 2, w.shape), -127, 127)
    rounder.means = {planned.group.name: (actual, intended)}
    if rounded_by_gptq:
        rounder.rounded = {(planned.group.name, params.scale.tobytes()): stored.astype(np.int8)}
    found = rounder.one(rounder.model.graph[0], planned, params)
    assert found.bias is not None
    real = found.integers.astype(np.float32) * params.scale[:, None]
    mean = real @ (actual if rounded_by_gptq else intended)[0] + found.bias
    np.testing.assert_allclose(mean, w @ intended[0] + b, atol=1e-4)
