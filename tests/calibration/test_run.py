"""The calibration run: ranges of a model's values over samples, and the saved table."""

import json
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support.onnx_models import Array, f32, parse, run

from edgepack.calibration.observers import OBSERVERS
from edgepack.calibration.ranges import Range, RangeTable, load_ranges
from edgepack.calibration.run import calibrate, stream_activations
from edgepack.config.recipe import Calibration, Data
from edgepack.data.samples import Samples, open_samples
from edgepack.errors import CalibrationError
from edgepack.ir.fingerprint import fingerprint
from edgepack.ir.inputs import input_specs

NET = """net (float[N, C] x) => (float[N, C] y) {
    a = Mul (x, two)
    b = Relu (a)
    y = Sub (b, one)
}"""
CONSTANTS = {"two": f32(2), "one": f32(1)}


def folder_of(folder: Path, arrays: list[Array], name: str = "x") -> Path:
    folder.mkdir(exist_ok=True)
    for index, array in enumerate(arrays):
        np.savez(folder / f"{index:03}.npz", **{name: array})  # type: ignore[arg-type]
    return folder


def opened(model: ir.Model, path: Path) -> Samples:
    return open_samples(Data(path=str(path)), "calibration", input_specs(model), {}, base=path.parent)


def table_of(
    tmp_path: Path, arrays: list[Array], names: list[str], observer: Any = "minmax", body: str = NET
) -> RangeTable:
    model = parse(body, weights=CONSTANTS)
    samples = opened(model, folder_of(tmp_path / "data", arrays))
    return calibrate(model, samples, names, Calibration(observer=observer), threads=1)


def varying(count: int = 6) -> list[Array]:
    rng = np.random.default_rng(0)
    return [f32(rng.normal(size=(1 + i % 3, 2 + i)) * (i + 1)) for i in range(count)]


def test_ranges_of_inputs_inner_values_and_outputs_over_varying_shapes(tmp_path: Path) -> None:
    arrays = varying()
    table = table_of(tmp_path, arrays, ["x", "a", "b", "y"])
    flat = np.concatenate([a.ravel() for a in arrays])
    expected = {"x": flat, "a": 2 * flat, "b": np.maximum(2 * flat, 0), "y": np.maximum(2 * flat, 0) - 1}
    for name, values in expected.items():
        low, high = float(values.min()), float(values.max())
        assert table.ranges[name] == Range(low, high, low, high)
    assert (table.samples, table.observer) == (6, "minmax")


@pytest.mark.parametrize("observer", sorted(set(OBSERVERS) - {"moving_average"}))
def test_order_of_the_samples_does_not_matter(tmp_path: Path, observer: str) -> None:
    arrays = varying()
    (tmp_path / "f").mkdir()
    forwards = table_of(tmp_path / "f", arrays, ["a", "b"], observer)
    (tmp_path / "b").mkdir()
    backwards = table_of(tmp_path / "b", arrays[::-1], ["a", "b"], observer)
    assert forwards.ranges == backwards.ranges


def test_the_model_is_not_changed_and_streams_what_it_computes(tmp_path: Path) -> None:
    model = parse(NET, weights=CONSTANTS)
    before = fingerprint(model)
    samples = opened(model, folder_of(tmp_path / "data", varying(3)))
    for (key, found), array in zip(
        stream_activations(model, samples, ["x", "b", "y"], threads=1), varying(3), strict=True
    ):
        assert key.endswith(".npz")
        np.testing.assert_array_equal(found["x"], array)
        np.testing.assert_array_equal(found["b"], np.maximum(2 * array, 0))
        np.testing.assert_array_equal(found["y"], run(model, {"x": array})["y"])
    assert fingerprint(model) == before


@pytest.mark.parametrize("bad, word", [(-1.0, "NaN"), (0.0, "infinity")])
def test_nan_and_infinity_name_tensor_and_sample(tmp_path: Path, bad: float, word: str) -> None:
    body = "net (float[N, C] x) => (float[N, C] y) { a = Mul (x, two) l = Log (a) y = Sub (l, one) }"
    arrays = [f32([[1, 2]]), f32([[1, bad]]), f32([[2, 3]])]
    with pytest.raises(CalibrationError, match=rf"'l' holds {word} on sample .*001\.npz"):
        table_of(tmp_path, arrays, ["a", "l"], "mse", body)


def test_a_sample_that_the_model_fails_on_is_named(tmp_path: Path) -> None:
    body = "net (float[N, C] x) => (float[N, K] y) { y = MatMul (x, w) }"
    model = parse(body, weights={"w": f32(np.ones((3, 2)))})
    samples = opened(model, folder_of(tmp_path / "data", [np.ones((1, 3), "f4"), np.ones((1, 4), "f4")]))
    with pytest.raises(CalibrationError, match=r"fails on sample .*001\.npz"):
        calibrate(model, samples, ["y"], Calibration(), threads=1)


