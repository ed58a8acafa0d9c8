"""Quantization-aware training: what is trained is what the integer file computes."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `tune`")

from functools import partial

import onnx_ir as ir
from support.onnx_models import Array, conv_net, f32, parse, randoms, run
from support.quantizing import ranges_of, target
from support.sampling import npz

from edgepack.config.recipe import Data
from edgepack.config.training import Tune
from edgepack.data.samples import open_samples
from edgepack.graph.normalize import normalize
from edgepack.ir.files import save_model
from edgepack.ir.inputs import input_specs
from edgepack.ir.numerics import sqnr_db
from edgepack.ir.scheme import Granularity
from edgepack.quantization.groups import find_fusion_groups
from edgepack.quantization.plan.plan import make_plan
from edgepack.quantization.plan.types import Precision, Request
from edgepack.quantization.rewrite.apply import apply_plan
from edgepack.quantization.weights.rounding import Rounder, round_weights
from edgepack.training.fake_quant import QuantizedStudent
from edgepack.training.graph import as_tensor, compile_model, run_program
from edgepack.training.objective import choose_objective
from edgepack.training.parameters import trainable_parameters
from edgepack.training.start import start_from
from edgepack.training.train import TrainingRun, tune
from edgepack.training.weights import array_of, keys_of, trainables, with_weights

RESIDUAL = """net (float[batch, 4, 8, 8] x) => (float[batch, 5] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    r = Clip (a, zero, six)
    c = Conv <pads = [1, 1, 1, 1], group = 4> (r, w2)
    s = Add (c, r)
    g = GlobalAveragePool (s)
    f = Flatten (g)
    y = Gemm <transB = 1> (f, w3, b3)
}"""


def models() -> dict[str, tuple[object, Array]]:
    shapes = {"w1": (4, 4, 3, 3), "b1": (4,), "w2": (4, 1, 3, 3), "w3": (5, 4), "b3": (5,)}
    weights = {**randoms(**shapes), "zero": f32(0), "six": f32(6)}
    stacked = np.random.default_rng(2)
    return {
        "residual": (parse(RESIDUAL, weights=weights), f32(stacked.normal(size=(16, 1, 4, 8, 8)))),
        "plain": (conv_net(), f32(stacked.normal(size=(16, 1, 3, 8, 8)))),
    }


def moved(model: ir.Model) -> ir.Model:
    """Something to learn: the model with other weights."""
    rng, kept = np.random.default_rng(7), trainables(model)
    values = {key: array_of(value) for value, key in keys_of(model).items() if key in kept}
    return with_weights(
        model, {key: f32(v + 0.1 * v.std() * rng.normal(size=v.shape)) for key, v in values.items()}
    )


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("name", ["residual", "plain"])
def test_the_file_computes_what_was_trained(name: str, granularity: Granularity, tmp_path: Path) -> None:
    original, x = models()[name]
    model, _ = normalize(original, min_opset=13, max_opset=23)  # type: ignore[arg-type]
    device = target(granularity=granularity)
    groups = find_fusion_groups(model, device.kernels)
    ranges = ranges_of(model, device, {"x": x}, tmp_path)
    methods = {u.name: Request(Precision.STATIC) for u in groups}
    plan = make_plan(model, groups, ranges, device, methods)
    path = npz(tmp_path / "x.npz", x=x)
    samples = open_samples(Data(path=str(path)), "calibration", input_specs(model), {}, base=tmp_path)
    settings = Tune(steps=40, learning_rate=5e-3, held_out=0.0, batch=8)
    made = tune(
        model,
        moved(model),
        samples,
        settings,
        TrainingRun(0),
        make_student=partial(QuantizedStudent, plan=plan),
    )
    assert np.mean([e.loss for e in made.log[-5:]]) < np.mean([e.loss for e in made.log[:5]])

    after = make_plan(made.model, groups, ranges, device, methods)
    built = apply_plan(made.model, after, Rounder(made.model)(after))
    save_model(built, tmp_path / "int8.onnx")
    parameters = trainable_parameters(made.model)
    student = QuantizedStudent(made.model, parameters, after)
    trained, stored, floats = [], [], []
    for sample in samples:
        feeds = {k: as_tensor(v) for k, v in sample.feeds.items()}
        with torch.no_grad():
            trained.append(student(feeds, parameters, [])["y"].numpy())
        stored.append(run(tmp_path / "int8.onnx", sample.feeds, optimize=False)["y"])
        floats.append(run(made.model, sample.feeds)["y"])
    assert sqnr_db(stored, trained) > 45
    assert sqnr_db(stored, trained) > sqnr_db(stored, floats) + 10


@pytest.mark.parametrize("granularity", list(Granularity))
def test_training_starts_from_the_integers_that_it_is_given(granularity: Granularity, tmp_path: Path) -> None:
    original, x = models()["residual"]
    model, _ = normalize(original, min_opset=13, max_opset=23)  # type: ignore[arg-type]
    device = target(granularity=granularity)
    groups = find_fusion_groups(model, device.kernels)
    ranges = ranges_of(model, device, {"x": x}, tmp_path)
    plan = make_plan(model, groups, ranges, device, {u.name: Request(Precision.STATIC) for u in groups})
    path = npz(tmp_path / "x.npz", x=x)
    samples = open_samples(Data(path=str(path)), "calibration", input_specs(model), {}, base=tmp_path)
    given = round_weights(model, plan, samples, gptq=True, threads=1, seed=0)(plan)
    nearest = Rounder(model)(plan)
    assert any(not np.array_equal(given[n].integers, nearest[n].integers) for n in given)
    start = start_from(model, plan, given)

    save_model(apply_plan(model, plan, given), tmp_path / "given.onnx")
    parameters = trainable_parameters(start.model)
    student = QuantizedStudent(start.model, parameters, plan, start)
    for sample in samples:
        with torch.no_grad():
            made = student({k: as_tensor(v) for k, v in sample.feeds.items()}, parameters, [])["y"].numpy()
        assert sqnr_db(run(tmp_path / "given.onnx", sample.feeds, optimize=False)["y"], made) > 45
    untouched = start.stored(start.model)
    assert all(np.array_equal(untouched[n].integers, given[n].integers) for n in given)

    settings = Tune(steps=40, learning_rate=5e-3, held_out=0.2, batch=8)
    make_student = partial(QuantizedStudent, plan=plan, start=start)
    made = tune(start.model, moved(model), samples, settings, TrainingRun(0), make_student=make_student)
    assert made.kept_step > 0
    after = start.stored(made.model)
    assert any(not np.array_equal(after[n].integers, given[n].integers) for n in given)
    save_model(apply_plan(made.model, plan, after), tmp_path / "trained.onnx")
    parameters = trainable_parameters(made.model)
    student = QuantizedStudent(made.model, parameters, plan, start)
    feeds = next(iter(samples)).feeds
    with torch.no_grad():
        trained = student({k: as_tensor(v) for k, v in feeds.items()}, parameters, [])["y"].numpy()
    assert sqnr_db(run(tmp_path / "trained.onnx", feeds, optimize=False)["y"], trained) > 45


def test_what_q_clamps_is_not_compared_before_it(tmp_path: Path) -> None:
    """Without its Clip the first convolution has the Clip's name, and values that the Clip would cut."""
    original, x = models()["residual"]
    model, _ = normalize(original, min_opset=13, max_opset=23)  # type: ignore[arg-type]
    device = target()
    groups = find_fusion_groups(model, device.kernels)
    ranges = ranges_of(model, device, {"x": x}, tmp_path)
    plan = make_plan(model, groups, ranges, device, {u.name: Request(Precision.STATIC) for u in groups})
    parameters = trainable_parameters(model)
    student = QuantizedStudent(model, parameters, plan)
    assert "Clip" not in {n.op_type for n in student.model.graph}
    objective = choose_objective(student.model, model, Tune(), model)
    assert objective.features
    feeds = {"x": as_tensor(x[0])}
    with torch.no_grad():
        made = student(feeds, parameters, objective.mine)
        meant = run_program(compile_model(model), feeds, keep=objective.teachers)
    for pair in (*objective.outputs, *objective.features):
        assert sqnr_db(meant[pair.teachers].numpy(), made[pair.mine].numpy()) > 20


