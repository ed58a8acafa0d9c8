"""`edgepack tune` and `tune:` among the passes of a recipe."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from support import tiny

torch = pytest.importorskip("torch", reason="needs the extra `tune`")

from support.onnx_models import f32, parse

from edgepack.ir.files import load_model, save_model
from edgepack.training.weights import array_of, keys_of


def noisy(folder: Path) -> Path:
    """The model of a project with half of its weights at zero and noise on the others."""
    rng = np.random.default_rng(3)
    worse = {
        name: f32((array + 0.2 * rng.normal(size=array.shape)) * (rng.random(array.shape) < 0.5))
        for name, array in tiny.weights().items()
    }
    path = folder / "worse.onnx"
    save_model(parse(tiny.NET, weights=worse), path)
    return path


def content(path: Path) -> dict[str, np.ndarray]:
    return {key: array_of(value) for value, key in keys_of(load_model(path)).items()}


def test_a_file_is_trained_and_only_its_weights_change(tmp_path: Path) -> None:
    folder = tiny.project(tmp_path)
    start = noisy(folder)
    before = start.read_bytes()
    made = tiny.run(
        folder, "tune", "worse.onnx", "--teacher", "model.onnx", "--data", "calib.npz", "--steps", "60",
        "--learning-rate", "0.01", "-o", "out/tuned.onnx", "--checkpoints", "run", "--json",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout)
    assert told["steps"] == 60 and told["last_loss"] < 0.9 * told["first_loss"]
    assert start.read_bytes() == before
    after = folder / "out" / "tuned.onnx"
    onnx.checker.check_model(str(after))
    assert [n.op_type for n in load_model(after).graph] == ["Gemm", "Relu", "Gemm"]
    old, new = content(start), content(after)
    assert np.array_equal(old["w1"] == 0, new["w1"] == 0) and not np.array_equal(old["w1"], new["w1"])
    assert len((folder / "run" / "log.jsonl").read_text().splitlines()) == 60


def test_it_says_what_is_missing(tmp_path: Path) -> None:
    folder = tiny.project(tmp_path)
    made = tiny.run(folder, "tune", "model.onnx", "--data", "calib.npz")
    assert made.returncode == 2 and "no teacher" in made.stderr
    made = tiny.run(folder, "tune", "model.onnx", "--teacher", "model.onnx")
    assert made.returncode == 2 and "no samples" in made.stderr
    made = tiny.run(folder, "tune", "--output", "model.onnx")
    assert made.returncode == 2 and "inputs are never changed" in made.stderr


def test_a_build_trains_after_it_prunes(tmp_path: Path) -> None:
    passes = [{"prune": {"sparsity": 0.5}}, {"tune": {"steps": 30, "learning_rate": 0.01, "held_out": 0.0}}]
    folder = tiny.project(tmp_path, passes=passes)
    made = tiny.run(folder, "build", "--json")
    assert made.returncode in (0, 1), made.stderr  # half of a tiny net at zero may well miss the gate
    report = json.loads(made.stdout)
    steps = {row["name"]: row for row in report["waterfall"]}
    assert list(steps) == ["original", "prune", "tune", "quantized"]
    assert any("30 steps" in note for note in steps["tune"]["notes"])
    assert steps["tune"]["sqnr_db"] != steps["prune"]["sqnr_db"]


def test_a_build_trains_what_it_clustered_and_the_few_values_stay_few(tmp_path: Path) -> None:
    tuning = {"steps": 100, "batch": 20, "held_out": 0.0, "labels": 1e-3, "threads": 1}
    passes = [{"prune": {"sparsity": 0.4}}, {"tune": tuning}, {"cluster": {"bits": 3}}, {"tune": tuning}]
    distillation = {"path": "training.npz", "labels": {"array": "label"}}
    folder = tiny.project(tmp_path, passes=passes, training_data=distillation)
    np.savez(tmp_path / "training.npz", x=tiny.samples(400, 7), label=np.arange(400) % tiny.CLASSES)
    made = tiny.run(folder, "build", "--json")
    assert made.returncode in (0, 1), made.stderr
    steps = {row["name"]: row for row in json.loads(made.stdout)["waterfall"]}
    assert list(steps) == ["original", "prune", "tune", "cluster", "tune 2", "quantized"]
    assert steps["tune 2"]["sqnr_db"] > steps["cluster"]["sqnr_db"]
    assert steps["quantized"]["sqnr_db"] > steps["tune 2"]["sqnr_db"] - 1  # weights are not rounded again
    stored = [a for a in content(folder / "dist/x86-cpu/model.onnx").values() if a.dtype == np.int8]
    weights = [a for a in stored if a.ndim == 2]
    assert len(weights) == 2 and all(len(np.unique(a)) <= 8 for a in weights)
    assert sum((a == 0).sum() for a in weights) >= 0.4 * sum(a.size for a in weights)


def test_channels_that_training_takes_out_leave_with_the_next_pass(tmp_path: Path) -> None:
    """As many stay as the target's kernels like: 16 of 24, where 40 % would leave 14."""
    share = {"pattern": "channels", "sparsity": 0.4, "every": 2}
    tuning = {"steps": 20, "held_out": 0.0, "sparsify": share}
    folder = tiny.project(tmp_path, passes=[{"tune": tuning}, "compact"])
    made = tiny.run(folder, "build", "--json")
    assert made.returncode in (0, 1), made.stderr
    steps = {row["name"]: row for row in json.loads(made.stdout)["waterfall"]}
    assert list(steps) == ["original", "tune", "compact", "quantized"]
    assert steps["compact"]["notes"] == ["8 of 24 channels removed, no weight uses them"]
    assert steps["compact"]["raw_bytes"] < 0.9 * steps["tune"]["raw_bytes"]
    assert steps["compact"]["sqnr_db"] == pytest.approx(steps["tune"]["sqnr_db"], abs=0.01)


def test_what_judges_is_not_trained_on(tmp_path: Path) -> None:
    folder = tiny.project(tmp_path, passes=["tune"], training_data="training.npz")
    np.savez(folder / "training.npz", x=tiny.samples(12, 2))
    made = tiny.run(folder, "build")
    assert made.returncode == 3 and "12 evaluation samples are also training samples" in made.stderr
