"""The whole build, through its Python function."""

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.onnx_models import parse

from edgepack.benchmark.bench import ColdStart
from edgepack.config.recipe import Recipe, load_recipe
from edgepack.config.target import load_target
from edgepack.errors import ConfigError
from edgepack.ir.files import load_model, save_model
from edgepack.ir.model import LARGE_BYTES
from edgepack.pipeline.build import build
from edgepack.pipeline.job import Job, output_folder
from edgepack.results import BuildReport


def run(folder: Path, target: str = "x86-cpu", **options: Any) -> tuple[BuildReport, Path]:
    recipe = load_recipe(folder / "edgepack.yaml", {})
    return build(Job(recipe, load_target(target), folder, "edgepack build", **options))


@pytest.fixture(autouse=True)
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without cold starts, whose processes take most of a small build's time; test_bench.py has them."""
    monkeypatch.setattr("edgepack.benchmark.bench.cold_start", lambda *_: ColdStart(1.0, 1_000_000))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.project(tmp_path / "project", metric="accuracy")


def test_the_package_and_its_report(folder: Path) -> None:
    before = tiny.snapshot(folder)
    report, output = run(folder)
    assert output == folder / "dist/x86-cpu"
    names = sorted(p.name for p in output.iterdir())
    assert names == ["model.onnx", "ranges.json", "report.html", "report.json", "report.txt"]
    after = tiny.snapshot(folder)
    assert {key: after[key] for key in before} == before, "inputs changed"
    assert [stage.name for stage in report.stages] == [
        "load", "normalize", "check original", "calibrate", "round", "choose", "export", "check", "bench",
        "units",
    ]  # fmt: skip
    assert [m.name for m in report.models] == ["original", "onnx"]
    written = (output / "report.json").read_text()
    assert written == report.to_json()
    assert str(folder) not in written
    assert platform.node() not in written.replace(report.model, "")
    assert set(json.loads(written)["fingerprints"]) == {"model", "calibration", "recipe", "target"}


def test_groups_have_times_and_errors(folder: Path) -> None:
    report, _ = run(folder)
    assert {u.method for u in report.units} == {"static"}
    for group in report.units:
        assert group.sqnr_db is not None and 20 < group.sqnr_db < 80
        assert group.float_us is not None and group.float_us >= 0
        assert group.built_us is not None and group.built_us >= 0
    assert sum(u.parameters for u in report.units) == sum(w.size for w in tiny.weights().values())


def test_the_model_has_its_origin_in_its_metadata(folder: Path) -> None:
    report, output = run(folder)
    facts = load_model(output / "model.onnx").metadata_props
    assert facts["edgepack.target"] == "x86-cpu"
    assert facts["edgepack.recipe_digest"] == report.fingerprints["recipe"]
    assert facts["edgepack.target_digest"] == report.fingerprints["target"]
    assert facts["edgepack.samples_digest"] == report.fingerprints["calibration"]


def test_names_of_constants_stay_where_the_recipe_asks_for_it(tmp_path: Path) -> None:
    """Also weights with a folded BatchNormalization; ranges of either build serve the other."""
    known = set(tiny.weights())
    normed = tiny.NET.replace("r = Relu (h)", "n = BatchNormalization (h, b1, b1, b1, g) r = Relu (n)")
    weights = {**tiny.weights(), "g": np.ones(tiny.HIDDEN, np.float32)}
    ranges = None
    for keep, left in ((False, set()), (True, known)):
        folder = tiny.project(tmp_path / str(keep), keep_names=keep)
        save_model(parse(normed, weights=weights), folder / "model.onnx")
        _, output = run(folder, ranges=ranges)
        graph = load_model(output / "model.onnx").graph
        assert known & set(graph.initializers) == left
        ranges = output / "ranges.json"


def test_ranges_of_an_earlier_build_give_the_same_model(folder: Path) -> None:
    first, output = run(folder)
    kept = folder / "kept.json"
    kept.write_bytes((output / "ranges.json").read_bytes())
    model = (output / "model.onnx").read_bytes()
    second, _ = run(folder, ranges=kept)
    assert (output / "model.onnx").read_bytes() == model
    assert [(u.name, u.method, u.sqnr_db) for u in second.units] == [
        (u.name, u.method, u.sqnr_db) for u in first.units
    ]
    assert (output / "ranges.json").read_bytes() == kept.read_bytes()


def test_a_second_build_replaces_the_first_and_leaves_other_files(folder: Path) -> None:
    _, output = run(folder)
    (output / "notes.txt").write_text("mine")
    tiny.project(folder, seed=3)
    report, _ = run(folder)
    assert (output / "notes.txt").read_text() == "mine"
    assert json.loads((output / "report.json").read_text())["fingerprints"] == dict(report.fingerprints)


