"""Zeros that training makes: how many, where, and which come back."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `tune`")

from support.onnx_models import conv_net, f32, parse
from support.sampling import npz
from support.tuning import QUICK, changed, noisy, random_pictures, trained, trained_arrays

from edgepack.config.recipe import Data
from edgepack.config.strict_yaml import parse as parse_settings
from edgepack.config.training import Sparsify, Tune
from edgepack.data.samples import Samples, open_samples
from edgepack.errors import ConfigError
from edgepack.ir.inputs import input_specs
from edgepack.training.masks import patterned, unstructured
from edgepack.training.parameters import trainable_parameters
from edgepack.training.sparsify import wanted_exchange, wanted_sparsity
from edgepack.training.train import TrainingRun, tune
from edgepack.training.zeros import Zeros


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    return random_pictures(tmp_path)


@pytest.mark.parametrize("regrowth", ["straight_through", "gradient"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("when", ["once", "dynamic"])
def test_training_makes_the_zeros_that_are_asked_for(
    samples: Samples, pattern: str, when: str, regrowth: str
) -> None:
    share = parse_settings(
        Sparsify, {"sparsity": 0.5, "pattern": pattern, "when": when, "regrowth": regrowth, "every": 4}, "s"
    )
    made = trained(conv_net(), samples, sparsify=share)
    after = {k: v for k, v in trained_arrays(made.model).items() if k.startswith("w")}
    if pattern == "unstructured":
        zeros = sum(int((v == 0).sum()) for v in after.values()) / sum(v.size for v in after.values())
        assert abs(zeros - 0.5) < 0.01
    else:
        rows = after["w1"].reshape(4, -1)[:, :24].reshape(-1, 4)
        assert ((rows == 0).sum(1) == 2).all()
    assert made.log[-1].sparsity == 0.5


@pytest.mark.parametrize("when", ["once", "dynamic"])
def test_a_model_with_some_zeros_gets_those_that_are_asked_for(samples: Samples, when: str) -> None:
    one_zero = changed(conv_net(), lambda key, v: v * (np.arange(v.size).reshape(v.shape) > 0))
    share = Sparsify(sparsity=0.5, when=when, every=1000, start=0.5)  # type: ignore[arg-type]
    made = trained(one_zero, samples, sparsify=share, held_out=0.25)
    after = {k: v for k, v in trained_arrays(made.model).items() if k.startswith("w")}
    zeros = sum(int((v == 0).sum()) for v in after.values()) / sum(v.size for v in after.values())
    assert abs(zeros - 0.5) < 0.01
    assert made.kept_step > 20


def test_a_dynamic_choice_lets_weights_come_back(samples: Samples) -> None:
    parameters = trainable_parameters(conv_net())
    key = "w2"
    parameters.masks = {key: torch.zeros(parameters.trained[key].shape)}
    parameters.returning = True
    parameters.value(key).sum().backward()
    assert parameters.tensors[key].grad.all()
    assert not parameters.arrays()[key].any()
    parameters.returning = False
    parameters.tensors[key].grad = None
    parameters.value(key).sum().backward()
    assert not parameters.tensors[key].grad.any()


def a_row_is_missing(tmp_path: Path) -> tuple[ir.Model, ir.Model, Samples]:
    """A product whose weights have zeros in place of a row that matters, the right one, and samples."""
    rng = np.random.default_rng(0)
    body = "net (float[batch, 16] x) => (float[batch, 12] y) { y = MatMul (x, w) }"
    wanted = f32(rng.normal(size=(16, 12)))
    wanted[3] = 2 * np.sign(wanted[3])  # one sign for all would be lost in the softmax
    begun = wanted.copy()
    begun[3] = 0
    path = npz(tmp_path / "x.npz", x=f32(rng.normal(size=(64, 1, 16))))
    start = parse(body, weights={"w": begun})
    samples = open_samples(Data(path=str(path)), "training", input_specs(start), {}, base=tmp_path)
    return start, parse(body, weights={"w": wanted}), samples


NEEDED: dict[str, Any] = {**QUICK, "steps": 150, "learning_rate": 0.05, "temperature": 1.0}


@pytest.mark.parametrize(
    "way",
    [
        {"regrowth": "straight_through", "every": 4, "end": 0.9},
        {"regrowth": "gradient", "every": 20, "end": 0.6, "exchanged": 0.5},
    ],
    ids=["straight through", "gradient"],
)
def test_zeros_that_are_needed_come_back(tmp_path: Path, way: dict[str, Any]) -> None:
    start, teacher, samples = a_row_is_missing(tmp_path)

    def come_back(**given: Any) -> int:
        share = parse_settings(Sparsify, {"sparsity": 0.5, "start": 0, **given}, "sparsify")
        made = tune(start, teacher, samples, Tune(**NEEDED, sparsify=share), TrainingRun(0))
        return int(np.count_nonzero(trained_arrays(made.model)["w"][3]))

    assert come_back(**way) > 6
    assert come_back(**{**way, "regrowth": "gradient", "exchanged": 0.0}) == 0


def test_by_gradient_weights_begin_at_zero_and_nothing_moves_those_that_are_out() -> None:
    parameters = trainable_parameters(conv_net())
    zeros = Zeros(Sparsify(sparsity=0.8, start=0, end=0.9, every=1, regrowth="gradient", exchanged=0.5), {})
    optimizer = torch.optim.Adam(list(parameters.tensors.values()), lr=0.1)
    came_back = 0
    for step in range(12):
        before = {key: mask.clone() for key, mask in parameters.masks.items()}
        seen = dict(zeros.gradients)
        zeros.choose(parameters, optimizer, step, 0.3 + step / 100)
        for key, mask in parameters.masks.items():
            back = (mask == 1) & (before.get(key, mask) == 0)
            came_back += int(back.sum())
            nothing = (mask == 0) | back
            assert not parameters.tensors[key][nothing].any()
            if step:
                assert seen[key][back].all(), "gradients are those of the whole weight"
                state = optimizer.state[parameters.tensors[key]]
                assert not state["exp_avg"][nothing].any() and not state["exp_avg_sq"][nothing].any()
        optimizer.zero_grad()
        torch.stack(
            [(parameters.value(key) - 0.3).square().sum() for key in parameters.weights()]
        ).sum().backward()
        zeros.after_backward(parameters)
        optimizer.step()
        assert not any(parameters.tensors[key][mask == 0].any() for key, mask in parameters.masks.items())
    assert came_back > 5


def test_weights_that_are_out_fade_where_no_gradient_holds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = f32(np.random.default_rng(5).normal(size=(24, 3, 8, 8)) * [[[[1]], [[1]], [[0]]]])
    path = npz(tmp_path / "x.npz", x=pictures)
    samples = open_samples(Data(path=str(path)), "training", input_specs(conv_net()), {}, base=tmp_path)
    seen: list[tuple[Any, Any]] = []

    def told(weights: Any, *arguments: Any) -> Any:
        masks = unstructured(weights, *arguments)
        seen.append((weights["w1"][:, 2].clone(), masks["w1"][:, 2]))
        return masks

    monkeypatch.setattr("edgepack.training.zeros.unstructured", told)
    trained(noisy(conv_net()), samples, sparsify=Sparsify(sparsity=0.7, every=4))
    (first, out), (last, _) = seen[0], seen[-1]
    gone = (out == 0) & (first != 0)
    assert gone.any()
    assert (last[gone].abs() < 0.98 * first[gone].abs()).all()
    assert torch.equal(last[seen[-2][1] == 1], first[seen[-2][1] == 1])


def test_patterns_are_followed_by_more_and_more_groups(
    samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def told(*arguments: Any) -> Any:
        masks = patterned(*arguments)
        counts.append(sum(int((mask == 0).sum()) for mask in masks.values()))
        return masks

    monkeypatch.setattr("edgepack.training.zeros.patterned", told)
    trained(conv_net(), samples, sparsify=Sparsify(pattern="2:4", every=4))
    groups = 4 * 6 + 4 * 2 + 5
    ways = [(step / 40 - 0.05) / 0.55 for step in (4, 8, 12, 16, 20)]
    assert counts == [2 * round((1 - (1 - t) ** 3) * groups) for t in ways] + [2 * groups]


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="half zeros"):
        parse_settings(Sparsify, {"pattern": "2:4", "sparsity": 0.7}, "sparsify")
    with pytest.raises(ConfigError, match="start must lie before end"):
        parse_settings(Sparsify, {"start": 0.6}, "sparsify")


def test_a_cubic_schedule() -> None:
    share = Sparsify(sparsity=0.8, start=0.1, end=0.6)
    assert [round(wanted_sparsity(share, t), 3) for t in (0, 0.1, 0.35, 0.6, 1)] == [0, 0, 0.7, 0.8, 0.8]
    shares = [round(wanted_exchange(share, t), 3) for t in (0.1, 0.35, 0.475, 0.6)]
    assert shares == [0.3, 0.15, 0.044, 0]
    once = Sparsify(sparsity=0.8, start=0.5, when="once")
    assert [wanted_sparsity(once, t) for t in (0.4, 0.5)] == [0, 0.8]


def test_patterns_lie_along_the_inputs_of_each_output() -> None:
    body = "net (float[1, 8] x) => (float[1, 3] y) { y = MatMul (x, w) }"
    weight = f32(np.arange(1, 25).reshape(8, 3))
    parameters = trainable_parameters(parse(body, weights={"w": weight}))
    rows = {"w": parameters.rows("w", parameters.dense("w").detach())}
    mask = parameters.from_rows("w", patterned(rows, 1.0, "2:4")["w"]).numpy()
    assert mask[:, 0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert np.array_equal(mask, np.repeat(mask[:, :1], 3, axis=1))


@pytest.mark.parametrize("penalty", ["l1", "l2", "group_lasso"])
def test_penalties_make_weights_smaller(samples: Samples, penalty: str) -> None:
    free = trained_arrays(trained(conv_net(), samples).model)
    drawn = trained_arrays(trained(conv_net(), samples, **{penalty: 0.05}).model)
    assert np.abs(drawn["w2"]).sum() < np.abs(free["w2"]).sum()
