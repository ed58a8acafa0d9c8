"""Plans written into graphs: shared constants, bodies of control flow, and shapes at the edge."""

from pathlib import Path

import numpy as np
import pytest
from support.onnx_models import i64, run
from support.quantizing import build, target, weight

from edgepack.quantization.plan.types import Method
from edgepack.quantization.rewrite.apply import apply_plan
from edgepack.quantization.weights.rounding import Rounded, Rounder

STATIC, DYNAMIC, WEIGHT_ONLY = Method.STATIC, Method.DYNAMIC, Method.WEIGHT_ONLY


@pytest.mark.parametrize(
    "nodes", ["c = MatMul(x, w) e = Tanh(c) y = MatMul(e, w)", "c = MatMul(x, w) y = MatMul(c, w)"]
)
def test_products_that_share_a_stored_weight_share_its_float_form(nodes: str, tmp_path: Path) -> None:
    """The runtime fuses a DequantizeLinear with one reader; with more it would run anew each time."""
    body = f"net (float[2,5,16] x) => (float[a,b,c] y) {{ {nodes} }}"
    made = build(tmp_path, body, {"w": weight(16, 16)}, method=WEIGHT_ONLY)
    assert made.fused.leftover_dequantize == 0
    stored = [v for v in made.quantized.graph.initializers.values() if (t := v.const_value) and t.size == 256]
    assert [str(v.const_value.dtype) for v in stored if v.const_value is not None] == ["INT8"]
    assert [n.op_type for n in made.quantized.graph].count("Cast") == 1


def test_a_weight_that_a_body_reads_is_not_stored_twice(tmp_path: Path) -> None:
    # Nodes without names get some, unique in their graph only: the body's product is called like ours.
    body = """net (float[5,8] x, bool p) => (float[a,b] y) {
        c = MatMul(x, w)
        i = If(p) <then_branch = a () => (float[5,8] t) { t = MatMul(c, w) },
                   else_branch = b () => (float[5,8] e) { e = MatMul(c, w) }>
        y = MatMul(i, v) }"""
    weights = {"w": weight(8, 8), "v": weight(8, 3)}
    made = build(tmp_path, body, weights, feeds={"p": np.asarray(True)}, method=WEIGHT_ONLY)
    assert made.forms()["c"] == "float"
    assert "needs 'w' in float" in next(u.reason.text for u in made.plan.groups if u.group.outputs == ("c",))


@pytest.mark.parametrize("method", [STATIC, DYNAMIC, WEIGHT_ONLY])
@pytest.mark.parametrize("branch", [True, False])
def test_bodies_see_products_of_every_form(branch: bool, method: Method, tmp_path: Path) -> None:
    body = """net (float[5,8] x, bool p) => (float[a,b] y) {
        c = MatMul(x, w)
        d = MatMul(c, u)
        i = If(p) <then_branch = a () => (float[5,8] t) { t = Mul(c, d) },
                   else_branch = b () => (float[5,8] e) { e = Identity(d) }>
        y = MatMul(i, v) }"""
    weights = {"w": weight(8, 8), "u": weight(8, 8, seed=4), "v": weight(8, 3)}
    made = build(tmp_path, body, weights, feeds={"p": np.asarray(branch)}, method=method)
    assert list(made.forms().values()).count(str(method)) == 3
    assert made.sqnr_db > 32


@pytest.mark.parametrize("method", [STATIC, DYNAMIC, WEIGHT_ONLY])
def test_a_corrected_bias_of_a_gemm_that_had_none(method: Method, tmp_path: Path) -> None:
    body = "net (float[5,16] x) => (float[a,b] y) { y = Gemm<beta=0.0>(x, w) }"
    made = build(tmp_path, body, {"w": weight(16, 12)}, method=method)
    (name,) = (u.group.name for u in made.plan.groups)
    integers = Rounder(made.model)(made.plan)[name].integers
    corrected = apply_plan(made.model, made.plan, {name: Rounded(integers, np.ones(12, np.float32))})
    feeds = {"x": weight(5, 16, seed=8)}
    np.testing.assert_allclose(run(corrected, feeds)["y"], run(made.quantized, feeds)["y"] + 1, atol=0.06)


@pytest.mark.parametrize("method", [STATIC, DYNAMIC, WEIGHT_ONLY])
def test_empty_arrays(method: Method, tmp_path: Path) -> None:
    body = """net (float[n,16] x) => (float[a,b] y, float[c,d] z) {
        c = MatMul(x, w) s = Slice(c, b, b, b) e = Relu(s) y = MatMul(e, v) z = MatMul(c, v) }"""
    weights = {"w": weight(16, 12), "v": weight(12, 3), "b": i64([0])}
    made = build(tmp_path, body, weights, method=method)
    assert run(made.path, {"x": weight(4, 16)})["y"].shape == (0, 3)
    assert made.sqnr_db > 35


@pytest.mark.parametrize("shapes", [("5,16", "12"), ("16", "12,5"), ("16", "12")])
def test_products_of_two_activations_that_are_vectors(shapes: tuple[str, str], tmp_path: Path) -> None:
    dims = {("16", "12"): ""}.get(shapes, "[a]")
    nodes = "c = MatMul(x, w) y = MatMul(c, k)"
    body = f"net (float[{shapes[0]}] x, float[{shapes[1]}] k) => (float{dims} y) {{ {nodes} }}"
    made = build(tmp_path, body, {"w": weight(16, 12)})
    assert set(made.forms().values()) == {"static"}
    assert made.sqnr_db > 33


def test_added_channels_of_an_input_that_others_read_too(tmp_path: Path) -> None:
    base = target()
    wide = base.quantization.model_copy(update={"input_channels_multiple": 4})
    device = base.model_copy(update={"quantization": wide})
    body = """net (float[1,3,8,8] x) => (float[a,b,c,d] y, float[e,f,g,h] r, float[i,j,k,l] s) {
        c = Conv(x, u) r = Relu(c) d = Conv(r, w) e = Conv(r, v) y = Add(d, e) s = Conv(r, u) }"""
    weights = {"u": weight(3, 3, 1, 1), "w": weight(4, 3, 3, 3), "v": weight(4, 3, 3, 3, seed=5)}
    made = build(tmp_path, body, weights, device=device)
    assert [n.op_type for n in made.quantized.graph].count("Pad") == 1
    assert [u.added_channels for u in made.plan.groups if u.group.op_type == "Conv"] == [0, 1, 1, 0]
    assert made.fused.integer_kernels["QLinearConv"] == 4
    assert made.sqnr_db > 34
