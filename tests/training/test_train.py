"""Training: it learns, keeps zeros and shared values, repeats exactly, and goes on after it was killed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `tune`")

from support.onnx_models import Array, conv_net, f32, parse, run
from support.sampling import npz
from support.tuning import QUICK, changed, distance, noisy, random_pictures, trained, trained_arrays

from edgepack.config.recipe import Data
from edgepack.config.training import Gradients, Sparsify, Tune
from edgepack.data.augmentation import augmented
from edgepack.data.samples import Samples, open_samples
from edgepack.errors import ConfigError, ModelError
from edgepack.ir.fingerprint import fingerprint
from edgepack.ir.inputs import input_specs
from edgepack.ir.numerics import short_scale
from edgepack.quantization.weights.codebook_scales import KEY, set_codebook_scales
from edgepack.training.distillation_data import prepare_distillation
from edgepack.training.objective import choose_objective
from edgepack.training.parameters import trainable_parameters
from edgepack.training.train import TrainingRun, Tuned, tune
from edgepack.training.weights import array_of, keys_of, with_weights


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    return random_pictures(tmp_path)


def test_a_model_learns_the_outputs_of_its_teacher(samples: Samples) -> None:
    start = noisy(conv_net())
    before = fingerprint(start)
    made = trained(start, samples, steps=150)
    assert fingerprint(start) == before
    assert distance(made.model, conv_net(), samples) < 0.2 * distance(start, conv_net(), samples)
    assert [e.step for e in made.log] == list(range(1, 151))
    assert made.ended == "steps" and made.kept_step == 150
    assert [n.op_type for n in made.model.graph] == [n.op_type for n in start.graph]


def test_zeros_stay_and_statistics_are_frozen(samples: Samples) -> None:
    rng = np.random.default_rng(1)

    def half(key: str, value: Array) -> Array:
        return value * (rng.random(value.shape) < 0.5) if key.startswith("w") else value

    start = changed(noisy(conv_net()), half)
    after = trained_arrays(trained(start, samples).model)
    for key, value in trained_arrays(start).items():
        assert np.array_equal(value == 0, after[key] == 0), key
        assert not np.array_equal(value, after[key]), key
    assert {"bn_mean", "bn_var"}.isdisjoint(after)


def test_shared_values_stay_shared(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codebook = f32([-0.5, 0.0, 0.25, 1.0])
    places = rng.integers(0, 4, (32, 20))
    body = "net (float[batch, 32] x) => (float[batch, 20] y) { y = MatMul (x, w) }"
    teacher = parse(body, weights={"w": f32(rng.normal(size=(32, 20)))})
    start = parse(body, weights={"w": codebook[places]})
    path = npz(tmp_path / "x.npz", x=f32(rng.normal(size=(32, 1, 32))))
    samples = open_samples(Data(path=str(path)), "calibration", input_specs(start), {}, base=tmp_path)
    made = tune(start, teacher, samples, Tune(**QUICK), TrainingRun(0))
    after = trained_arrays(made.model)["w"]
    values = [np.unique(after[places == i]) for i in range(4)]
    assert all(len(v) == 1 for v in values)
    assert values[1][0] == 0
    assert all(abs(float(values[i][0]) - float(codebook[i])) > 1e-3 for i in (0, 2, 3))


def on_a_codebook(model: ir.Model, key: str, scale: Array, shape: tuple[int, ...]) -> Array:
    """Put integers times ``scale``, one an output, into the weight ``key``; gives the integers."""
    codes = np.random.default_rng(2).choice(f32([-90, 0, 33, 71, 120]), (len(scale), *shape[1:]))
    (value,) = [v for v, k in keys_of(model).items() if k == key]
    value.const_value = ir.tensor(codes * scale.reshape(-1, *[1] * (len(shape) - 1)), name=key)
    set_codebook_scales(value, scale)
    return codes


def test_weights_keep_their_codebook_scales(samples: Samples) -> None:
    start = conv_net()
    key, before = next((k, v) for k, v in trained_arrays(start).items() if v.ndim == 4)
    scale = short_scale(f32(np.geomspace(0.001, 0.01, len(before))))
    codes = on_a_codebook(start, key, scale, before.shape)
    assert np.array_equal(trainable_parameters(start).arrays()[key], trained_arrays(start)[key])
    made = trained(start, samples, steps=200)
    (value,) = [v for v, k in keys_of(made.model).items() if k == key]
    after, scales = array_of(value), value.meta[KEY]
    integers = np.rint(after / scales.reshape(-1, 1, 1, 1))
    assert np.array_equal(integers * scales.reshape(-1, 1, 1, 1), after)
    for code in np.unique(codes):
        (now,) = np.unique(integers[codes == code])
        assert abs(now) <= 127 and (now != code) == (code != 0), code
    assert (
        (scales > 0).all()
        and not np.array_equal(scales, scale)
        and np.array_equal(scales, short_scale(scales))
    )
    further = trained(made.model, samples, held_out=0.5, learning_rate=1e-9, steps=1)
    assert np.array_equal(trained_arrays(further.model)[key], after)


def test_a_weight_off_its_codebook_is_trained_freely(samples: Samples) -> None:
    start = conv_net()
    key, before = next((k, v) for k, v in trained_arrays(start).items() if v.ndim == 4)
    on_a_codebook(start, key, f32(np.full(len(before), 0.01)), before.shape)
    parameters = trainable_parameters(with_weights(start, {key: before}))
    assert not parameters.scales and np.array_equal(parameters.arrays()[key], before)


def test_the_same_seed_gives_the_same_weights(samples: Samples) -> None:
    runs = [trained_arrays(trained(noisy(conv_net()), samples).model) for _ in range(2)]
    other = trained_arrays(tune(noisy(conv_net()), conv_net(), samples, Tune(**QUICK), TrainingRun(2)).model)
    assert all(np.array_equal(runs[0][k], runs[1][k]) for k in runs[0])
    assert not all(np.array_equal(runs[0][k], other[k]) for k in other)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"held_out": 0.25, "optimizer": "sgd"},
        {"sparsify": Sparsify(sparsity=0.7, every=3)},
        {"sparsify": Sparsify(sparsity=0.7, every=5, end=0.9, regrowth="gradient")},
        {"sparsify": Sparsify(pattern="channels", every=5, end=0.9, regrowth="gradient")},
        {"gradients": Gradients(bits=4)},
    ],
    ids=["adam", "held out, sgd", "dynamic zeros", "regrown", "channels", "gradients of 4 bits"],
)
def test_killed_and_resumed_it_gives_the_same_weights(
    samples: Samples, tmp_path: Path, settings: Mapping[str, Any]
) -> None:
    config = Tune(**{**QUICK, **settings})

    def go(folder: Path, die_at: int = -1) -> Tuned:
        def on_step(done: int, total: int, text: str) -> None:
            if done == die_at:
                raise Killed

        start = noisy(conv_net())
        return tune(start, conv_net(), samples, config, TrainingRun(3, checkpoints=folder, on_step=on_step))

    whole = go(tmp_path / "whole")
    for die_at in (1, 17, 29):
        with pytest.raises(Killed):
            go(tmp_path / "broken", die_at)
    again = go(tmp_path / "broken")
    a, b = trained_arrays(whole.model), trained_arrays(again.model)
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert [(e.step, e.loss) for e in whole.log] == [(e.step, e.loss) for e in again.log]
    lines = (tmp_path / "broken" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 41))


def test_a_checkpoint_of_another_run_is_refused(samples: Samples, tmp_path: Path) -> None:
    tune(noisy(conv_net()), conv_net(), samples, Tune(**QUICK), TrainingRun(0, checkpoints=tmp_path / "c"))
    with pytest.raises(ConfigError, match="another model, samples or settings"):
        tune(
            noisy(conv_net()), conv_net(), samples, Tune(**QUICK), TrainingRun(1, checkpoints=tmp_path / "c")
        )
    path = tmp_path / "c" / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    for other in ({**content, "layout": 99}, {k: v for k, v in content.items() if k != "layout"}, [1]):
        torch.save(other, path)
        with pytest.raises(ConfigError, match=r"another version of edgepack .* remove the file"):
            tune(
                noisy(conv_net()),
                conv_net(),
                samples,
                Tune(**QUICK),
                TrainingRun(0, checkpoints=tmp_path / "c"),
            )
    path.write_bytes(b"no")
    with pytest.raises(ConfigError, match="truncated"):
        tune(
            noisy(conv_net()), conv_net(), samples, Tune(**QUICK), TrainingRun(1, checkpoints=tmp_path / "c")
        )


def test_no_augmented_copy_of_a_held_out_image_is_trained_on(samples: Samples, tmp_path: Path) -> None:
    objective = choose_objective(conv_net(), conv_net(), Tune())
    (tmp_path / "l").mkdir()
    seen = augmented(samples, 2, seed=0)
    distillation = prepare_distillation(
        conv_net(),
        objective,
        seen,
        Tune(held_out=0.25, views=2, labels=1.0),
        threads=1,
        folder=tmp_path / "l",
    )
    assert distillation.labels is not None and len(distillation.feeds) == 3 * len(samples)
    assert distillation.judged == tuple(range(9, 72, 12))
    originals = {i // 3 for i in distillation.judged}
    assert originals.isdisjoint(i // 3 for i in distillation.trained)
    assert len(distillation.trained) == 3 * (len(samples) - len(originals))
    assert [distillation.labels[i] for i in (9, 10, 11, 12)] == [3, 3, 3, 4]
    made = trained(noisy(conv_net()), samples, views=2, held_out=0.25)
    assert made.kept_step > 0 and distance(made.model, conv_net(), samples) < distance(
        noisy(conv_net()), conv_net(), samples
    )


def test_weights_between_start_and_end_are_kept_where_they_judge_best(samples: Samples) -> None:
    """One step that goes too far: part of it is better than all of it and than none."""
    off = noisy(conv_net(), 0.05)
    made = [trained(off, samples, held_out=0.25, steps=12, learning_rate=rate) for rate in (0.03, 0.1, 0.3)]
    parts = [m for m in made if m.between < 1]
    assert parts
    for m in parts:
        assert m.kept_step == 12
        assert m.between in (0.25, 0.5, 0.75)
        first, final = trained_arrays(off), trained_arrays(m.model)
        assert any(not np.array_equal(first[key], final[key]) for key in first)


def test_the_best_on_held_out_samples_is_kept_the_start_too(samples: Samples) -> None:
    made = trained(conv_net(), samples, held_out=0.25, learning_rate=0.5)
    assert made.kept_step == 0
    assert distance(made.model, conv_net(), samples) == 0
    better = trained(noisy(conv_net()), samples, held_out=0.25)
    assert better.kept_step > 0
    judged = [e.held_out["loss"] for e in better.log if e.held_out is not None]
    assert judged and better.kept_step == next(
        e.step for e in better.log if e.held_out is not None and e.held_out["loss"] == min(judged)
    )


def test_it_ends_when_the_goal_is_reached_or_time_is_up(samples: Samples) -> None:
    early = trained(noisy(conv_net(), 0.01), samples, held_out=0.25, stop_at=0.5, steps=400)
    assert "agreement" in early.ended and len(early.log) < 400
    hurried = trained(noisy(conv_net()), samples, steps=None, budget_s=0.2)
    assert hurried.ended == "time" and hurried.log


def test_labels_are_learned_without_a_teachers_help(samples: Samples) -> None:
    made = trained(conv_net(), samples, labels=1.0, logits=0.0, features=0.0, steps=150, learning_rate=1e-2)
    right = [int(run(made.model, s.feeds)["y"].argmax()) == s.label for s in samples]
    assert np.mean(right) > np.mean([int(run(conv_net(), s.feeds)["y"].argmax()) == s.label for s in samples])
    assert set(made.log[0].parts) == {"labels"}


def test_what_is_not_trained_stays_to_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    uneven = changed(conv_net(), lambda key, v: f32(v * 10 ** rng.uniform(-9, 5, v.shape)))
    for key, array in trainable_parameters(uneven).arrays().items():
        assert np.array_equal(array, trained_arrays(uneven)[key]), key


def test_what_cannot_be_trained_is_said_first(samples: Samples) -> None:
    body = """net (float[batch, 3, 8, 8] x) => (float[batch, 3, 8, 8] y) {
        n = Conv (x, w)
        y = Bernoulli (n)
    }"""
    model = parse(body, weights={"w": f32(np.ones((3, 3, 1, 1)))})
    with pytest.raises(ModelError, match="Bernoulli"):
        tune(model, model, samples, Tune(**QUICK), TrainingRun(0))
    with pytest.raises(ConfigError, match="no weight is named 'bn_scal', did you mean"):
        trainable_parameters(conv_net(), ["bn_scal"])


def test_a_tied_table_stays_tied(tmp_path: Path) -> None:
    """Exports have it as two constants, by rows and by columns."""
    rng = np.random.default_rng(1)
    table = f32(rng.normal(size=(64, 32)))
    body = """net (int64[b, 6] ids) => (float[b, 6, 64] y) {
        e = Gather (t, ids) h = MatMul (e, w) g = Tanh (h) y = MatMul (g, u) }"""
    teacher = parse(body, weights={"t": table, "w": f32(rng.normal(size=(32, 32)) / 6), "u": f32(table.T)})
    shaken = f32(table + 0.2 * rng.normal(size=table.shape))
    model = with_weights(teacher, {"t": shaken, "u": f32(shaken.T)})
    path = npz(tmp_path / "x.npz", ids=rng.integers(0, 64, (32, 1, 6)))
    words = open_samples(Data(path=str(path)), "calibration", input_specs(model), {}, base=tmp_path)
    made = tune(model, teacher, words, Tune(**QUICK), TrainingRun(0)).model
    after = trained_arrays(made)
    np.testing.assert_array_equal(after["t"], after["u"].T)
    assert not np.array_equal(after["t"], shaken)
    assert distance(made, teacher, words) < 0.7 * distance(model, teacher, words)
