"""`quantize.tune` in a recipe: the integers that a build stores are trained."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support import tiny

torch = pytest.importorskip("torch", reason="needs the extra `tune`")

from support.onnx_models import Array, f32, parse, randoms, run
from support.quantizing import ranges_of, target
from support.sampling import npz

from edgepack.calibration.ranges import Range
from edgepack.config.recipe import Data
from edgepack.config.training import AwareTune
from edgepack.data.samples import open_samples
from edgepack.errors import ConfigError
from edgepack.graph.normalize import normalize
from edgepack.ir.files import load_model
from edgepack.ir.inputs import input_specs
from edgepack.ir.model import constant
from edgepack.ir.numerics import sqnr_db
from edgepack.ir.scheme import Granularity
from edgepack.quantization.groups import find_fusion_groups
from edgepack.quantization.plan.plan import make_plan
from edgepack.quantization.plan.preparation import WeightPreparation
from edgepack.quantization.plan.types import Precision, QuantPlan, Request
from edgepack.quantization.rewrite.apply import apply_plan
from edgepack.quantization.weights.low_bit import LowBit
from edgepack.quantization.weights.rounding import Rounder, with_trained
from edgepack.training.quantization_aware import train_integers
from edgepack.training.train import TrainingRun

NET = """net (float[batch, 4, 8, 8] x) => (float[batch, 5] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    r = Clip (a, zero, six)
    c = Conv <pads = [1, 1, 1, 1], group = 4> (r, w2)
    s = Add (c, r)
    g = GlobalAveragePool (s)
    f = Flatten (g)
    n = LayerNormalization (f, gain, shift)
    y = Gemm <transB = 1> (n, w3, b3)
}"""


def net() -> ir.Model:
    shapes = {"w1": (4, 4, 3, 3), "b1": (4,), "w2": (4, 1, 3, 3), "w3": (5, 4), "b3": (5,)}
    more = {"zero": f32(0), "six": f32(6), "gain": f32([1, 2, 3, 1]), "shift": f32([0, 1, 0, -1])}
    model, _ = normalize(
        parse(NET, weights={**randoms(**shapes), **more}, opset=17), min_opset=13, max_opset=23
    )
    return model


def pictures(seed: int) -> Array:
    return f32(np.random.default_rng(seed).normal(size=(24, 1, 4, 8, 8)))


def all_static(
    model: ir.Model, folder: Path, granularity: Granularity, given: Mapping[str, Range] | None = None
) -> tuple[QuantPlan, Mapping[str, Range]]:
    device = target(granularity=granularity)
    groups = find_fusion_groups(model, device.kernels)
    ranges = given or ranges_of(model, device, {"x": pictures(2)}, folder)
    methods = {u.name: Request(Precision.STATIC) for u in groups}
    few = {u.name: LowBit(4) for u in groups if u.weight is not None}
    return make_plan(model, groups, ranges, device, methods, WeightPreparation(low_bit=few)), ranges


def fidelity(model: ir.Model, built: ir.Model, x: Array) -> float:
    """Of logits about their mean, which is all that a softmax sees."""
    both = [[run(m, {"x": one})["y"] for one in x] for m in (model, built)]
    return sqnr_db(*([y - y.mean(axis=-1, keepdims=True) for y in found] for found in both))


@pytest.mark.parametrize("granularity", list(Granularity))
def test_trained_integers_are_better_and_floats_stay(granularity: Granularity, tmp_path: Path) -> None:
    model = net()
    plan, ranges = all_static(model, tmp_path, granularity)
    path = npz(tmp_path / "x.npz", x=pictures(2))
    samples = open_samples(Data(path=str(path)), "training", input_specs(model), {}, base=tmp_path)
    rounder = Rounder(model)
    settings = AwareTune(steps=200, learning_rate=2e-3, held_out=0.0, batch=8)
    found = train_integers(model, plan, ranges, rounder, samples, settings, TrainingRun(0))
    trained = with_trained(rounder, plan, found.stored)
    assert set(found.stored) == {u.group.name for u in plan.groups if u.weight is not None}
    built = apply_plan(model, plan, trained(plan))
    nearest = apply_plan(model, plan, rounder(plan))
    assert fidelity(model, built, pictures(2)) > fidelity(model, nearest, pictures(2)) + 1
    for name in ("gain", "shift"):
        kept, before = (constant(m.graph.initializers[name]) for m in (built, model))
        assert kept is not None and before is not None and np.array_equal(kept, before)
    assert any("stored weights differ" in note for note in found.notes)


@pytest.mark.parametrize("granularity", list(Granularity))
def test_trained_ranges_give_the_scales_that_were_trained(granularity: Granularity, tmp_path: Path) -> None:
    model = net()
    calibrated = ranges_of(model, target(), {"x": pictures(2)}, tmp_path)
    # Ranges twice as wide as needed, so that training can improve them.
    wide = {n: replace(r, low=2 * r.low, high=2 * r.high) for n, r in calibrated.items()}
    plan, _ = all_static(model, tmp_path, granularity, wide)
    path = npz(tmp_path / "x.npz", x=pictures(2))
    samples = open_samples(Data(path=str(path)), "training", input_specs(model), {}, base=tmp_path)
    rounder = Rounder(model)
    settings = AwareTune(steps=200, learning_rate=5e-3, held_out=0.0, batch=8, learn_ranges=True)
    found = train_integers(model, plan, wide, rounder, samples, settings, TrainingRun(0))
    after, _ = all_static(model, tmp_path, granularity, found.ranges)
    narrower = [n for n in wide if found.ranges[n].high < 0.99 * wide[n].high]
    assert len(narrower) >= 3 and any("scales trained" in note for note in found.notes)
    for name in narrower:
        params, before = after.activations[name], plan.activations[name]
        assert params.zero_point == before.zero_point and params.scale < before.scale
        top = (params.type.qmax - int(params.zero_point)) * float(params.scale)
        assert np.isclose(found.ranges[name].high, top, rtol=1e-5)
    fixed = apply_plan(model, plan, rounder(plan))
    built = apply_plan(model, after, with_trained(rounder, after, found.stored)(after))
    assert fidelity(model, built, pictures(2)) > fidelity(model, fixed, pictures(2)) + 2


def test_other_candidates_are_rounded_as_before(tmp_path: Path) -> None:
    model = net()
    plan, _ = all_static(model, tmp_path, Granularity.PER_CHANNEL)
    rounder = Rounder(model)
    given = rounder(plan)
    other = {name: type(r)(-r.integers, r.bias) for name, r in given.items()}
    trained = with_trained(rounder, plan, other)
    assert all(np.array_equal(trained(plan)[n].integers, other[n].integers) for n in other)
    methods = {u.group.name: Request(Precision.WEIGHT_ONLY) for u in plan.groups}
    device = target(granularity=Granularity.PER_CHANNEL)
    groups = [u.group for u in plan.groups]
    floats = make_plan(model, groups, {}, device, methods)
    assert all(np.array_equal(a.integers, rounder(floats)[n].integers) for n, a in trained(floats).items())


def test_nothing_to_train_is_refused(tmp_path: Path) -> None:
    model, _ = normalize(
        parse("net (float[n, 4] x) => (float[n, 4] y) { y = Relu (x) }", weights={}),
        min_opset=13,
        max_opset=23,
    )
    path = npz(tmp_path / "x.npz", x=f32(np.ones((4, 1, 4))))
    samples = open_samples(Data(path=str(path)), "training", input_specs(model), {}, base=tmp_path)
    device = target()
    plan = make_plan(model, [], {}, device, {})
    with pytest.raises(ConfigError, match="no weight of this model runs in static int8"):
        train_integers(model, plan, {}, Rounder(model), samples, AwareTune(steps=1), TrainingRun(0))


def test_a_build_stores_what_was_trained(tmp_path: Path) -> None:
    tuning = {"steps": 400, "learning_rate": 5e-3, "batch": 50, "held_out": 0.0, "threads": 1}
    tuning["learn_ranges"] = True
    made = {}
    for name, quantize in (("plain", {}), ("trained", {"tune": tuning})):
        folder = tiny.project(
            tmp_path / name,
            quantize={"method": "static", "weight_bits": 4, **quantize},
            training_data={"path": "training.npz"},
        )
        np.savez(folder / "training.npz", x=tiny.samples(400, 9))
        result = tiny.run(folder, "build", "--json")
        assert result.returncode in (0, 1), result.stderr
        made[name] = json.loads(result.stdout), load_model(folder / "dist" / "x86-cpu" / "model.onnx")
    report, built = made["trained"]
    stage = next(s for s in report["stages"] if s["name"] == "tune int8")
    assert any("400 steps" in note for note in stage["notes"])
    assert stage["curve"]["steps"][-1] == 400 and len(stage["curve"]["losses"]) == 80
    assert "Loss of tune int8" in (folder / "dist" / "x86-cpu" / "report.html").read_text(encoding="utf-8")
    assert [n.op_type for n in built.graph] == [n.op_type for n in made["plain"][1].graph]
    decibels = [
        next(m for m in r["models"] if m["name"] == "onnx")["fidelity"]["sqnr_db"] for r, _ in made.values()
    ]
    # 0.5 dB on AVX2; the course of a training differs by some tenths between instruction sets.
    assert decibels[1] > decibels[0] + 0.25


def test_what_makes_zeros_is_refused(tmp_path: Path) -> None:
    folder = tiny.project(tmp_path, quantize={"method": "static", "tune": {"l1": 0.1}})
    made = tiny.run(folder, "build")
    assert made.returncode == 2 and "l1: for weights before they are quantized" in made.stderr
