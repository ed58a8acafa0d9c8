"""The gate of a pool: references and samples of its models, and the result of a miss."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import yaml
from support import tiny
from support.onnx_models import difference, parse, run

from edgepack.errors import ConfigError, ModelError
from edgepack.ir.files import load_model, save_model
from edgepack.ir.fingerprint import fingerprint
from edgepack.pack.pool import Pool
from edgepack.pipeline.packing import facts, pack_models, text
from edgepack.pipeline.pool_gate import Request

RNG = np.random.default_rng(5)
FIRST = RNG.normal(size=(16, 256)).astype(np.float32)
HEAD = RNG.normal(size=(256, 4)).astype(np.float32)
X = RNG.normal(size=(200, 16)).astype(np.float32)
LABELS = (np.maximum(X @ FIRST, 0) @ HEAD).argmax(1)

Weight = npt.NDArray[np.float32]


def shaken(weight: Weight, relative: float, seed: int = 1) -> Weight:
    """The weight with noise of this relative norm."""
    noise = np.random.default_rng(seed).normal(size=weight.shape)
    return np.asarray(weight + noise * relative * np.linalg.norm(weight) / np.linalg.norm(noise), np.float32)


def write(path: Path, first: Weight = FIRST, head: Weight = HEAD) -> Path:
    body = "net (float[n, 16] x) => (float[n, 4] y) { h = MatMul (x, a) r = Relu (h) y = MatMul (r, b) }"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(parse(body, weights={"a": first, "b": head}), path)
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A recipe with labels, its model, and the packages of two builds."""
    write(tmp_path / "float.onnx")
    np.savez(tmp_path / "x.npz", x=X, label=LABELS)
    recipe = {
        "model": "float.onnx", "target": "x86-cpu", "metric": "top1",
        "evaluation_data": {"path": "x.npz", "labels": {"array": "label"}},
        "gate": {"max_metric_drop": 0.04, "max_bytes": 10},
    }  # fmt: skip
    (tmp_path / "edgepack.yaml").write_text(yaml.safe_dump(recipe))
    made_of = fingerprint(load_model(tmp_path / "float.onnx"))
    for target, first in (("arm-cpu", shaken(FIRST, 0.02)), ("x86-cpu", shaken(FIRST, 0.03, seed=2))):
        folder = write(tmp_path / "dist" / target / "model.onnx", first).parent
        report = {"target": target, "fingerprints": {"model": made_of}}
        (folder / "report.json").write_text(json.dumps(report))
    return tmp_path


def builds(project: Path) -> list[Path]:
    return [project / "dist" / target / "model.onnx" for target in ("arm-cpu", "x86-cpu")]


def pooled(models: list[Path], output: Path, within: float, request: Request) -> Pool:
    made = pack_models(models, output, within, request)
    assert isinstance(made, Pool)
    return made


def test_builds_are_held_to_the_gate_of_their_recipe(project: Path) -> None:
    request = Request(recipes=(project / "edgepack.yaml",))
    pool = pooled(builds(project), project / "pool", 0.1, request)
    assert pool.passed and (project / "pool" / "weights.bin").is_file()
    verdicts = [model.verdict for model in pool.models]
    for verdict in verdicts:
        assert verdict is not None and verdict.pooled.samples == 200
        assert [line.limit for line in verdict.gate] == ["metric drop at most"]
        assert verdict.original.metric == 1.0 and verdict.pooled.metric is not None
        assert verdict.gate[0].measured == pytest.approx(1.0 - verdict.pooled.metric)
    assert verdicts[0] is not None and verdicts[0].moved_db is None
    assert verdicts[1] is not None and verdicts[1].moved_db is not None
    assert verdicts[1].before.sqnr_db == pytest.approx(32, abs=2)
    assert "top1 1.0000" in text(pool) and "in the pool" in text(pool)


def test_one_that_misses_the_gate_keeps_its_own_weights(project: Path) -> None:
    content = yaml.safe_load((project / "edgepack.yaml").read_text())
    (project / "strict.yaml").write_text(yaml.safe_dump(content | {"gate": {"min_sqnr_db": 40}}))
    models = [builds(project)[0], project / "float.onnx"]
    request = Request((project / "edgepack.yaml", project / "strict.yaml"))
    pool = pooled(models, project / "pool", 0.1, request)
    first, second = pool.models
    assert pool.passed and not first.note
    assert "fidelity in dB at least 40, 36" in second.note and "keeps its own" in text(pool)
    assert difference(run(project / "float.onnx", {"x": X}), run(pool.folder / second.file, {"x": X})) == 0


