"""Tied tables: an embedding and the product with its transposed stay one copy in every file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.onnx_models import Array, difference, f32, parse, run
from support.quantizing import build, target, weight

from edgepack.benchmark.bench import ColdStart
from edgepack.compression.budget import packed_int8_bytes
from edgepack.compression.share import share
from edgepack.compression.weights import weighted_groups
from edgepack.config.passes import Share
from edgepack.config.recipe import Recipe
from edgepack.config.target import load_target
from edgepack.graph.compact import compact, names_of
from edgepack.graph.normalize import normalize
from edgepack.graph.tied_embeddings import as_transposes, one_copy, tied_weights
from edgepack.ir.files import load_model, save_model
from edgepack.ir.model import clone
from edgepack.pipeline.build import build as build_package
from edgepack.pipeline.job import Job
from edgepack.quantization.groups import find_fusion_groups
from edgepack.quantization.plan.types import Method
from edgepack.runtime.fused import what_the_runtime_did

STATIC, DYNAMIC, WEIGHT_ONLY = Method.STATIC, Method.DYNAMIC, Method.WEIGHT_ONLY
ROWS, WIDTH = 96, 32
TABLE = weight(ROWS, WIDTH)

BY_TRANSPOSE = """net (int64[b, 6] ids) => (float[b, 6, 96] y) {
    e = Gather (t, ids) h = MatMul (e, w) g = Tanh (h)
    u = Transpose <perm = [1, 0]> (t) y = MatMul (g, u) }"""
TWO_CONSTANTS = """net (int64[b, 6] ids) => (float[b, 6, 96] y) {
    e = Gather (t, ids) h = MatMul (e, w) g = Tanh (h) y = MatMul (g, u) }"""
GEMM = """net (int64[6] ids) => (float[6, 96] y) {
    e = Gather (t, ids) h = MatMul (e, w) g = Tanh (h) y = Gemm <transB = 1> (g, t) }"""
KINDS: Mapping[str, tuple[str, dict[str, Array]]] = {
    "by transpose": (BY_TRANSPOSE, {}),
    "two constants": (TWO_CONSTANTS, {"u": f32(TABLE.T)}),
    "gemm": (GEMM, {}),
}


def weights(**more: Array) -> dict[str, Array]:
    return {"t": TABLE, "w": weight(WIDTH, WIDTH, seed=2), **more}


def feeds(body: str) -> dict[str, Array]:
    ids = np.random.default_rng(0).integers(0, ROWS, (1, 6))
    return {"ids": ids[0] if body is GEMM else ids}


def sizes(model: ir.Model, dtype: ir.DataType) -> list[int]:
    held = (value.const_value for value in model.graph.initializers.values())
    return [tensor.size for tensor in held if tensor is not None and tensor.dtype == dtype]


@pytest.mark.parametrize("method", [STATIC, DYNAMIC, WEIGHT_ONLY])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_table_is_one_copy_in_every_form(kind: str, method: Method, tmp_path: Path) -> None:
    body, more = KINDS[kind]
    made = build(tmp_path, body, weights(**more), feeds=feeds(body), method=method)
    small = compact(made.quantized, names_of(made.model))
    assert sizes(small, ir.DataType.INT8).count(ROWS * WIDTH) == 1
    assert ROWS * WIDTH not in sizes(small, ir.DataType.FLOAT)
    save_model(small, tmp_path / "small.onnx")
    assert difference(run(small, feeds(body)), run(made.quantized, feeds(body))) == 0
    assert made.sqnr_db > 35
    table = next(u for u in made.plan.groups if u.group.op_type == "Gather")
    assert table.method is WEIGHT_ONLY and "the integers of" in table.reason.text


@pytest.mark.parametrize("method", [STATIC, DYNAMIC, WEIGHT_ONLY])
def test_the_runtime_fuses_what_it_fuses_of_two_copies(method: Method, tmp_path: Path) -> None:
    apart = weights(u=f32(TABLE.T + 1e-4))
    two = build(tmp_path, TWO_CONSTANTS, apart, feeds=feeds(TWO_CONSTANTS), method=method)
    assert sizes(compact(two.quantized, ()), ir.DataType.INT8).count(ROWS * WIDTH) == 2
    one = build(tmp_path, BY_TRANSPOSE, weights(), feeds=feeds(BY_TRANSPOSE), method=method)
    save_model(compact(one.quantized, ()), tmp_path / "one.onnx")
    fused = what_the_runtime_did(tmp_path / "one.onnx", target().runtime)
    assert fused.integer_kernels == two.fused.integer_kernels
    assert fused.leftover_dequantize == two.fused.leftover_dequantize == 0


def test_a_table_whose_product_stays_float_stays_float_and_is_stored_once(tmp_path: Path) -> None:
    made = build(tmp_path, BY_TRANSPOSE, weights(), feeds=feeds(BY_TRANSPOSE), method={"y": Method.FLOAT})
    assert made.forms()["e"] == "float"
    assert sizes(compact(made.quantized, ()), ir.DataType.FLOAT).count(ROWS * WIDTH) == 1


def test_a_large_transposed_constant_is_folded() -> None:
    """What folds other nodes leaves it alone, and the product with it had no weight then."""
    body = BY_TRANSPOSE.replace("96", "3000")
    given = {"t": weight(3000, 96), "w": weight(96, 96, seed=2)}
    model, _ = normalize(parse(body, weights=given), min_opset=13, max_opset=21)
    assert [n.op_type for n in model.graph].count("Transpose") == 0
    groups = {u.outputs[0]: u for u in find_fusion_groups(model, target().kernels)}
    assert groups["y"].table == "t" and groups["h"].table is None
    ids = {"ids": np.array([[0, 1, 2, 3, 4, 2999]])}
    assert difference(run(model, ids), run(parse(body, weights=given), ids)) == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(33, 64), st.integers(32, 48), st.booleans(), st.booleans())
def test_one_copy_computes_the_same_and_only_of_transposed_tables(
    rows: int, width: int, tied: bool, by_columns: bool
) -> None:
    table = weight(rows, width)
    head = f32(table.T if tied else table.T * 1.001)
    axis = 1 if by_columns else 0
    look_up = f"e = Gather <axis = {axis}> (t, ids)" + (" g = Transpose (e)" if by_columns else "")
    given_to = "g" if by_columns else "e"
    body = f"net (int64[4] ids) => (float[4, {rows}] y) {{ {look_up} y = MatMul ({given_to}, u) }}"
    if by_columns:  # columns that are looked up are no table's rows
        head = weight(rows, rows, seed=3)
    model = parse(body, weights={"t": table, "u": head})
    before = clone(model)
    made = one_copy(model)
    ids = {"ids": np.array([0, 1, 5, 31])}
    assert difference(run(made, ids), run(before, ids)) == 0
    assert len(made.graph.initializers) == (1 if tied and not by_columns else 2)
    assert set(model.graph.initializers) == {"t", "u"}
    assert bool(tied_weights(model.graph)) == (tied and not by_columns)


def test_a_nearly_tied_weight_becomes_the_tables_transposed() -> None:
    near = f32(TABLE.T + 0.002 * weight(WIDTH, ROWS, seed=9))
    model = parse(TWO_CONSTANTS, weights=weights(u=near))
    assert share(model, Share())[1] == () and share(model, Share(within=0.001))[1] == ()
    tied, ties = share(model, Share(within=0.01))
    assert [(t.gone, t.kept) for t in ties] == [("u", "t transposed")] and 0.001 < ties[0].error < 0.01
    assert as_transposes(tied) == {"t": "u"}
    assert as_transposes(model) == {}


def test_passes_on_weights_leave_a_tied_one_alone() -> None:
    model, _ = normalize(parse(BY_TRANSPOSE, weights=weights()), min_opset=13, max_opset=21)
    groups = find_fusion_groups(model, target().kernels)
    nodes = {n.name: n for n in model.graph}
    assert [u.outputs[0] for u in weighted_groups("prune", groups, nodes, (), ())] == ["h"]
    apart, _ = normalize(
        parse(TWO_CONSTANTS, weights=weights(u=f32(TABLE.T + 0.01 * weight(WIDTH, ROWS, seed=9)))),
        min_opset=13, max_opset=21,
    )  # fmt: skip
    more = packed_int8_bytes(apart, find_fusion_groups(apart, target().kernels), {}, None)
    assert more - packed_int8_bytes(model, groups, {}, None) > 0.7 * ROWS * WIDTH


def test_a_build_of_a_tied_model_in_all_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ai_edge_litert")
    monkeypatch.setattr("edgepack.benchmark.bench.cold_start", lambda *_: ColdStart(1.0, 1_000_000))
    rows = 600
    body = BY_TRANSPOSE.replace("96", str(rows))
    held = {"t": weight(rows, WIDTH), "w": weight(WIDTH, WIDTH, seed=2)}
    save_model(parse(body, weights=held), tmp_path / "model.onnx")
    np.savez(tmp_path / "x.npz", ids=np.random.default_rng(0).integers(0, rows, (24, 1, 6)))
    settings_: dict[str, Any] = {
        "model": tmp_path / "model.onnx", "output": str(tmp_path / "dist"), "preset": "fast",
        "calibration_data": {"path": str(tmp_path / "x.npz")}, "bench": {"warmup": 0, "runs": 3},
        "quantize": {"method": "static"},
    }  # fmt: skip
    job = Job(Recipe.model_validate(settings_), load_target("mobile"), tmp_path, "edgepack build")
    report, output = build_package(job)
    assert report.passed
    (stored,) = (
        v.const_value.numpy()
        for v in load_model(output / "model.onnx").graph.initializers.values()
        if v.const_value is not None and v.const_value.size == rows * WIDTH
    )
    written = (output / "model.tflite").read_bytes()
    assert written.count(np.ascontiguousarray(stored.T).tobytes()) == 1
    assert written.count(stored.tobytes()) == 0
