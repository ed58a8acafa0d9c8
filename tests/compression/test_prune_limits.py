"""Pruning until something is reached: a budget of bytes, the gate, rates by what was measured."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.onnx_models import f32, parse
from support.pruning import data, pruned
from support.quantizing import weight

from edgepack.benchmark.bench import ColdStart
from edgepack.compression.sensitivity import noise, noise_alone, outputs_of
from edgepack.config.passes import Prune
from edgepack.config.recipe import load_recipe
from edgepack.config.target import Gate, load_target
from edgepack.errors import ConfigError
from edgepack.evaluation.gate import leaves_room
from edgepack.ir.files import save_model
from edgepack.pipeline.build import build
from edgepack.pipeline.job import Job
from edgepack.results import BuildReport, Fidelity

WIDE = """net (float[batch, 64] x) => (float[batch, 8] y) {
    h = Gemm <transB = 1> (x, w1, b1)
    r = Relu (h)
    y = Gemm <transB = 1> (r, w2, b2)
}"""
WEIGHTS = {
    "w1": weight(256, 64), "b1": weight(256, seed=1), "w2": weight(8, 256, seed=2), "b2": weight(8, seed=3),
}  # fmt: skip


@pytest.fixture(autouse=True)
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgepack.benchmark.bench.cold_start", lambda *_: ColdStart(1.0, 1_000_000))


def built(folder: Path, passes: list[Any], gate: dict[str, float] | None = None) -> BuildReport:
    folder.mkdir()
    save_model(parse(WIDE, weights=WEIGHTS), folder / "model.onnx")
    rng = np.random.default_rng(0)
    np.savez(folder / "x.npz", x=f32(rng.normal(size=(300, 1, 64))))
    recipe = {
        "model": "model.onnx", "target": "x86-cpu", "output": "dist", "calibration_data": "x.npz",
        "quantize": {"method": "static"}, "passes": passes, "bench": {"warmup": 0, "runs": 3},
        "gate": gate or {"min_sqnr_db": 1},
    }  # fmt: skip
    (folder / "edgepack.yaml").write_text(yaml.safe_dump(recipe))
    job = Job(load_recipe(folder / "edgepack.yaml", {}), load_target("x86-cpu"), folder, "edgepack build")
    return build(job)[0]


@pytest.mark.parametrize("cluster", [[], [{"cluster": {"bits": 4}}]])
def test_a_budget_is_kept_and_used(cluster: list[Any], tmp_path: Path) -> None:
    budget = 9_000
    report = built(tmp_path / "p", [{"prune": {"max_bytes": budget}}, *cluster])
    packed = report.models[1].packed_bytes
    assert packed is not None and 0.85 * budget < packed < 1.05 * budget


def test_a_budget_out_of_reach_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_bytes: with 99% zeros the packed int8 model takes"):
        built(tmp_path / "p", [{"prune": {"max_bytes": 100}}])


def test_the_gate_ends_pruning_with_room_for_what_follows(tmp_path: Path) -> None:
    report = built(tmp_path / "p", [{"prune": {"within_gate": True}}], {"min_sqnr_db": 12})
    original, after, quantized = report.waterfall
    assert after.sqnr_db is not None and 15 <= after.sqnr_db < 19
    assert quantized.sqnr_db is not None and quantized.sqnr_db > 12
    assert report.passed
    assert float(after.notes[0].split("%")[0]) > 10
    report = built(
        tmp_path / "q", [{"prune": {"within_gate": True, "max_bytes": 16_000}}], {"min_sqnr_db": 3}
    )
    assert report.models[1].packed_bytes is not None and report.models[1].packed_bytes > 13_000
    assert original.sqnr_db is None


def test_half_of_what_the_gate_allows() -> None:
    original = Fidelity(10, None, 1.0, 0.9, "top1")

    def found(sqnr_db: float = 20.0, agreement: float = 0.97, metric: float = 0.9) -> Fidelity:
        return Fidelity(10, sqnr_db, agreement, metric, "top1")

    assert leaves_room(Gate(max_metric_drop=0.01), original, found(metric=0.896))
    assert not leaves_room(Gate(max_metric_drop=0.01), original, found(metric=0.894))
    assert leaves_room(Gate(min_sqnr_db=17), original, found())
    assert not leaves_room(Gate(min_sqnr_db=18), original, found())
    assert not leaves_room(Gate(min_agreement=0.95), original, found())
    assert leaves_room(Gate(min_agreement=0.9), original, found())
    assert leaves_room(Gate(), original, found(0.0, 0.0, 0.0))


def test_measured_rates_do_no_worse(tmp_path: Path) -> None:
    samples = data(tmp_path)
    lost = {}
    for scope in ("global", "measured"):
        model, sparse, rows = pruned(tmp_path, scope=scope, sparsity=0.6)
        lost[scope] = noise(outputs_of(model, samples, 1), outputs_of(sparse, samples, 1))
        assert abs(sum(r.zeros for r in rows) / sum(r.values for r in rows) - 0.6) < 0.03
    assert lost["measured"] <= lost["global"] * (1 + 1e-6)


def test_noise_of_one_group_alone_is_its_own(tmp_path: Path) -> None:
    samples = data(tmp_path)
    model, sparse, rows = pruned(tmp_path, scope="layer", sparsity=0.6)
    reference = outputs_of(model, samples, 1)
    alone = noise_alone(model, sparse, [r.group for r in rows], reference, samples, 1)
    assert set(alone) == {r.group for r in rows} and min(alone.values()) > 0
    assert max(alone.values()) < 2 * noise(reference, outputs_of(sparse, samples, 1))
    assert noise(reference, reference) == 0


@pytest.mark.parametrize("wrong", [{"scope": "layer"}, {"pattern": "2:4"}])
def test_a_search_needs_rates(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="search for rates by layer"):
        Prune.model_validate({"max_bytes": 1000, **wrong})