def test_without_evaluation_data_a_part_of_the_samples_is_held_out(tmp_path: Path) -> None:
    folder = tiny.project(tmp_path / "held", evaluation_data=None)
    report, output = run(folder)
    assert report.models[1].fidelity is not None
    assert report.models[1].fidelity.samples == 24 // 5
    assert json.loads((output / "ranges.json").read_text())["samples"] == 24 - 24 // 5
    assert any("kept for the check" in note for note in report.stages[0].notes)
    np.savez(folder / "calib.npz", x=tiny.samples(1, 1))
    with pytest.raises(ConfigError, match="holds one sample"):
        run(folder)


def test_an_override_keeps_a_group_in_float(tmp_path: Path) -> None:
    override = {"nodes": ["node_2"], "method": "float", "reason": "the last layer"}
    folder = tiny.project(tmp_path / "o", quantize={"method": "static", "overrides": [override]})
    report, _ = run(folder)
    methods = {u.name: (u.method, u.reason) for u in report.units}
    assert methods["node"][0] == "static"
    assert methods["node_2"] == ("float", "the last layer")


def test_several_formats(folder: Path) -> None:
    report, output = run(folder, target="mobile")
    assert [m.name for m in report.models] == ["original", "onnx", "ort", "tflite"]
    needed = (output / "model.required_operators.config").read_text()
    assert "QGemm" in needed or "QLinearMatMul" in needed
    assert json.loads((output / "report.json").read_text())["target"] == "mobile"


def test_the_packed_size_is_measured_and_shipped_where_the_target_asks(tmp_path: Path) -> None:
    folder = tiny.project(tmp_path / "p")
    target = load_target("x86-cpu").model_copy(update={"name": "packed", "formats": ("onnx", "epk")})
    (folder / "packed.yaml").write_text(target.model_dump_json())
    report, output = run(folder, target=str(folder / "packed.yaml"))
    assert report.models[0].packed_bytes is None
    assert report.models[1].packed_bytes == (output / "model.epk").stat().st_size


def test_the_gate_of_the_target_holds_where_the_recipe_has_none(tmp_path: Path) -> None:
    """And a limit on a metric that was not measured is no failure then."""
    folder = tiny.project(tmp_path / "g", gate=None)
    assert load_target("x86-cpu").gate.max_metric_drop is not None
    report, _ = run(folder)
    assert [line.limit for line in report.gate] == ["fidelity of what varies in dB at least"]
    assert report.passed
    asked = tiny.project(tmp_path / "a", gate={"max_metric_drop": 0.5})
    report, output = run(asked)
    assert [(line.limit, line.measured, line.passed) for line in report.gate] == [
        ("metric drop at most", None, False)
    ] + [(line.limit, line.measured, True) for line in report.gate[1:]]
    assert not report.passed
    assert (output / "model.onnx").is_file()


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    models = [run(tiny.project(tmp_path / name, preset="balanced"))[1] / "model.onnx" for name in "ab"]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_preset_best_searches_and_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path / "cache"))
    first, _ = run(tiny.project(tmp_path / "a", preset="best", quantize={}, search={"budget_s": 20}))
    rows = {row.name for row in first.sensitivity}
    assert rows and rows <= {u.name for u in first.units}
    assert all(row.us for row in first.sensitivity)
    again, _ = run(tiny.project(tmp_path / "b", preset="best", quantize={}, search={"budget_s": 20}))
    assert any("of an earlier run" in n for s in again.stages for n in s.notes)
    assert {row.name: row.sqnr_db for row in again.sensitivity}.keys() == rows


def test_progress_is_reported(folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    progress: Callable[[str, int, int], None] = lambda *step: seen.append(step)  # noqa: E731
    run(folder, progress=progress)
    assert ("calibrate", 24, 24) in seen
    assert ("check original", 12, 12) in seen
    assert {"load", "normalize", "round", "choose", "export", "bench"} <= {name for name, _, _ in seen}


def test_several_targets_need_a_place_each() -> None:
    recipe = Recipe(model=Path("m"), target=("x86-cpu", "mobile"), output="out")
    with pytest.raises(ConfigError, match=r"put \{target\} into the path"):
        output_folder(recipe, load_target("mobile"))
    one = recipe.model_copy(update={"target": ("mobile",)})
    assert output_folder(one, load_target("mobile")) == Path("out")


def test_a_large_model_takes_the_sparing_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LARGE_BYTES > 10_000
    monkeypatch.setattr("edgepack.pipeline.build.LARGE_BYTES", 1)
    report, output = run(folder)
    assert any("a large model" in note for note in report.stages[0].notes)
    assert report.stages[4].notes == ("0 weights by GPTQ, 0 biases corrected",)
    assert report.models[1].fidelity is not None
    assert (report.models[1].fidelity.sqnr_db or 0) > 20
    assert all(u.built_us is None for u in report.units)
    assert sorted(p.name for p in output.iterdir()) == [
        "model.onnx",
        "ranges.json",
        "report.html",
        "report.json",
        "report.txt",
    ]
