"""Channels that training takes out: all that belongs to one goes at once, and then leaves the graph."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `tune`")

from hypothesis import given, settings
from hypothesis import strategies as st
from support.channel_nets import IMAGE, PRUNED, model_of
from support.onnx_models import conv_net, difference, f32, run
from support.quantizing import weight
from support.sampling import npz
from support.tuning import QUICK, random_pictures, trained, trained_arrays

from edgepack.compression.channels.atoms import find_groups
from edgepack.compression.channels.rules import find_channels
from edgepack.compression.compact import CompactReport, compact, compact_notes
from edgepack.compression.structured import Multiples
from edgepack.config.passes import Compact
from edgepack.config.recipe import Data
from edgepack.config.strict_yaml import parse as parse_settings
from edgepack.config.training import Sparsify, Tune
from edgepack.data.samples import Samples, open_samples
from edgepack.errors import ConfigError
from edgepack.graph.normalize import normalize
from edgepack.ir.inputs import input_specs
from edgepack.training.coupled import couple
from edgepack.training.masks import LEAST_CHANNELS, Past, whole_channels
from edgepack.training.parameters import trainable_parameters
from edgepack.training.train import TrainingRun, tune
from edgepack.training.weights import array_of, keys_of
from edgepack.training.zeros import Zeros


def share(**given: Any) -> Sparsify:
    return parse_settings(Sparsify, {"pattern": "channels", "every": 3, **given}, "sparsify")


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    return random_pictures(tmp_path)


def tuned(model: ir.Model, folder: Path, sparsify: Sparsify, **more: Any) -> ir.Model:
    """The model after a short training on noise."""
    path = npz(folder / "x.npz", x=f32(np.random.default_rng(1).normal(size=(12, 1, 6, 8, 8))))
    noise = open_samples(Data(path=str(path)), "training", input_specs(model), {}, base=folder)
    config = Tune(**{**QUICK, "steps": 12, **more}, sparsify=sparsify)
    return tune(model, model, noise, config, TrainingRun(0)).model


def sizes(model: ir.Model) -> int:
    """How many classes of channels may go."""
    return sum(len(group.classes) for group in find_groups(find_channels(model)))


X = {"x": f32(np.random.default_rng(5).normal(size=(1, 6, 8, 8)))}


@pytest.mark.parametrize(
    ("name", "regrowth"),
    [*((name, "straight_through") for name in PRUNED), ("residual", "gradient"), ("concat", "gradient")],
)
def test_what_training_takes_out_leaves_the_graph_and_outputs_stay(
    tmp_path: Path, name: str, regrowth: str
) -> None:
    model = model_of(f"{IMAGE} {{ {PRUNED[name]} }}")
    masked = tuned(model, tmp_path, share(sparsity=0.4, regrowth=regrowth))
    small, report = compact(masked, Compact(), Multiples())
    assert report.channels == sizes(model) > report.gone
    assert report.gone == report.unread == min(round(0.4 * report.channels), report.gone)
    assert report.gone >= min(round(0.4 * report.channels), 1)
    assert sizes(small) == report.channels - report.gone
    assert difference(run(masked, X), run(small, X)) < 1e-5
    assert difference(run(model, X), run(small, X)) > 1e-3


RESIDUAL = model_of(f"{IMAGE} {{ {PRUNED['residual']} }}")


def test_all_that_belongs_to_a_channel_is_zero(samples: Samples) -> None:
    """Weights, biases and entries of normalizations, whatever the node; the file's own nodes stay."""
    made = trained(conv_net(), samples, sparsify=share(sparsity=0.5)).model
    after = trained_arrays(made)
    (gone,) = np.nonzero(~after["w3"].any(0))
    assert len(gone) == 2
    for key in ("w1", "w2", "b2", "bn_scale", "bn_bias"):
        assert not after[key][gone].any(), key
        assert np.delete(after[key], gone, 0).all(), key
    assert [n.op_type for n in made.graph] == [n.op_type for n in conv_net().graph]
    small, _ = compact(normalize(made, min_opset=13, max_opset=21)[0], Compact(), Multiples())
    feeds = {"x": f32(np.random.default_rng(0).normal(size=(3, 3, 8, 8)))}
    assert difference(run(made, feeds), run(small, feeds)) < 1e-5
    shapes = {tuple(v.shape) for v in (array_of(value) for value in keys_of(small))}
    assert {(2, 3, 3, 3), (2, 1, 3, 3), (5, 2)} <= shapes


@pytest.mark.parametrize("regrowth", ["straight_through", "gradient"])
def test_a_channel_that_is_needed_comes_back(tmp_path: Path, regrowth: str) -> None:
    """One that was least when the first choice was made, and has a large gradient."""
    parameters = trainable_parameters(RESIDUAL)
    zeros = Zeros(
        share(sparsity=0.9, start=0, end=0.9, every=1, regrowth=regrowth), {}, couple(RESIDUAL, parameters)
    )
    optimizer = torch.optim.SGD(list(parameters.tensors.values()), lr=0.5)
    with torch.no_grad():
        parameters.tensors["v"][:, 3] = 0.01  # [5, 12, 1, 1] consumes the sum of both convolutions
    zeros.choose(parameters, optimizer, 1, 0.02)
    assert zeros.alive is not None and (~zeros.alive).nonzero().flatten().tolist() == [3]
    made = {key: tensor.detach().clone() for key, tensor in parameters.tensors.items() if key != "v"}
    for step in range(2, 9):
        optimizer.zero_grad()
        ((parameters.value("v")[:, 3] - 5.0).square().sum() + 0 * parameters.value("w").sum()).backward()
        zeros.after_backward(parameters)
        optimizer.step()
        zeros.after_step(parameters, 0.5)
        zeros.choose(parameters, optimizer, step, 0.02)
    assert zeros.alive[3] and int((~zeros.alive).sum()) == 1
    assert all(torch.equal(parameters.tensors[key], tensor) for key, tensor in made.items()), (
        "what makes it stays"
    )


