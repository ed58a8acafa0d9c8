"""Check and bench of existing models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.onnx_models import parse
from support.sampling import image_folder
from support.tflites import write_conv_net

from edgepack.config.recipe import Data, ImageInput, load_recipe
from edgepack.config.target import load_target
from edgepack.errors import ConfigError, ExportError
from edgepack.export.ort import export_ort
from edgepack.ir.files import save_model
from edgepack.ir.inputs import InputSpec
from edgepack.pipeline.measuring import (
    BenchData,
    bench_data,
    bench_feeds,
    bench_models,
    bench_text,
    check_models,
    check_text,
    random_feed,
)

TARGET = load_target("x86-cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project, and a second model whose weights are off by 1%."""
    folder = tiny.project(tmp_path / "project", metric="accuracy")
    noisy = {name: (w * 1.01).astype(np.float32) for name, w in tiny.weights().items()}
    save_model(parse(tiny.NET, weights=noisy), folder / "noisy.onnx")
    return folder


def test_check_compares_with_the_original(folder: Path) -> None:
    recipe = load_recipe(folder / "edgepack.yaml", {})
    original = folder / "model.onnx"
    rows = check_models(original, [original, folder / "noisy.onnx"], recipe, folder, TARGET, lambda *_: None)
    assert [row["samples"] for row in rows] == [12, 12, 12]
    assert rows[1]["sqnr_db"] is None
    assert rows[1]["agreement"] == 1.0
    assert 30 < rows[2]["sqnr_db"] < 40
    assert rows[0]["metric"] == rows[1]["metric"]
    lines = check_text(rows).splitlines()
    assert "equal" in lines[1]
    assert f"{rows[2]['sqnr_db']:.1f} dB" in lines[2]
    assert lines[-1] == "on 12 samples"


def test_check_needs_samples(folder: Path) -> None:
    recipe = load_recipe(None, {"model": str(folder / "model.onnx")})
    with pytest.raises(ConfigError, match="--data"):
        check_models(folder / "model.onnx", [], recipe, folder, TARGET, lambda *_: None)


def test_check_refuses_another_output(folder: Path) -> None:
    other = parse("net (float[batch, 16] x) => (float[batch, 16] z) { z = Relu (x) }")
    save_model(other, folder / "other.onnx")
    recipe = load_recipe(folder / "edgepack.yaml", {})
    with pytest.raises(ExportError, match="output 'y'"):
        check_models(folder / "model.onnx", [folder / "other.onnx"], recipe, folder, TARGET, lambda *_: None)


def test_bench_measures_each_file_and_its_operators(folder: Path) -> None:
    models = [folder / "model.onnx", folder / "noisy.onnx"]
    data = Data(path=str(folder / "calib.npz"))
    rows = bench_models(models, BenchData(data, {}, folder), TARGET, threads=1, runs=5, ops=True)
    assert [row["model"] for row in rows] == [str(m) for m in models]
    for row in rows:
        assert 0 < row["min_ms"] <= row["p50_ms"] <= row["p90_ms"]
        assert row["cold_start_ms"] > 0
        assert "Gemm" in " ".join(row["ops_us"])
    assert rows[0]["speedup"] == 1.0
    assert 0.2 < rows[1]["speedup"] < 5  # the same work
    page = bench_text(rows)
    assert page.count("p50") == 2
    assert "thread(s), onnxruntime" in page.splitlines()[-1]


def test_a_bench_takes_a_few_samples_of_the_recipe(folder: Path) -> None:
    recipe = load_recipe(folder / "edgepack.yaml", {})
    few = bench_data(recipe, folder, 3)
    assert few is not None
    feeds = bench_feeds([folder / "model.onnx"], few, TARGET.runtime)
    with np.load(folder / "calib.npz") as archive:
        rows = archive["x"].reshape(len(archive["x"]), -1).tolist()
    places = [rows.index(feed["x"].ravel().tolist()) for feed in feeds]
    assert len(places) == 3 and places == sorted(set(places))
    assert bench_data(load_recipe(None, {"model": str(folder / "model.onnx")}), folder) is None


def test_bench_of_an_ort_file_on_random_inputs(folder: Path) -> None:
    path = folder / "model.ort"
    export_ort(folder / "model.onnx", path, load_target("mobile").runtime)
    rows = bench_models([path], None, TARGET, threads=None, runs=3, ops=True)
    assert rows[0]["size_bytes"] == path.stat().st_size
    assert rows[0]["p50_ms"] > 0
    assert rows[0]["ops_us"]
    json.dumps(rows, allow_nan=False)


def test_bench_of_pictures_takes_the_preprocessing_of_the_recipe(tmp_path: Path) -> None:
    net = parse("net (float[batch, 3, 8, 6] picture) => (float[batch, 3, 8, 6] y) { y = Relu (picture) }")
    save_model(net, tmp_path / "model.onnx")
    data = Data(path=str(image_folder(tmp_path / "images", "a.png", "b.png")))
    options: dict[str, Any] = {"threads": 1, "runs": 2, "ops": False}
    with pytest.raises(ConfigError, match="images:"):
        bench_models([tmp_path / "model.onnx"], BenchData(data, {}, tmp_path), TARGET, **options)
    images = {"picture": ImageInput()}
    rows = bench_models([tmp_path / "model.onnx"], BenchData(data, images, tmp_path), TARGET, **options)
    assert rows[0]["p50_ms"] > 0


def test_random_inputs_for_a_bench() -> None:
    specs = [
        InputSpec("x", np.dtype(np.float32), ("batch", 3, None)),
        InputSpec("ids", np.dtype(np.int64), (1, 4)),
    ]
    feed = random_feed(specs)
    assert feed["x"].shape == (1, 3, 1)
    assert feed["x"].dtype == np.float32
    assert feed["ids"].tolist() == [[0, 0, 0, 0]]
    with pytest.raises(ConfigError, match="'x' has an unknown rank"):
        random_feed([InputSpec("x", np.dtype(np.float32), None)])


def test_check_and_bench_of_a_tflite_beside_its_original(tmp_path: Path) -> None:
    original, built = write_conv_net(tmp_path)
    data = Data(path=str(tmp_path / "samples.npz"))
    recipe = load_recipe(None, {"model": str(original), "evaluation_data": {"path": data.path}})
    rows = check_models(original, [built], recipe, tmp_path, TARGET, lambda *_: None)
    assert rows[1]["sqnr_db"] > 25
    options: dict[str, Any] = {"threads": 1, "runs": 3}
    timed = bench_models([original, built], None, TARGET, ops=False, **options)
    assert [row["model"] for row in timed] == [str(original), str(built)]
    assert timed[1]["p50_ms"] > 0
    with pytest.raises(ConfigError, match=r"model.tflite: .*without --ops"):
        bench_models([original, built], None, TARGET, ops=True, **options)