def test_a_value_that_is_always_empty_has_no_range(tmp_path: Path) -> None:
    body = """net (float[N, C] x) => (float[N, C] y, float[M, C] e)
        <int64[1] zero = {0}> { y = Mul (x, two) e = Slice (y, zero, zero, zero) }"""
    table = table_of(tmp_path, varying(3), ["y", "e"], "mse", body)
    assert set(table.ranges) == {"y"}


def test_names_given_twice_and_none_at_all(tmp_path: Path) -> None:
    assert set(table_of(tmp_path, varying(2), ["a", "a"]).ranges) == {"a"}
    assert table_of(tmp_path, varying(2), []).ranges == {}


def test_progress_is_reported_once_per_sample(tmp_path: Path) -> None:
    model = parse(NET, weights=CONSTANTS)
    samples = opened(model, folder_of(tmp_path / "data", varying(4)))
    seen: list[int] = []
    calibrate(model, samples, ["a"], Calibration(), threads=1, on_sample=lambda: seen.append(1))
    assert len(seen) == 4


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path: Path) -> None:
    model = parse(NET, weights=CONSTANTS)
    peaks = []
    for count in (4, 40):
        arrays = [np.full((1, 200_000), i, np.float32) for i in range(count)]
        samples = opened(model, folder_of(tmp_path / str(count), arrays))
        tracemalloc.start()
        calibrate(model, samples, ["x", "a", "b"], Calibration(), threads=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 400_000


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    ranges = {"a/b:0": Range(-0.1, 1e-30, -1 / 3, 3.4e38), "ü": Range(0.0, 0.0, 0.0, 0.0)}
    table = RangeTable(ranges, "mse", "f" * 64, "e" * 64, 7)
    table.save(tmp_path / "ranges.json")
    assert load_ranges(tmp_path / "ranges.json") == table
    text = (tmp_path / "ranges.json").read_text(encoding="utf-8")
    load_ranges(tmp_path / "ranges.json").save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text(encoding="utf-8") == text


def content(**changes: Any) -> Mapping[str, Any]:
    entry = {"low": 0.0, "high": 1.0, "minimum": 0.0, "maximum": 1.0}
    base = {
        "edgepack_ranges": 1,
        "ranges": {"a": entry},
        "observer": "mse",
        "model_fingerprint": "m",
        "samples_fingerprint": "s",
        "samples": 1,
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not None}


def with_range(**changes: Any) -> Mapping[str, Any]:
    return content(ranges={"a": {**content()["ranges"]["a"], **changes}})


@pytest.mark.parametrize(
    "written, says",
    [
        ("", "not a table"),
        ("[1, 2]", "not a table"),
        ("{}", "not a table"),
        (json.dumps(content(edgepack_ranges=2)), "format 2, this edgepack reads 1"),
        (json.dumps(content(observer=None)), "not a table"),
        (json.dumps(content(more=1)), "not a table"),
        (json.dumps(content(ranges=[1])), "not a table"),
        (json.dumps(content(ranges={"a": {"low": 0}})), "not a table"),
        (json.dumps(with_range(low="zero")), "not a table"),
        (json.dumps(with_range(low=float("nan"))), "'a' has no usable range"),
        (json.dumps(with_range(high=float("inf"))), "'a' has no usable range"),
        (json.dumps(with_range(low=2.0)), "'a' has no usable range"),
        (json.dumps(with_range(minimum=2.0)), "'a' has no usable range"),
    ],
)
def test_a_file_that_is_not_a_range_table_is_an_error_with_its_path(
    tmp_path: Path, written: str, says: str
) -> None:
    path = tmp_path / "ranges.json"
    path.write_text(written, encoding="utf-8")
    with pytest.raises(CalibrationError, match=says) as error:
        load_ranges(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_a_calibration_error(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"none\.json"):
        load_ranges(tmp_path / "none.json")


def test_a_table_of_another_model_or_with_a_tensor_missing_is_an_error() -> None:
    table = RangeTable({"a": Range(0, 1, 0, 1)}, "mse", "m" * 64, "s", 1)
    table.require(["a"], "m" * 64, "here")
    with pytest.raises(CalibrationError, match="another model"):
        table.require(["a"], "n" * 64, "here")
    with pytest.raises(CalibrationError, match=r"tensor 'b' \(2 missing\)"):
        table.require(["a", "b", "c"], "m" * 64, "here")