def test_channels_of_weights_that_are_kept_or_shared_stay() -> None:
    whole = couple(RESIDUAL, trainable_parameters(RESIDUAL))
    assert len(whole.groups) == 12 and {p.key for p in whole.places} == {"w", "b", "w2", "v"}
    with pytest.raises(ConfigError, match="can be pruned: 'w2' is excluded by `keep`"):
        couple(RESIDUAL, trainable_parameters(RESIDUAL, ["w2"]))
    twice = model_of(
        f"{IMAGE} {{ h = Conv (x, w2) q = Relu (x) k = Conv (q, w2) c = Concat <axis = 1> (h, k)"
        " y = Conv (c, v24) }"
    )
    with pytest.raises(ConfigError, match="'w2' has several consumers"):
        couple(twice, trainable_parameters(twice))
    # The same weight consumes a tracked value in one node and the input in the other.
    text = "a = Conv (x, s3) h = Conv (a, s3) c = Concat <axis = 1> (h, a) y = Conv (c, v12)"
    weights = {"s3": weight(6, 6, 1, 1), "v12": weight(5, 12, 1, 1)}
    apart = model_of(f"{IMAGE} {{ {text} }}", weights)
    with pytest.raises(ConfigError, match="'s3' has several consumers"):
        couple(apart, trainable_parameters(apart))


def test_scores_compare_within_groups() -> None:
    model = model_of(f"{IMAGE} {{ {PRUNED['squeeze and excitation']} }}")
    parameters = trainable_parameters(model)
    coupled = couple(model, parameters)
    weights = {key: parameters.dense(key).detach() for key in parameters.weights()}
    scores = coupled.scores(weights)
    for group in coupled.groups.unique():
        assert scores[coupled.groups == group].mean() == pytest.approx(1.0)
    larger = coupled.scores({key: 100 * w if key == "s1" else w for key, w in weights.items()})
    assert torch.allclose(scores, larger)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.floats(0.01, 0.99),
    st.one_of(st.none(), st.floats(0, 0.9)),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_as_many_channels_are_out_as_asked_for_and_no_group_is_emptied(
    counts: list[int], sparsity: float, exchanged: float | None, multiple: int, seed: int
) -> None:
    torch.manual_seed(seed)
    groups = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    scores, past = torch.rand(len(groups), dtype=torch.float64), None
    most = sum(count - int(np.ceil(LEAST_CHANNELS * count)) for count in counts)
    if exchanged is not None:
        before = whole_channels(scores, groups, sparsity / 2)
        past = Past(~before, torch.rand(len(groups), dtype=torch.float64), exchanged)
    alive = whole_channels(scores, groups, sparsity, 1, past)
    assert int((~alive).sum()) == min(round(sparsity * len(groups)), most)
    left = groups[alive].bincount(minlength=len(counts)).tolist()
    assert all(n >= LEAST_CHANNELS * count for n, count in zip(left, counts, strict=True))
    if past is None:
        least = [n == np.ceil(LEAST_CHANNELS * c) for n, c in zip(left, counts, strict=True)]
        kept_anyway = torch.tensor(least)
        free = alive & ~kept_anyway[groups]
        assert not free.any() or alive.all() or scores[free].min() >= scores[~alive].max()
    elif past.out.any():
        back, still = past.out & alive, past.out & ~alive
        assert not (back.any() and still.any()) or past.gradients[back].min() >= past.gradients[still].max()
    rounded = whole_channels(scores, groups, sparsity, multiple, past)
    for group, (n, count) in enumerate(zip(left, counts, strict=True)):
        now = int(rounded[groups == group].sum())
        assert now == (n if multiple == 1 else min(count, max(1, round(n / multiple)) * multiple))


def test_a_multiple_of_what_is_left_may_be_asked_for(tmp_path: Path) -> None:
    masked = tuned(RESIDUAL, tmp_path, share(sparsity=0.4, multiple=4))
    assert compact(masked, Compact(), Multiples())[1] == CompactReport(12, 4, 4)
    _, report = compact(masked, Compact(), Multiples(dense=5))
    assert report == CompactReport(12, 4, 2)
    assert compact_notes(report)[1].startswith("2 more are unused and stay")
    assert compact(masked, Compact(multiple=16), Multiples())[1].gone == 0


def test_a_model_without_such_channels_stays() -> None:
    small, report = compact(RESIDUAL, Compact(), Multiples())
    assert report == CompactReport(12, 0, 0) and compact_notes(report) == [
        "0 of 12 channels removed, no weight uses them"
    ]
    assert difference(run(RESIDUAL, X), run(small, X)) == 0