def test_what_q_clamps_before_the_last_product_is_compared_behind_it(tmp_path: Path) -> None:
    body = """net (float[batch, 16] x) => (float[batch, 4] y) {
        h = Gemm <transB = 1> (x, w1, b1)
        r = Relu (h)
        y = Gemm <transB = 1> (r, w2, b2)
    }"""
    original = parse(body, weights=randoms(w1=(24, 16), b1=(24,), w2=(4, 24), b2=(4,)))
    model, _ = normalize(original, min_opset=13, max_opset=23)
    device, x = target(), f32(np.random.default_rng(1).normal(size=(8, 1, 16)))
    groups = find_fusion_groups(model, device.kernels)
    ranges = ranges_of(model, device, {"x": x}, tmp_path)
    plan = make_plan(model, groups, ranges, device, {u.name: Request(Precision.STATIC) for u in groups})
    parameters = trainable_parameters(model)
    student = QuantizedStudent(model, parameters, plan)
    assert "Relu" not in {n.op_type for n in student.model.graph}
    objective = choose_objective(student.model, model, Tune(), model)
    (pair,) = objective.features
    assert pair.teachers == "r"
    with torch.no_grad():
        made = student({"x": as_tensor(x[0])}, parameters, objective.mine)
        meant = run_program(compile_model(model), {"x": as_tensor(x[0])}, keep=objective.teachers)
    assert sqnr_db(meant["r"].numpy(), made[pair.mine].numpy()) > 30


def test_every_stored_weight_is_trained_and_nothing_is_shared(tmp_path: Path) -> None:
    original, x = models()["residual"]
    model, _ = normalize(original, min_opset=13, max_opset=23)  # type: ignore[arg-type]
    device = target()
    groups = find_fusion_groups(model, device.kernels)
    plan = make_plan(
        model, groups, ranges_of(model, device, {"x": x}, tmp_path), device,
        {u.name: Request(Precision.STATIC) for u in groups},
    )  # fmt: skip
    parameters = trainable_parameters(model)
    student = QuantizedStudent(model, parameters, plan)
    assert len(student.groups) == 3
    feeds = {"x": as_tensor(x[0])}
    student(feeds, parameters, [])["y"].sum().backward()
    assert all(t.grad is not None and bool(t.grad.any()) for t in parameters.tensors.values())
