"""Weights whose sums of two products fit 16 bits on processors that add pairs in int16."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rig.run_model import digest
from rig.x86 import missing, run_x86
from support.onnx_models import Array, parse
from support.quantizing import ranges_of, target

from edgepack.calibration.ranges import Range
from edgepack.config.recipe import Data
from edgepack.config.target import Target
from edgepack.data.samples import Samples, open_samples
from edgepack.graph.normalize import normalize
from edgepack.ir.files import save_model
from edgepack.ir.inputs import input_specs
from edgepack.ir.numerics import quantize, sqnr_db
from edgepack.ir.scheme import Granularity, QuantScheme, QuantType
from edgepack.quantization.groups import find_fusion_groups
from edgepack.quantization.plan.plan import make_plan
from edgepack.quantization.plan.preparation import WeightPreparation
from edgepack.quantization.plan.types import Precision, QuantPlan, Request
from edgepack.quantization.rewrite.apply import apply_plan
from edgepack.quantization.weights.matrix import to_groups
from edgepack.quantization.weights.moments import weight_inputs
from edgepack.quantization.weights.pair_saturation import (
    LARGEST_PAIR,
    could_saturate,
    pair_sums,
    weight_pairs,
    with_reduced_range,
)
from edgepack.quantization.weights.params import weight_params
from edgepack.quantization.weights.rounding import Rounder, round_weights
from edgepack.quantization.weights.saturation import outputs_that_saturate, reduced_range_notes

NET = """net (float[1,8,6,6] x) => (float[n,k] y) {
    c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c)
    d = Conv<group=16, pads=[1,1,1,1]>(r, g) s = Relu(d)
    p = GlobalAveragePool(s) f = Flatten(p) y = Gemm<transB=1>(f, m) }"""


def node_of(body: str, **shapes: tuple[int, ...]) -> tuple[ir.Node, Array]:
    ((name, shape),) = shapes.items()
    model = parse(body, weights={name: np.zeros(shape, np.float32)})
    return next(iter(model.graph)), np.zeros(shape, np.float32)


def test_neighbours_are_channels_of_one_tap() -> None:
    node, w = node_of("n (float[1,3,4,4] x) => (float[a,b,c,d] y) { y = Conv(x, w) }", w=(2, 3, 1, 2))
    # Columns are (channel, tap): 0 1 | 2 3 | 4 5; the kernel takes the channels of tap 0, then of tap 1.
    assert weight_pairs(node, w).tolist() == [[0, 2], [4, 1], [3, 5]]
    assert weight_pairs(node, w, added_channels=1).tolist() == [[0, 2], [4, -1], [1, 3], [5, -1]]


def test_neighbours_of_matmuls_and_none_of_depthwise() -> None:
    node, w = node_of("n (float[2,5] x) => (float[2,3] y) { y = MatMul(x, w) }", w=(5, 3))
    assert weight_pairs(node, w).tolist() == [[0, 1], [2, 3], [4, -1]]
    node, w = node_of("n (float[2,4] x) => (float[2,3] y) { y = Gemm<transB=1>(x, w) }", w=(3, 4))
    assert weight_pairs(node, w).tolist() == [[0, 1], [2, 3]]
    body = "n (float[1,4,4,4] x) => (float[a,b,c,d] y) { y = Conv<group=4>(x, w) }"
    node, w = node_of(body, w=(4, 1, 3, 3))
    assert weight_pairs(node, w).shape == (0, 2), "32 bits"
    node, w = node_of(body, w=(8, 1, 1, 2))
    assert weight_pairs(node, w).tolist() == [[0, 1]], "two outputs a channel go through the product"


@given(
    rows=hnp.arrays(np.int8, (1, 3, 5), elements=st.integers(-127, 127)),
    inputs=hnp.arrays(np.uint8, (1, 5)),
    more=hnp.arrays(np.uint8, (1, 5)),
)
def test_no_input_below_the_peaks_gives_a_larger_sum(rows: Array, inputs: Array, more: Array) -> None:
    pairs = np.array([[0, 1], [2, 3], [4, -1]])
    bound = pair_sums(rows, np.maximum(inputs, more), pairs)
    products = np.pad(rows.astype(int) * inputs[:, None], ((0, 0), (0, 0), (0, 1)))
    assert (np.abs(products[:, :, pairs].sum(-1)) <= bound).all()
    assert (bound <= pair_sums(rows, np.maximum(inputs, more), pairs, step=1)).all()
    one_sign = pair_sums(np.abs(rows), inputs, pairs)
    absolute = np.pad(np.abs(rows.astype(int)) * inputs[:, None], ((0, 0), (0, 0), (0, 1)))
    assert (absolute[:, :, pairs].sum(-1) == one_sign).all(), "and the bound is reached"


@pytest.mark.parametrize("granularity", Granularity)
def test_seven_bits_never_saturate(granularity: Granularity) -> None:
    body = "n (float[2,6] x) => (float[2,4] y) { y = MatMul(x, w) }"
    node, _ = node_of(body, w=(6, 4))
    weight = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    weight[:2, 0], weight[:, 1] = 3, [3, -3] * 3  # output 1 has no two large neighbours of one sign
    scheme = QuantScheme(QuantType.INT8, True, granularity, saturates=True)
    params = weight_params(node, weight, scheme)
    reduced_range = could_saturate(node, weight, params)
    assert reduced_range[0]
    assert granularity is Granularity.PER_TENSOR or not reduced_range[1]
    fewer = with_reduced_range(weight, params, scheme, reduced_range)
    assert could_saturate(node, weight, fewer) == ()
    stored = quantize(weight, fewer)
    assert np.abs(stored[:, 0]).max() == 63
    assert np.abs(stored[:, 1]).max() == (127 if granularity is Granularity.PER_CHANNEL else 63)


def avx2() -> Target:
    device = target()
    return device.model_copy(
        update={"quantization": device.quantization.model_copy(update={"saturates": True})}
    )


def build_inputs(folder: Path) -> tuple[ir.Model, Mapping[str, Range], Samples]:
    """A network with outputs that saturate and outputs that do not, its ranges and samples."""
    rng = np.random.default_rng(5)
    w = rng.normal(size=(16, 8, 3, 3)).astype(np.float32)
    w[:4] = np.abs(w[:4]) * 0.1 + 1  # neighbours of one sign, all large
    weights = {
        "w": w,
        "b": np.zeros(16, np.float32),
        "g": np.abs(rng.normal(size=(16, 1, 3, 3))).astype(np.float32),
        "m": rng.normal(size=(5, 16)).astype(np.float32),
    }
    model, _ = normalize(parse(NET, weights=weights), min_opset=13, max_opset=21)
    x = np.abs(rng.normal(size=(12, 1, 8, 6, 6))).astype(np.float32)
    x[:, :, 4:] *= 0.05  # channels that are never large
    path = folder / "x.npz"
    np.savez(path, x=x)
    samples = open_samples(Data(path=str(path)), "calibration", input_specs(model), {}, base=folder)
    return model, ranges_of(model, target(), {"x": x}, folder), samples


def planned(folder: Path, device: Target) -> tuple[ir.Model, QuantPlan, Rounder, Samples]:
    model, ranges, samples = build_inputs(folder)
    groups = find_fusion_groups(model, device.kernels)
    reduced_range = {}
    if device.quantization.saturates:
        reduced_range = outputs_that_saturate(model, groups, ranges, device, samples, seed=0)
    methods = {u.name: Request(Precision.STATIC) for u in groups}
    plan = make_plan(model, groups, ranges, device, methods, WeightPreparation(reduced_range=reduced_range))
    rounder = round_weights(model, plan, samples, gptq=True, threads=1, seed=0)
    return model, plan, rounder, samples


def cut_off(model: ir.Model, plan: QuantPlan, rounder: Rounder, samples: Samples, name: str) -> Array:
    """By output, the largest magnitude that pairs lose to saturation on the samples."""
    node = next(n for n in model.graph if n.outputs[0].name == name)
    group_plan = next(u for u in plan.groups if u.group.name == node.name)
    rows = to_groups(node, rounder(plan)[node.name or ""].integers).astype(int)
    pairs = weight_pairs(node, rounder(plan)[node.name or ""].integers, group_plan.added_channels)
    lost = np.zeros(rows.shape[1])
    for sample in samples:
        x = weight_inputs(node, sample.feeds["x"], np.random.default_rng(0))
        stored = quantize(x, plan.activations["x"]).astype(int)
        products = np.pad(rows[:, :, :, None] * stored[:, None], ((0, 0), (0, 0), (0, 1), (0, 0)))
        sums = products[:, :, pairs].sum(3)
        kept = np.clip(sums, -LARGEST_PAIR - 1, LARGEST_PAIR)
        lost = np.maximum(lost, np.abs(sums - kept).max((0, 2, 3)))
    return lost


def test_only_outputs_that_saturate_have_reduced_range(tmp_path: Path) -> None:
    model, plan, rounder, samples = planned(tmp_path, target())
    lost = cut_off(model, plan, rounder, samples, "c") > 0
    assert lost[:4].all()
    assert not lost.all()
    assert not any(u.reduced_range for u in plan.groups)
    assert reduced_range_notes(plan) == []
    model, plan, rounder, samples = planned(tmp_path, avx2())
    assert not cut_off(model, plan, rounder, samples, "c").any()
    conv = next(u for u in plan.groups if u.group.op_type == "Conv" and len(u.reduced_range))
    assert np.array(conv.reduced_range)[lost].all()
    assert sum(conv.reduced_range) <= lost.sum() + 2, "but for those near the limit"
    assert conv.reason.text == f"{sum(conv.reduced_range)} of 16 outputs have 7-bit weights: 8 would saturate"
    depthwise = next(u for u in plan.groups if u.group.inputs == ("r",))
    assert depthwise.reduced_range == ()
    stored = rounder(plan)[conv.group.name].integers
    assert ((np.abs(stored).max(axis=(1, 2, 3)) <= 63) == np.array(conv.reduced_range)).all()
    assert reduced_range_notes(plan)[0].endswith("have 7-bit weights: 8 would saturate")


def test_weights_without_an_integer_kernel_keep_eight_bits(tmp_path: Path) -> None:
    model, ranges, _ = build_inputs(tmp_path)
    groups = find_fusion_groups(model, avx2().kernels)
    for precision, expected in ((Precision.WEIGHT_ONLY, False), (Precision.DYNAMIC, True)):
        plan = make_plan(model, groups, ranges, avx2(), {u.name: Request(precision) for u in groups})
        gemm = next(u for u in plan.groups if u.group.op_type == "Gemm")
        assert any(gemm.reduced_range) is expected, "a range found at run time is used to its end"


@pytest.mark.rig
@pytest.mark.skipif(bool(missing()), reason="no emulated x86: " + "; ".join(missing()))
def test_a_processor_without_vnni_computes_the_same(tmp_path: Path) -> None:
    fidelity = {}
    for device in (target(), avx2()):
        model, plan, rounder, samples = planned(tmp_path, device)
        save_model(apply_plan(model, plan, rounder(plan)), tmp_path / "m.onnx")
        feeds = {f"{i}/x": s.feeds["x"] for i, s in enumerate(samples)}
        np.savez(tmp_path / "in.npz", **feeds)  # type: ignore[arg-type]
        got = []
        for vnni in (True, False):
            run_x86(tmp_path / "m.onnx", tmp_path / "in.npz", tmp_path / "out.npz", vnni=vnni)
            with np.load(tmp_path / "out.npz") as archive:
                got.append(dict(archive))
        pair = [[g[k] for k in sorted(g)] for g in got]
        fidelity[device.quantization.saturates] = sqnr_db(*pair), digest(got[0]) == digest(got[1])
    assert fidelity[False][0] < 40, "without a bit less, sums are cut off"
    assert fidelity[True][0] > 60, fidelity
