"""The models of a package in several formats: parity, refusals, sizes, files of an earlier build."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support import tiny
from support.onnx_models import parse

from edgepack.benchmark.bench import ColdStart
from edgepack.config.recipe import load_recipe
from edgepack.config.target import Target, load_target
from edgepack.data.feeds import open_dims, with_sizes
from edgepack.errors import ConfigError, EdgepackError, ExportError, SamplesError
from edgepack.export.artifacts import outdated
from edgepack.export.tflite_artifact import fixed_sizes
from edgepack.ir.files import save_model
from edgepack.ir.inputs import InputSpec
from edgepack.pipeline.build import build
from edgepack.pipeline.job import Job
from edgepack.report.text import text
from edgepack.results import BuildReport
from edgepack.runtime import litert
from edgepack.runtime.litert import open_tflite

FLOAT = np.dtype(np.float32)
UNWRITABLE = """net (float[batch, 16] x) => (float[batch, 16] y) {
    h = Gemm <transB = 1> (x, w)
    one = Constant <value_int = 1> ()
    y = CumSum (h, one)
}"""
ANY_LENGTH = """net (float[batch, 16, length] x) => (float[batch, 4, M] y) {
    c = Conv (x, w)
    y = Relu (c)
}"""


@pytest.fixture(autouse=True)
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without cold starts, which are slow; tests/benchmark/test_bench.py has them."""
    monkeypatch.setattr("edgepack.benchmark.bench.cold_start", lambda *_: ColdStart(1.0, 1_000_000))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.project(tmp_path / "project", metric="accuracy")


def run(folder: Path, **target: Any) -> tuple[BuildReport, Path]:
    recipe = load_recipe(folder / "edgepack.yaml", {})
    mobile = load_target("mobile")
    content = {**mobile.model_dump(), **target}
    return build(Job(recipe, Target.model_validate(content), folder, "edgepack build"))


def replace_model(folder: Path, body: str, **weights: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in weights.items()}
    save_model(parse(body, weights=arrays), folder / "model.onnx")


def in_recipe(folder: Path, **keys: Any) -> None:
    path = folder / "edgepack.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **keys}))


def test_all_files_are_checked_against_the_original_and_each_other(folder: Path) -> None:
    report, output = run(folder)
    assert [m.name for m in report.models] == ["original", "onnx", "ort", "tflite"]
    assert [(p.name, p.against) for p in report.parity] == [
        ("ort", "onnx"), ("tflite", "onnx"), ("tflite", "ort")
    ]  # fmt: skip
    same, close, _ = report.parity
    assert (same.sqnr_db, same.agreement) == (None, 1.0)
    assert close.sqnr_db is not None and close.sqnr_db > 25
    for model in report.models[1:]:
        assert model.fidelity is not None and model.fidelity.metric is not None
        assert model.fidelity.sqnr_db is not None and model.fidelity.sqnr_db > 20
    page = (output / "report.txt").read_text()
    start = page.index("parity")
    assert page[start:].splitlines()[0].split() == [
        "parity", "against", "original", "against", "onnx", "against", "ort", "accuracy"
    ]  # fmt: skip
    assert "equal, 1.0000" in page[start:].splitlines()[2]
    assert f"{close.sqnr_db:.1f} dB" in page[start:].splitlines()[3]
    assert report.refused == ()


def test_what_the_runtime_does_with_the_tflite_is_reported(folder: Path) -> None:
    report, output = run(folder)
    tflite = report.runtime["tflite"]
    assert tflite["xnnpack"]["partitions"] == 1
    assert tflite["xnnpack"]["delegated"] == tflite["xnnpack"]["operators"]
    assert tflite["inputs"] == [{"name": "x", "type": "float32", "shape": [1, 16], "axes": [0, 1]}]
    page = text(report)
    assert "XNNPACK runs all" in page and "in 1 partition" in page
    assert "input x: float32 [1, 16]" in page
    assert str(report.environment["litert"]) in page
    assert json.loads((output / "report.json").read_text())["runtime"]["tflite"] == tflite


def test_the_recipe_may_ask_for_int8_inputs_and_outputs(folder: Path) -> None:
    in_recipe(folder, tflite={"io": "int8"})
    report, output = run(folder)
    runner = open_tflite(output / "model.tflite", 1)
    assert [port.dtype for port in (*runner.entries, *runner.results)] == [np.int8, np.int8]
    assert report.runtime["tflite"]["inputs"][0]["scale"] > 0
    assert "x: int8 [1, 16], (q - " in text(report)
    fidelity = report.models[-1].fidelity
    assert fidelity is not None and fidelity.sqnr_db is not None and fidelity.sqnr_db > 20


def test_an_unsupported_optional_format_is_reported_and_the_rest_is_built(folder: Path) -> None:
    replace_model(folder, UNWRITABLE, w=(16, 16))
    in_recipe(folder, metric=None)
    report, output = run(folder)
    assert [m.name for m in report.models] == ["original", "onnx", "ort"]
    assert [(r.format, r.file) for r in report.refused] == [("tflite", "model.tflite")]
    assert "CumSum" in report.refused[0].reason
    assert text(report).splitlines()[1].startswith("NOT BUILT  model.tflite: ")
    assert json.loads((output / "report.json").read_text())["refused"][0]["file"] == "model.tflite"
    assert not (output / "model.tflite").exists()
    assert report.passed
    assert str(output) not in report.refused[0].reason and ".edgepack-" not in report.refused[0].reason


