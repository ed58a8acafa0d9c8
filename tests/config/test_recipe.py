"""Recipes: strict, typed, with resolved paths; the command line overrides the file."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from edgepack.config.recipe import Data, Override, Recipe, load_recipe
from edgepack.config.strict_yaml import parse, read_yaml
from edgepack.errors import ConfigError


def write(folder: Path, **content: Any) -> Path:
    path = folder / "edgepack.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_defaults() -> None:
    recipe = load_recipe(None, {"model": "m.onnx"})
    assert recipe == Recipe(model=Path("m.onnx"))
    assert recipe.target == ()
    assert recipe.quantize.method == "auto"
    assert recipe.keep_names is False


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        model="net.onnx",
        output="out/{target}",
        calibration_data={"path": "calib", "labels": {"file": "labels.tsv"}},
        evaluation_data="eval.npz",
    )
    recipe = load_recipe(path, {})
    assert recipe.model == tmp_path / "net.onnx"
    assert recipe.output == str(tmp_path / "out/{target}")
    assert recipe.calibration_data is not None and recipe.calibration_data.labels is not None
    assert recipe.calibration_data.path == str(tmp_path / "calib")
    assert recipe.calibration_data.labels.file == tmp_path / "labels.tsv"
    assert recipe.evaluation_data == Data(path=str(tmp_path / "eval.npz"))


def test_absolute_paths_and_functions_stay(tmp_path: Path) -> None:
    path = write(tmp_path, model="/models/net.onnx", calibration_data="feeds:draw")
    recipe = load_recipe(path, {})
    assert recipe.model == Path("/models/net.onnx")
    assert recipe.calibration_data == Data(path="feeds:draw")


def test_one_target_may_be_a_word(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, model="m", target="mobile"), {}).target == ("mobile",)
    assert load_recipe(write(tmp_path, model="m", target=["a", "b"]), {}).target == ("a", "b")


def test_the_command_line_wins_over_the_file_key_by_key(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        model="net.onnx",
        calibration_data="calib.npz",
        calibration={"observer": "minmax", "bins": 512},
        quantize={"method": "static", "optimize_for": "size"},
    )
    changes = {
        "model": None,
        "target": ["mobile"],
        "calibration_data": {"samples": 8},
        "calibration": {"observer": "entropy"},
        "quantize": {"method": None},
    }
    recipe = load_recipe(path, changes)
    assert recipe.calibration_data == Data(path=str(tmp_path / "calib.npz"), samples=8)
    assert (recipe.calibration.observer, recipe.calibration.bins) == ("entropy", 512)
    assert (recipe.quantize.method, recipe.quantize.optimize_for) == ("static", "size")
    assert recipe.target == ("mobile",)


def test_no_model() -> None:
    with pytest.raises(ConfigError, match="no model: name one"):
        load_recipe(None, {"model": None})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"modle": "x"}, "unknown key 'modle', did you mean 'model'?"),
        ({"zzz": 1}, "unknown key 'zzz', known: bench, "),
        ({"bench": {"runs": 2}}, "bench.runs: should be greater than or equal to 3 (given: 2)"),
        ({"calibration": {"percentile": 101}}, "calibration.percentile: should be less than or equal to 100"),
        ({"calibration": []}, "calibration: should be a mapping of keys (given: [])"),
        ({"images": {"x": {"mean": "dark"}}}, "images.x.mean: should be a valid number"),
        ({"calibration_data": {"samples": 3}}, "the key 'calibration_data.path' is missing"),
        (
            {"calibration_data": {"path": "a", "labels": {}}},
            "calibration_data.labels: give exactly one of array, filename, file",
        ),
        ({"quantize": {"overrides": [{"nodes": ["a"]}]}}, "quantize.overrides.0"),
        ({"quantize": {"optimize_for": "sizes"}}, "there is no 'sizes', did you mean 'size'?"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_invalid_content_is_refused(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, **{"model": "m.onnx", **content})
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, {})
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Input should" not in str(caught.value)


def test_files_that_are_not_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for text, message in [
        ("", "holds NoneType"),
        ("- a\n", "holds list"),
        ("a: [1\n", "not valid YAML"),
        ("a: 1\nb: 2\na: 3\n", "the key 'a' is given twice"),
        ("x: {a: 1, a: 2}\n", "the key 'a' is given twice"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_yaml(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "missing.yaml")


def test_recipes_are_frozen() -> None:
    recipe = load_recipe(None, {"model": "m.onnx"})
    with pytest.raises(ValidationError):
        recipe.model = Path("other")


def test_a_recipe_survives_json() -> None:
    recipe = load_recipe(
        None,
        {
            "model": "m.onnx",
            "quantize": {"overrides": [{"op_types": ["Conv"], "method": "float"}]},
            "images": {"x": {"mean": [1.0, 2.0, 3.0], "std": 2.0}},
        },
    )
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert recipe.quantize.overrides == (Override(op_types=("Conv",), method="float"),)


@given(st.dictionaries(st.text(max_size=8), st.none() | st.integers() | st.text(max_size=4), max_size=4))
def test_any_other_key_is_named(content: dict[str, Any]) -> None:
    known = set(Recipe.model_fields)
    unknown = [key for key in content if key not in known]
    values = {key: value for key, value in content.items() if key not in known}
    if not unknown:
        assert parse(Recipe, {"model": "m"}, "here").model == Path("m")
        return
    with pytest.raises(ConfigError) as caught:
        parse(Recipe, {"model": "m", **values}, "here")
    for key in unknown:
        assert repr(key) in str(caught.value)


def test_settings_are_the_same_wherever_the_files_lie(tmp_path: Path) -> None:
    text = "model: m.onnx\noutput: out\nevaluation_data: {path: e, samples: 5, labels: {file: l.tsv}}\n"
    found = set()
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "edgepack.yaml").write_text(text)
        found.add(load_recipe(tmp_path / place / "edgepack.yaml", {}).settings_json())
    (settings,) = found
    assert str(tmp_path) not in settings
    assert '"samples": 5' in settings
    assert load_recipe(tmp_path / "a" / "edgepack.yaml", {"seed": 1}).settings_json() != settings
