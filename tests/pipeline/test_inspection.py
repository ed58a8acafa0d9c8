"""Looking at a model without data."""

from pathlib import Path

import pytest
from support.onnx_models import conv_net

from edgepack.config.target import load_target
from edgepack.errors import ModelError
from edgepack.ir.files import save_model
from edgepack.pipeline.inspection import inspect_model, inspection_text, plan_rows, plan_text


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    save_model(conv_net(), path)
    return path


def test_facts_of_a_model(model: Path) -> None:
    found = inspect_model(model, None)
    assert found.size_bytes == model.stat().st_size
    assert found.opset == 17
    assert found.inputs == {"x": "float32 [batch, 3, 8, 8]"}
    assert found.operators["Conv"] == 2
    assert found.operators["BatchNormalization"] == 1
    assert "BatchNormalization" not in found.operators_normalized
    assert found.planned == ()
    page = inspection_text(found)
    assert "in   x: float32 [batch, 3, 8, 8]" in page
    assert all(kind.startswith("float32 [batch, ") for kind in found.outputs.values())
    assert f"with {found.parameters:,} parameters" in page
    assert "2 Conv" in page


def test_the_plan_says_what_each_node_becomes_and_why(model: Path) -> None:
    rows = plan_rows(model, load_target("x86-cpu"))
    assert {"node", "op_type", "form", "reason"} == set(rows[0])
    convs = [row for row in rows if row["op_type"] == "Conv"]
    assert [row["form"] for row in convs] == ["static", "static"]
    page = plan_text(rows).splitlines()
    assert page[0].split()[:2] == ["static", "Conv"]
    assert page[-1].startswith(f"{len([r for r in rows if r['form'] == 'static'])} static")
    found = inspect_model(model, load_target("x86-cpu"))
    assert list(found.planned) == rows
    assert page[0] in inspection_text(found)


def test_a_target_without_integer_kernels_leaves_all_in_float(model: Path) -> None:
    target = load_target("x86-cpu")
    kernels = target.kernels.model_copy(update={"integer": (), "dynamic": (), "weight_only": ()})
    rows = plan_rows(model, target.model_copy(update={"kernels": kernels}))
    assert {row["form"] for row in rows} == {"float"}
    assert all(row["reason"] for row in rows)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_text("hello")
    with pytest.raises(ModelError, match=r"net\.onnx"):
        inspect_model(path, None)


def test_a_plan_of_nothing() -> None:
    assert plan_text([]) == "the model has no nodes\n"