def test_a_format_that_is_not_optional_ends_the_build(folder: Path) -> None:
    replace_model(folder, UNWRITABLE, w=(16, 16))
    in_recipe(folder, metric=None)
    with pytest.raises(ExportError, match="CumSum"):
        run(folder, optional=())
    assert not (folder / "dist/mobile").exists()


def test_without_a_runtime_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litert, "find_spec", lambda name: None)
    report, _ = run(folder)
    assert "pip install" in report.refused[0].reason
    stages: list[str] = []
    progress: Callable[[str, int, int], None] = lambda name, *_: stages.append(name)  # noqa: E731
    target = load_target("mobile").model_copy(update={"optional": ()})
    recipe = load_recipe(folder / "edgepack.yaml", {})
    with pytest.raises(ConfigError, match="pip install"):
        build(Job(recipe, target, folder, "edgepack build", progress=progress))
    assert stages == [], "checked before any stage"


def test_files_of_an_earlier_build_do_not_stay_beside_the_new_ones(folder: Path) -> None:
    _, output = run(folder)
    (output / "notes.txt").write_text("mine")
    assert (output / "model.tflite").exists()
    run(folder, formats=("onnx",), optional=())
    assert sorted(p.name for p in output.iterdir()) == [
        "model.onnx", "notes.txt", "ranges.json", "report.html", "report.json", "report.txt"
    ]  # fmt: skip


@pytest.mark.parametrize("content", ["no json", "[]", '{"models": 3}', '{"models": [{"file": "a"}, {}]}'])
def test_an_unknown_report_names_no_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    assert outdated(tmp_path, tmp_path / "package") == []


def test_a_packed_model_of_an_earlier_build_is_removed_but_not_one_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    for packed_file, old in (("model.epk", ["model.epk", "model.onnx"]), (None, ["model.onnx"])):
        line = {"file": "model.onnx", "packed_file": packed_file}
        (tmp_path / "report.json").write_text(json.dumps({"models": [{"file": "net.onnx"}, line]}))
        assert [path.name for path in outdated(tmp_path, tmp_path / "package")] == old


def varying(folder: Path, *, evaluation: tuple[int, ...]) -> Path:
    """A project whose samples have these lengths; calibration samples have 6."""
    tiny.project(folder, metric=None)
    replace_model(folder, ANY_LENGTH, w=(4, 16, 3))
    for part, lengths in (("calib", (6, 6, 6)), ("eval", evaluation)):
        (folder / part).mkdir()
        for i, length in enumerate(lengths):
            content = np.random.default_rng([i, len(part)]).normal(size=(1, 16, length))
            np.save(folder / part / f"{i}.npy", content.astype(np.float32))
    in_recipe(folder, calibration_data={"path": "calib"}, evaluation_data={"path": "eval"})
    return folder


def test_a_size_that_all_samples_have_is_that_of_the_tflite(tmp_path: Path) -> None:
    folder = varying(tmp_path, evaluation=(6, 6))
    report, output = run(folder)
    assert report.refused == ()
    assert open_tflite(output / "model.tflite", 1).inputs[0].shape == (1, 16, 6)


def test_samples_of_several_sizes_need_a_given_size(tmp_path: Path) -> None:
    folder = varying(tmp_path, evaluation=(6, 9))
    report, _ = run(folder)
    assert "axis 2 has sizes from 6 to 9" in report.refused[0].reason
    assert "dims: {'length': SIZE}" in report.refused[0].reason
    in_recipe(folder, tflite={"dims": {"length": 6}})
    with pytest.raises(SamplesError, match="axis 2 must be 6, it is 9"):
        run(folder)
    in_recipe(folder, tflite={"dims": {"lenght": 6}})
    with pytest.raises(ConfigError, match="no open dimension 'lenght', did you mean 'length'"):
        run(folder)


def test_sizes_by_name_by_place_and_by_samples() -> None:
    spec = InputSpec("x", FLOAT, ("batch", 3, None, "width"))
    assert open_dims([spec]) == ["batch", "width", "x[0]", "x[2]", "x[3]"]
    assert with_sizes([spec], {"width": 8, "x[2]": 4})[0].shape == ("batch", 3, 4, 8)
    assert with_sizes([InputSpec("x", FLOAT, None)], {"width": 8})[0].shape is None
    shapes = {"x": frozenset({(1, 3, 4, 8), (1, 3, 4, 9)})}
    assert fixed_sizes([spec], {"width": 8}, shapes) == {"width": 8, "x[0]": 1, "x[2]": 4}
    with pytest.raises(ExportError, match=r"'x': axis 3 has sizes from 8 to 9"):
        fixed_sizes([spec], {}, shapes)


def test_a_contradictory_target_is_refused() -> None:
    content = load_target("mobile").model_dump()
    for changes in ({"optional": ("onnx",)}, {"formats": ("onnx",)}, {"tflite": None}):
        with pytest.raises(ValueError, match=r"optional:|formats:"):
            Target.model_validate({**content, **changes})


def test_a_tflite_of_another_model_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its outputs are compared before it becomes an artifact."""
    from edgepack.runtime.litert import LitertRunner

    def upside_down(self: LitertRunner, feeds: Any) -> Any:
        return {name: -array for name, array in real(self, feeds).items()}

    real = LitertRunner.run
    monkeypatch.setattr(LitertRunner, "run", upside_down)
    report, _ = run(folder)
    assert "-6.0 dB against those of model.onnx" in report.refused[0].reason
    with pytest.raises(EdgepackError, match=r"-6\.0 dB"):
        run(folder, optional=())