def test_a_pool_that_misses_the_gate_is_not_written(project: Path) -> None:
    write(project / "dist" / "arm-cpu" / "model.onnx", shaken(FIRST, 1.0))
    before = sorted(project.rglob("*"))
    done = tiny.run(project, "pack", "dist/arm-cpu/model.onnx", "dist/x86-cpu/model.onnx", "-o", "pool")
    assert done.returncode == 1 and "no pool is written" in done.stderr
    assert "FAIL" in done.stdout and "(not written)" in done.stdout and "ok" in done.stdout
    assert sorted(project.rglob("*")) == before


def test_the_recipe_at_hand_is_for_what_was_built_with_it(project: Path) -> None:
    request = Request(default_recipe=project / "edgepack.yaml")
    assert all(m.verdict is not None for m in pooled(builds(project), project / "one", 0.0, request).models)
    (project / "dist" / "arm-cpu" / "report.json").unlink()
    stranger, own = pooled(builds(project), project / "two", 0.0, request).models
    assert stranger.verdict is None and own.verdict is not None


def test_the_folder_of_a_package_stands_for_its_model(project: Path) -> None:
    folders = [path.parent for path in builds(project)]
    pool = pooled(folders, project / "pool", 0.0, Request(default_recipe=project / "edgepack.yaml"))
    assert [model.file for model in pool.models] == ["arm-cpu-model.onnx", "x86-cpu-model.onnx"]
    assert all(model.verdict is not None for model in pool.models)
    with pytest.raises(ModelError, match=r"a folder without model\.onnx"):
        pack_models([project], project / "other.epk")


def test_a_recipe_for_each_model(project: Path) -> None:
    write(project / "sibling.onnx", head=-HEAD)
    content = yaml.safe_load((project / "edgepack.yaml").read_text())
    content |= {"model": "sibling.onnx", "metric": None, "gate": {"min_agreement": 0.9}}
    (project / "sibling.yaml").write_text(yaml.safe_dump(content))
    models = [project / "float.onnx", project / "sibling.onnx"]
    recipes = (project / "edgepack.yaml", project / "sibling.yaml")
    pool = pooled(models, project / "pool", 0.0, Request(recipes))
    assert pool.passed
    limits = [[line.limit for line in m.verdict.gate] for m in pool.models if m.verdict]
    assert limits == [["metric drop at most"], ["agreement at least"]]
    with pytest.raises(ConfigError, match="3 recipes for 2 models"):
        pack_models(models, project / "more", 0.0, Request((*recipes, recipes[0])))


def test_samples_alone_compare_a_model_with_itself(tmp_path: Path) -> None:
    models = [write(tmp_path / "one.onnx"), write(tmp_path / "two.onnx", shaken(FIRST, 0.01))]
    np.savez(tmp_path / "x.npz", x=X)
    pool = pooled(models, tmp_path / "pool", 0.1, Request(data=str(tmp_path / "x.npz")))
    one, two = (model.verdict for model in pool.models)
    assert one is not None and two is not None and pool.passed
    assert one.moved_db is None and one.pooled.samples == 200
    assert [(line.limit, line.bound) for line in two.gate] == [("fidelity in dB at least", 30.0)]
    assert two.gate[0].measured == two.moved_db == two.pooled.sqnr_db
    json.dumps(facts(pool), allow_nan=False)
    with pytest.raises(ConfigError, match="no labels for"):
        pack_models(models, tmp_path / "other", 0.0, Request(metric="top1"))


def test_the_models_of_a_pool_have_their_weights_in_one_file(project: Path) -> None:
    pool = pooled(builds(project), project / "pool", 0.1, Request(recipes=(project / "edgepack.yaml",)))
    for model in pool.models:
        held = load_model(pool.folder / model.file).graph.initializers.values()
        assert all(isinstance(value.const_value, ir.ExternalTensor) for value in held)
