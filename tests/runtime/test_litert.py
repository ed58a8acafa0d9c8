"""``.tflite`` files in LiteRT: inputs and outputs as those of their ONNX model."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.onnx_models import parse
from support.tflites import write_conv_net, write_tflite

from edgepack.benchmark.bench import bench
from edgepack.config.target import Runtime
from edgepack.errors import ConfigError, ModelError
from edgepack.export.tflite.export import LAYOUT as WRITTEN_LAYOUT
from edgepack.ir.inputs import InputSpec
from edgepack.ir.numerics import sqnr_db
from edgepack.runtime import litert
from edgepack.runtime.litert import Delegation, delegation, litert_version, open_tflite
from edgepack.runtime.runner import open_model
from edgepack.runtime.tflite_metadata import read_metadata

X = np.random.default_rng(5).normal(size=(1, 3, 8, 8)).astype(np.float32)
LEAST_DB = 25.0
"""Eight bits give about 30 dB here; a wrong order of axes gives about 0."""


@pytest.mark.parametrize("io", ["float", "int8"])
def test_a_tflite_is_fed_and_read_as_its_onnx_model(tmp_path: Path, io: str) -> None:
    original, built = write_conv_net(tmp_path, io)  # type: ignore[arg-type]
    runner = open_model(built, Runtime())
    assert runner.inputs == (InputSpec("x", np.dtype(np.float32), (1, 3, 8, 8)),)
    outputs = runner.run({"x": X})
    expected = open_model(original, Runtime()).run({"x": X})
    assert list(outputs) == ["y"]
    assert outputs["y"].shape == (1, 5) and outputs["y"].dtype == np.float32
    assert sqnr_db(expected["y"], outputs["y"]) > LEAST_DB
    raw = runner.call(runner.prepare({"x": X}))[0]
    assert raw.dtype == (np.int8 if io == "int8" else np.float32)


def test_xnnpack_and_the_interpreters_own_kernels_agree(tmp_path: Path) -> None:
    _, built = write_conv_net(tmp_path)
    quick, plain = open_tflite(built, 1), open_tflite(built, 1, xnnpack=False)
    assert quick.delegation().partitions == 1
    assert quick.delegation().delegated == quick.delegation().operators > 3
    assert quick.delegation().left == {}
    assert plain.delegation().partitions == plain.delegation().delegated == 0
    assert sum(plain.delegation().left.values()) == plain.delegation().operators
    assert sqnr_db(quick.run({"x": X})["y"], plain.run({"x": X})["y"]) > LEAST_DB


def test_delegated_operators_are_those_between_inputs_and_outputs_of_partitions() -> None:
    """Three operators in two partitions, one not delegated: 0 -> A -> 2 -> B -> 3 -> C -> 4 -> D -> 5."""
    operators = [
        {"op_name": "CONV_2D", "inputs": [0, 1], "outputs": [2]},
        {"op_name": "ADD", "inputs": [2, 2], "outputs": [3]},
        {"op_name": "CAST", "inputs": [3], "outputs": [4]},
        {"op_name": "MUL", "inputs": [4, -1], "outputs": [5]},
        {"op_name": "DELEGATE", "inputs": [0, 1], "outputs": [3]},
        {"op_name": "DELEGATE", "inputs": [4], "outputs": [5]},
    ]
    assert delegation(operators) == Delegation(4, 3, 2, {"CAST": 1})
    assert delegation(operators[:4]) == Delegation(4, 0, 0, {"CONV_2D": 1, "ADD": 1, "CAST": 1, "MUL": 1})


def test_metadata_and_the_order_of_axes_are_in_the_file(tmp_path: Path) -> None:
    _, built = write_conv_net(tmp_path)
    entries = read_metadata(built)
    assert entries["edgepack.k"] == b"v"
    assert WRITTEN_LAYOUT == litert.LAYOUT and WRITTEN_LAYOUT in entries
    port = open_tflite(built, 1).entries[0]
    assert (port.order, port.shape) == ((0, 2, 3, 1), (1, 3, 8, 8))
    np.testing.assert_array_equal(port.native(port.stored(X)), X)
    assert port.stored(X).shape == (1, 8, 8, 3)


def test_int64_is_cast_only_where_values_fit(tmp_path: Path) -> None:
    body = "net (int64[batch, 2] ids) => (float[batch, 2, 4] y) { y = Gather (table, ids) }"
    table = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    model = parse(body, weights={"table": table})
    ids = np.arange(8, dtype=np.int64).reshape(4, 1, 2)
    _, built, _ = write_tflite(model, tmp_path, {"ids": ids})
    runner = open_tflite(built, 1)
    got = runner.run({"ids": np.asarray([[7, 3]])})["y"]
    np.testing.assert_allclose(got, table[[[7, 3]]], atol=0.03)
    narrow = replace(runner, entries=(replace(runner.entries[0], dtype=np.dtype(np.int32)),))
    assert narrow.prepare({"ids": np.asarray([[7, 3]])})["ids"].dtype == np.int32
    with pytest.raises(ModelError, match="'ids' is int32, some values do not fit"):
        narrow.prepare({"ids": np.asarray([[2**40, 0]])})


def test_feeds_that_do_not_fit_are_named(tmp_path: Path) -> None:
    _, built = write_conv_net(tmp_path)
    runner = open_model(built, Runtime())
    with pytest.raises(ModelError, match=r"model.tflite: its input 'x' is not among 'z'"):
        runner.run({"z": X})
    with pytest.raises(ModelError, match=r"fixed shape \[1, 3, 8, 8\], the sample's is \[1, 3, 8, 9\].*dims"):
        runner.run({"x": np.zeros((1, 3, 8, 9), np.float32)})


def test_a_file_that_the_interpreter_refuses(tmp_path: Path) -> None:
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(b"no model at all, but long enough")
    with pytest.raises(ModelError, match=r"broken.tflite: ai_edge_litert.interpreter refuses it: ") as caught:
        open_model(broken, Runtime())
    assert "\n" not in str(caught.value)


def test_without_a_library_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(litert, "find_spec", lambda name: None)
    assert litert_version() is None
    (tmp_path / "any.tflite").touch()
    with pytest.raises(ConfigError, match=r'pip install "edgepack\[tflite\]"'):
        open_model(tmp_path / "any.tflite", Runtime())


def test_the_first_installed_library_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(name="stands for tflite_runtime.interpreter")
    monkeypatch.setitem(sys.modules, "tflite_runtime", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "tflite_runtime.interpreter", old)
    monkeypatch.setattr(litert, "find_spec", lambda name: True)
    assert litert.litert().__name__ == "ai_edge_litert.interpreter"
    monkeypatch.setattr(litert, "find_spec", lambda name: name == "tflite_runtime")
    assert litert.litert() is old


def test_a_bench_of_both_kinds_of_file(tmp_path: Path) -> None:
    original, built = write_conv_net(tmp_path, "int8")
    found = bench({"onnx": original, "tflite": built}, Runtime(), [{"x": X}], warmup=1, runs=5)
    assert found["onnx"].speedup == 1.0
    assert 0.05 < found["tflite"].speedup < 20
    assert (found["tflite"].cold_start_ms or 0) > 0
    assert (found["tflite"].peak_memory_bytes or 0) > 0
