"""Builds of a float16 model: int8 as exact as from float32, inputs and outputs keep their types."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from support import tiny
from support.onnx_models import Array, parse

from edgepack.benchmark.bench import ColdStart
from edgepack.config.recipe import load_recipe
from edgepack.config.target import load_target
from edgepack.errors import ModelError
from edgepack.ir.files import load_model, model_bytes, save_model
from edgepack.pipeline.build import build
from edgepack.pipeline.inspection import inspect_model, inspection_text
from edgepack.pipeline.job import Job
from edgepack.report.text import text
from edgepack.results import BuildReport

HALF_NET = tiny.NET.replace("float[", "float16[")
MIXED_NET = """net (float[batch, 16] x) => (float[batch, 4] y) {
    h = Cast <to = 10> (x)
    a = Gemm <transB = 1> (h, w1, b1)
    r = Relu (a)
    g = Gemm <transB = 1> (r, w2, b2)
    y = Cast <to = 1> (g)
}"""


@pytest.fixture(autouse=True)
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgepack.benchmark.bench.cold_start", lambda *_: ColdStart(1.0, 1_000_000))


def project(folder: Path, net: str, dtype: type, **recipe: Any) -> Path:
    """The tiny project with float16 weights stored in ``dtype``, and samples in the input's type."""
    tiny.project(folder, **recipe)
    weights: dict[str, Array] = {n: w.astype(np.float16).astype(dtype) for n, w in tiny.weights().items()}
    save_model(parse(net, weights=weights), folder / "model.onnx")
    fed = np.float16 if "float16[" in net else np.float32
    for name in ("calib", "eval"):
        arrays = dict(np.load(folder / f"{name}.npz"))
        arrays["x"] = arrays["x"].astype(np.float16).astype(fed)
        np.savez(folder / f"{name}.npz", **arrays)
    return folder


def built(folder: Path, target: str = "x86-cpu") -> tuple[BuildReport, Path]:
    return build(
        Job(load_recipe(folder / "edgepack.yaml", {}), load_target(target), folder, "edgepack build")
    )


def groups(report: BuildReport) -> dict[str, str]:
    return {u.op_type: u.method for u in report.units if u.op_type != "Cast"}


@pytest.mark.parametrize("net", [HALF_NET, MIXED_NET], ids=["all float16", "Casts at the edges"])
def test_integers_are_as_exact_as_from_float32(net: str, tmp_path: Path) -> None:
    exact, _ = built(project(tmp_path / "float", tiny.NET, np.float32))
    report, output = built(project(tmp_path / "half", net, np.float16))
    assert groups(report) == groups(exact)
    for one, other in zip(report.models[1:], exact.models[1:], strict=True):
        assert one.fidelity is not None and one.fidelity.sqnr_db is not None
        assert other.fidelity is not None and other.fidelity.sqnr_db is not None
        assert abs(one.fidelity.sqnr_db - other.fidelity.sqnr_db) < 0.5
    assert report.models[0].size_bytes == model_bytes(tmp_path / "half/model.onnx")
    given, made = load_model(tmp_path / "half/model.onnx"), load_model(output / "model.onnx")
    for before, after in zip(
        (*given.graph.inputs, *given.graph.outputs), (*made.graph.inputs, *made.graph.outputs), strict=True
    ):
        assert (before.name, before.dtype) == (after.name, after.dtype)
    assert "the original is float16: " in text(report)
    assert text(report).rstrip().endswith("sizes and times compare with the float16 file")
    assert "the original is" not in text(exact)
    assert "The original is float16" in (output / "report.html").read_text()


def test_every_format_takes_what_the_original_took(tmp_path: Path) -> None:
    report, _ = built(project(tmp_path / "half", HALF_NET, np.float16), "mobile")
    assert not report.refused
    assert [m.name for m in report.models] == ["original", "onnx", "ort", "tflite"]
    assert all(m.fidelity is not None and (m.fidelity.sqnr_db or 99) > 20 for m in report.models[1:])
    assert report.runtime["tflite"]["inputs"][0]["type"] in ("float16", "float32")


def test_inspect_tells(tmp_path: Path) -> None:
    folder = project(tmp_path / "half", HALF_NET, np.float16)
    found = inspect_model(folder / "model.onnx", None)
    assert found.inputs == {"x": "float16 [batch, 16]"}
    assert "the original is float16: 7 weights and activations became float32" in inspection_text(found)
    assert ir.DataType.FLOAT16 in {v.dtype for v in load_model(folder / "model.onnx").graph.inputs}


def test_bfloat16_is_refused_by_name(tmp_path: Path) -> None:
    folder = tiny.project(tmp_path / "brain")
    weights = {n: w.astype(ml_dtypes.bfloat16) for n, w in tiny.weights().items()}
    net = MIXED_NET.replace("to = 10", "to = 16")
    save_model(parse(net, weights=weights, opset=22), folder / "model.onnx", check=False)
    with pytest.raises(ModelError, match=r"model.onnx: tensor 'w1' is bfloat16, for which onnxruntime"):
        built(folder)
