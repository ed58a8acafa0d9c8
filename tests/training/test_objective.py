"""What is matched in training: outputs, features, and what is no feature."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra `tune`")

from support.onnx_models import f32, parse
from support.sampling import npz
from support.tuning import QUICK

from edgepack.config.recipe import Data
from edgepack.config.training import Tune
from edgepack.data.samples import open_samples
from edgepack.errors import ConfigError
from edgepack.ir.inputs import input_specs
from edgepack.training.objective import Pair, choose_objective
from edgepack.training.train import TrainingRun, tune


def test_outputs_and_features_are_matched() -> None:
    body = """net (float[batch, 4] x) => (float[batch, 6] p, float[batch, 4] r) {
        h = MatMul (x, w1)
        r = Add (h, x)
        l = MatMul (r, w2)
        p = Softmax (l)
    }"""
    model = parse(body, weights={"w1": f32(np.eye(4)), "w2": f32(np.ones((4, 6)))})
    found = choose_objective(model, model, Tune())
    assert found.outputs == (Pair("l", "l", True), Pair("r", "r", False))
    assert found.features == ()
    mapped = choose_objective(model, model, Tune(feature_map={"h": "r"}))
    assert mapped.features == (Pair("h", "r"),)
    with pytest.raises(ConfigError, match="the teacher has no value 'rr', did you mean 'r'"):
        choose_objective(model, model, Tune(feature_map={"h": "rr"}))


def test_sums_of_integers_and_masks_on_scores_are_no_features(tmp_path: Path) -> None:
    """A transformer adds positions, and the lowest float where it must not look."""
    body = """net (float[4, 4] x, int64[4] ids, int64[4] shift, float[4, 4] mask) => (float[4, 4] y) {
        i = Add (ids, shift)
        e = Gather (table, i)
        r = Add (e, x)
        s = MatMul (r, w)
        m = Add (s, mask)
        p = Softmax (m)
        y = MatMul (p, w)
    }"""
    rng = np.random.default_rng(0)
    model = parse(body, weights={"table": f32(rng.normal(size=(8, 4))), "w": f32(rng.normal(size=(4, 4)))})
    assert "m" not in {p.mine for p in choose_objective(model, model, Tune()).features}
    feeds = {
        "x": f32(rng.normal(size=(4, 4, 4))),
        "ids": np.tile(np.arange(4), (4, 1)),
        "shift": np.ones((4, 4), np.int64),
        "mask": np.broadcast_to(np.triu(f32(np.full((4, 4), np.finfo(np.float32).min)), 1), (4, 4, 4)),
    }
    path = npz(tmp_path / "x.npz", **feeds)
    samples = open_samples(Data(path=str(path)), "calibration", input_specs(model), {}, base=tmp_path)
    made = tune(model, model, samples, Tune(**QUICK), TrainingRun(0))
    assert all(np.isfinite(e.loss) and e.parts["features"] < 1e-6 for e in made.log[:1])


def test_features_of_other_shapes_are_left_out_unless_they_are_asked_for(tmp_path: Path) -> None:
    body = """net (float[batch, 4] x) => (float[batch, 6] y) {
        h = MatMul (x, w1)
        y = MatMul (h, w2)
    }"""
    rng = np.random.default_rng(0)
    wide, slim = (
        parse(body, weights={"w1": f32(rng.normal(size=(4, n))), "w2": f32(rng.normal(size=(n, 6)))})
        for n in (8, 3)
    )
    path = npz(tmp_path / "x.npz", x=f32(rng.normal(size=(16, 1, 4))))
    samples = open_samples(Data(path=str(path)), "calibration", input_specs(slim), {}, base=tmp_path)
    made = tune(slim, wide, samples, Tune(**QUICK), TrainingRun(0))
    assert set(made.log[0].parts) == {"logits", "level"}
    assert set(tune(wide, wide, samples, Tune(**QUICK), TrainingRun(0)).log[0].parts) == {
        "logits",
        "level",
        "features",
    }
    with pytest.raises(ConfigError, match=r"'h' is \[1, 3\] and the teacher's 'h' \[1, 8\]"):
        tune(slim, wide, samples, Tune(**QUICK, feature_map={"h": "h"}), TrainingRun(0))
