"""The passes of a recipe: syntax, allowed order, and their lines in the report."""

import json
from pathlib import Path
from typing import get_args

import pytest
from support import tiny

from edgepack.benchmark.bench import ColdStart
from edgepack.compression.table import PASSES
from edgepack.config.passes import Pass, step_names
from edgepack.config.recipe import Recipe, load_recipe
from edgepack.config.strict_yaml import parse
from edgepack.config.target import load_target
from edgepack.config.training import Tune
from edgepack.errors import ConfigError
from edgepack.pipeline.build import build
from edgepack.pipeline.job import Job
from edgepack.report.stage_breakdown import stage_breakdown_lines
from edgepack.report.text import text
from edgepack.results import BuildReport, Step


@pytest.fixture(autouse=True)
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgepack.benchmark.bench.cold_start", lambda *_: ColdStart(1.0, 1_000_000))


def run(folder: Path, target: str = "x86-cpu") -> tuple[BuildReport, Path]:
    recipe = load_recipe(folder / "edgepack.yaml", {})
    return build(Job(recipe, load_target(target), folder, "edgepack build"))


def recipe_of(*passes: object) -> Recipe:
    return parse(Recipe, {"model": "m.onnx", "passes": list(passes)}, "recipe")


def test_an_entry_is_a_word_or_a_key_with_settings() -> None:
    entries: tuple[object, ...] = ("prune", {"prune": None}, {"prune": {}})
    for written in entries:
        (entry,) = recipe_of(written).passes
        assert entry == Pass.model_validate({"prune": {}})
        assert entry.name == "prune"
    (entry,) = recipe_of({"prune": {"sparsity": 0.6}}).passes
    assert entry.settings.model_dump()["sparsity"] == 0.6


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (["prnue"], "unknown key 'passes.0.prnue', did you mean 'prune'"),
        ([{"prune": {"sparsty": 0.5}}], "unknown key 'passes.0.prune.sparsty', did you mean 'sparsity'"),
        ([{}], "an entry has one key, the name of a pass: "),
        (["prune", "prune"], "prune is listed twice"),
        (["cluster", "prune"], "prune after cluster: .*; put prune first"),
        ([{"cluster": {"bits": 8}}], "passes.0.cluster.bits: should be less than or equal to 7"),
    ],
)
def test_what_is_refused(passes: list[object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_of(*passes)


def test_training_may_stand_more_than_once() -> None:
    passes = recipe_of("prune", "tune", "cluster", "tune").passes
    assert step_names(passes) == ["prune", "tune", "cluster", "tune 2"]


def test_the_stage_breakdown_of_a_build(tmp_path: Path) -> None:
    passes = [{"prune": {"sparsity": 0.5}}]
    report, output = run(tiny.project(tmp_path / "p", metric="accuracy", passes=passes))
    assert [step.name for step in report.waterfall] == ["original", "prune", "quantized"]
    original, pruned, quantized = report.waterfall
    assert original.packed_bytes is not None and original.sqnr_db is None and original.speedup == 1
    assert pruned.packed_bytes is not None and pruned.packed_bytes < original.packed_bytes
    assert pruned.sqnr_db is not None and pruned.sqnr_db > 3
    assert quantized.raw_bytes == (output / "model.onnx").stat().st_size
    assert all(s.metric is not None and s.latency_ms_p50 > 0 for s in report.waterfall)
    assert "zero" in pruned.notes[0]
    assert [s["name"] for s in json.loads(report.to_json())["waterfall"]] == [
        "original",
        "prune",
        "quantized",
    ]
    assert "resident" in text(report)


def test_without_passes_there_is_no_stage_breakdown_to_read(tmp_path: Path) -> None:
    report, _ = run(tiny.project(tmp_path / "p"))
    assert [step.name for step in report.waterfall] == ["original", "quantized"]
    assert "resident" not in text(report)


def test_lines_leave_out_what_nobody_measured() -> None:
    steps = [
        Step(n, 2000, None, 1000, 1.0, 1.0, 20.0, None, None) for n in ("original", "prune", "quantized")
    ]
    lines = stage_breakdown_lines(steps)
    assert "metric" not in lines[1] and "agreement" not in lines[1] and "fidelity" in lines[1]
    assert len(lines) == 5


def test_every_pass_of_a_recipe_is_in_the_table() -> None:
    """Except `tune`, which the pipeline runs itself."""
    kinds = [get_args(field.annotation)[0] for field in Pass.model_fields.values()]
    assert set(kinds) - {Tune} == set(PASSES)
