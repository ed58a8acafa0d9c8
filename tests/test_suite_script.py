"""The script that builds a task of the suite: what it writes lies outside of the checkout."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from edgepack.config.recipe import load_recipe
from edgepack.evaluation.metrics import resolve_metric

REPO = Path(__file__).parent.parent
SCRIPT = REPO / "benchmarks" / "suite.py"


@pytest.fixture
def suite() -> ModuleType:
    spec = importlib.util.spec_from_file_location("suite", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipe_and_its_metrics_lie_outside_of_the_checkout(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "suite_metrics", raising=False)
    with suite.recipe_file(tmp_path, "fastestdet") as path:
        assert not path.is_relative_to(REPO)
        recipe = load_recipe(path, {})
        assert recipe.model == tmp_path / "fastestdet" / "model.onnx"
        assert recipe.metric is not None and ":" in recipe.metric
        resolve_metric(recipe.metric, path.parent)
        module = sys.modules.pop("suite_metrics")
        assert Path(module.__file__ or "").parent == path.parent.resolve()
    assert not path.parent.exists()


def test_a_build_sees_that_recipe_and_leaves_nothing_beside_the_script(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path for path in SCRIPT.parent.rglob("*") if "__pycache__" not in path.parts}
    seen: list[set[Path]] = []

    def call(words: list[str], **_: object) -> "Done":
        recipe = Path(words[words.index("--recipe") + 1])
        assert load_recipe(recipe, {}).model == tmp_path / "dscnn_fsdd" / "model.onnx"
        seen.append({path for path in SCRIPT.parent.rglob("*") if "__pycache__" not in path.parts})
        return Done()

    class Done:
        returncode = 1

    monkeypatch.setattr(suite.subprocess, "run", call)
    monkeypatch.setattr(sys, "argv", ["suite.py", str(tmp_path), "dscnn_fsdd", "-o", str(tmp_path / "out")])
    assert suite.main() == 1
    assert seen == [before]


def test_an_unknown_task_is_refused_by_name(suite: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no recipe for nix; known: dlrm_ml100k"):
        suite.recipe_for(tmp_path, "nix")
