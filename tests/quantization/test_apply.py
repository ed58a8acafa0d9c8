"""Apply: the integer model computes what the float one does, whatever shares what with whom."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.convs import ANY, CONV, net
from support.onnx_models import Array, f32, i64, parse, run
from support.quantizing import DYNAMIC, FLOAT, S8, STATIC, U8, WEIGHT_ONLY, build, target, weight

from edgepack.config.target import Runtime
from edgepack.ir.fingerprint import fingerprint
from edgepack.ir.numerics import sqnr_db
from edgepack.ir.scheme import Granularity, QuantParams, QuantType
from edgepack.quantization.plan.types import Method
from edgepack.quantization.rewrite.apply import apply_plan
from edgepack.quantization.rewrite.emit import Emitter
from edgepack.quantization.weights.rounding import Rounded, Rounder
from edgepack.runtime.fused import what_the_runtime_did


def ops(model: ir.Model) -> Counter[str]:
    return Counter(n.op_type for n in model.graph)


def test_result_is_deterministic_and_leaves_its_input_alone(tmp_path: Path) -> None:
    made = build(tmp_path, net("c = Conv(x, w) r = Relu(c) y = Conv(r, v)"), CONV)
    before = fingerprint(made.model)
    again = [apply_plan(made.model, made.plan, Rounder(made.model)(made.plan)) for _ in range(2)]
    serialized = [ir.to_proto(m).SerializeToString(deterministic=True) for m in (made.quantized, *again)]
    assert serialized[0] == serialized[1] == serialized[2]
    assert fingerprint(made.model) == before


def test_outputs_keep_their_order(tmp_path: Path) -> None:
    body = net("y = Conv(x, w) z = Conv(x, v)", f"{ANY} z, {ANY} y")
    made = build(tmp_path, body, CONV)
    assert [v.name for v in made.quantized.graph.outputs] == ["z", "y"]
    assert made.sqnr_db > 33


def test_an_input_that_feeds_several_units_is_quantized_once(tmp_path: Path) -> None:
    made = build(
        tmp_path, net("a = Conv(x, w) b = Conv(x, v) y = Add(a, b) z = Conv(y, w)", f"{ANY} z"), CONV
    )
    assert made.fused.leftover_quantize == 1
    assert made.fused.integer_kernels == {"QLinearConv": 3, "QLinearAdd": 1}
    assert made.sqnr_db > 33


def test_a_value_that_float_nodes_read_too_is_theirs_as_it_was(tmp_path: Path) -> None:
    body = net("t = Tanh(x) y = Conv(t, w) z = Exp(t)", f"{ANY} y, {ANY} z, {ANY} t")
    made = build(tmp_path, body, CONV | {})
    feeds = {"x": np.random.default_rng(5).normal(size=(1, 4, 8, 8)).astype(np.float32)}
    expected, got = run(made.model, feeds), run(made.path, feeds)
    np.testing.assert_array_equal(got["t"], expected["t"])
    np.testing.assert_allclose(got["z"], expected["z"], rtol=1e-6)
    assert sqnr_db(expected["y"], got["y"]) > 35


def test_a_value_that_is_output_and_input_of_integer_units(tmp_path: Path) -> None:
    body = net("c = Conv(x, w) y = Relu(c) z = Conv(y, v)", f"{ANY} y, {ANY} z")
    made = build(tmp_path, body, CONV)
    assert made.fused.integer_kernels == {"QLinearConv": 2}
    assert made.fused.leftover_dequantize == 2
    assert made.sqnr_db > 34


def test_a_float_activation_of_a_float_product_is_not_rounded_for_float_readers(tmp_path: Path) -> None:
    # Nothing integer reads c, so the product's output is float, and so is what Relu makes of it.
    body = """net (float[5,16] x) => (float[a,b] z, float[c,d] r, float[e,f] c) {
        c = MatMul(x, w) r = Relu(c) z = MatMul(r, v) }"""
    made = build(tmp_path, body, {"w": weight(16, 12), "v": weight(12, 4)})
    got = run(made.path, {"x": weight(5, 16, seed=8)})
    np.testing.assert_array_equal(got["r"], np.maximum(got["c"], 0))


@pytest.mark.parametrize(
    "first, second", [(STATIC, STATIC), (STATIC, WEIGHT_ONLY), (WEIGHT_ONLY, WEIGHT_ONLY)]
)
def test_shared_weights_and_biases(first: Method, second: Method, tmp_path: Path) -> None:
    body = net("c = Conv(x, w, b) r = Relu(c) y = Conv(r, w, b)")
    made = build(tmp_path, body, {"w": CONV["w"], "b": weight(4, seed=7)}, method={"r": first, "y": second})
    stored = [v for v in made.quantized.graph.initializers.values() if (t := v.const_value) and t.size == 16]
    assert [v.const_value.dtype.name for v in stored if v.const_value] == ["INT8"], "one copy for both"
    assert made.sqnr_db > 32


@pytest.mark.parametrize("methods", [(DYNAMIC, WEIGHT_ONLY), (STATIC, DYNAMIC), (DYNAMIC, DYNAMIC)])
def test_shared_matrices(methods: tuple[Method, Method], tmp_path: Path) -> None:
    body = "net (float[5,8] x) => (float[a,b] y) { c = MatMul(x, w) t = Tanh(c) y = MatMul(t, w) }"
    made = build(tmp_path, body, {"w": weight(8, 8)}, method=dict(zip(("c", "y"), methods, strict=True)))
    assert sorted(made.forms().values()) == sorted(["float", *methods])
    stored = [v for v in made.quantized.graph.initializers.values() if (t := v.const_value) and t.size == 64]
    assert len(stored) == 1
    assert made.sqnr_db > 32


def test_a_weight_that_a_float_node_uses_stays_for_it(tmp_path: Path) -> None:
    body = (
        "net (float[5,8] x, float[8,8] k) => (float[5,8] y, float[8,8] z) { y = MatMul(x, w) z = Sub(k, w) }"
    )
    made = build(tmp_path, body, {"w": weight(8, 8)})
    assert made.forms() == {"y": "static", "z": "float"}
    feeds = {"x": weight(5, 8), "k": weight(8, 8, seed=3)}
    np.testing.assert_array_equal(run(made.path, feeds)["z"], run(made.model, feeds)["z"])


CAPTURE = """net (float[1,4,8,8] x, bool p) => (float[a,b,c,d] y) {{
    c = Conv(x, w)
    r = Relu(c)
    d = Conv(r, v)
    i = If(p) <then_branch = a () => ({any} t) {{ t = Mul(r, r) }},
               else_branch = b () => ({any} e) {{ e = Identity({other}) }}>
    y = Conv(i, w)
}}"""


@pytest.mark.parametrize("other", ["r", "d", "x"])
@pytest.mark.parametrize("branch", [True, False])
def test_bodies_see_the_values_that_they_captured(other: str, branch: bool, tmp_path: Path) -> None:
    body = CAPTURE.format(any="float[1,4,8,8]", other=other)
    made = build(tmp_path, body, CONV, feeds={"p": np.asarray(branch)})
    assert list(made.forms().values()).count("static") >= 2
    assert made.sqnr_db > 30
    assert made.fused.integer_kernels["QLinearConv"] >= 2


@pytest.mark.parametrize("method", [STATIC, DYNAMIC, WEIGHT_ONLY])
def test_a_corrected_bias_is_used_in_every_form(method: Method, tmp_path: Path) -> None:
    body = "net (float[5,16] x) => (float[a,b] y) { y = Gemm<transB=1>(x, w, b) }"
    made = build(tmp_path, body, {"w": weight(12, 16), "b": weight(12)}, method=method)
    (name,) = (u.group.name for u in made.plan.groups)
    rounded = Rounder(made.model)(made.plan)[name]
    assert rounded.bias is not None
    moved = {name: Rounded(rounded.integers, rounded.bias + 1)}
    feeds = {"x": weight(5, 16, seed=8)}
    plain = run(made.quantized, feeds)["y"]
    np.testing.assert_allclose(
        run(apply_plan(made.model, made.plan, moved), feeds)["y"], plain + 1, atol=0.06
    )


@pytest.mark.parametrize("then", ["Relu(c)", "Clip(c, zero, six)"])
def test_an_implied_activation_is_gone_and_its_name_stays(then: str, tmp_path: Path) -> None:
    bounds = {"zero": f32(0), "six": f32(6)} if "Clip" in then else {}
    made = build(tmp_path, net(f"c = Conv(x, w) y = {then}"), {"w": CONV["w"]} | bounds)
    assert ops(made.quantized) == {"QuantizeLinear": 2, "DequantizeLinear": 3, "Conv": 1}
    values = run(made.path, {"x": weight(1, 4, 8, 8, scale=3)})["y"]
    assert values.min() == 0


def test_a_symmetric_scheme_clips_integers_and_is_right(tmp_path: Path) -> None:
    device = target(S8, symmetric=True)
    made = build(tmp_path, net("c = Conv(x, w) r = Relu(c) y = Conv(r, v)"), CONV, device=device)
    assert (ops(made.quantized)["Relu"], ops(made.quantized)["Clip"]) == (0, 1)
    assert made.sqnr_db > 30


def test_small_models_are_lean(tmp_path: Path) -> None:
    body = net(
        "c = Conv(x, w, b) m = MaxPool<kernel_shape=[2,2]>(c) t = Transpose<perm=[0,1,3,2]>(m) y = Conv(t, v)"
    )
    made = build(tmp_path, body, CONV | {"b": weight(4)})
    graph = onnx.ModelProto.FromString(made.path.read_bytes()).graph
    arrays = [onnx.numpy_helper.to_array(t) for t in graph.initializer]
    contents = Counter((a.dtype.str, a.shape, a.tobytes()) for a in arrays)
    assert set(contents.values()) == {1}, "equal constants are one"
    weights_restored = [n for n in graph.node if n.op_type == "DequantizeLinear" and len(n.input) == 2]
    assert len(weights_restored) == 3, "w, b and v need no zero point"
    emitted = {name for n in graph.node for name in n.output if name.rsplit("_", 1)[-1] in ("q", "dq")}
    assert {v.name for v in graph.value_info}.isdisjoint(emitted | {t.name for t in graph.initializer})
    assert len({name for n in graph.node for name in n.output}) == sum(len(n.output) for n in graph.node)
    assert made.path.stat().st_size < 1800


def test_names_of_the_model_are_not_taken(tmp_path: Path) -> None:
    body = net("x_q = Conv(x, w) x_dq = Relu(x_q) x_s = Sigmoid(x_dq) y = Conv(x_s, v)")
    made = build(tmp_path, body, CONV)
    names = [v.name for n in made.quantized.graph for v in n.outputs]
    assert len(names) == len(set(names))
    assert "x_dq_1" in names
    assert made.sqnr_db > 33


def test_the_emitter_shares_by_content_and_keeps_types_apart() -> None:
    graph = parse("net (float[2] x) => (float[2] y) { y = Relu(x) }").graph
    emit = Emitter(graph)
    one = emit.initializer("a", np.zeros((2, 2), np.int8))
    assert emit.initializer("b", np.zeros((2, 2), np.int8)) is one
    assert emit.initializer("a", np.zeros((2, 2), np.uint8)).name == "a_1"
    assert emit.initializer("a", np.zeros(4, np.int8)).name == "a_2"
    assert emit.initializer("c", f32(0)) is not emit.initializer("d", f32([0]))
    params = QuantParams(QuantType.INT8, f32([1, 2]), np.zeros(2, np.int8), axis=0)
    assert len(emit.restore(one, params, "a").inputs) == 2
    assert emit.restore(one, params, "a").attributes.get_int("axis", 1) == 0
    along_one = QuantParams(QuantType.INT8, f32([1, 2]), np.zeros(2, np.int8), axis=1)
    assert "axis" not in emit.restore(one, along_one, "a").attributes


def test_a_dead_network_is_still_a_network(tmp_path: Path) -> None:
    zeros = np.zeros((4, 4, 1, 1), np.float32)
    made = build(
        tmp_path,
        net("c = Conv(x, w, b) r = Relu(c) y = Conv(r, v)"),
        {"w": zeros, "b": f32([0] * 4), "v": zeros},
    )
    values = run(made.path, {"x": weight(1, 4, 8, 8)})["y"]
    assert np.array_equal(values, np.zeros_like(values))


def test_a_pool_without_weights_is_left_alone(tmp_path: Path) -> None:
    made = build(tmp_path, net("y = MaxPool<kernel_shape=[2,2]>(x)"), {})
    assert ops(made.quantized) == {"MaxPool": 1}
    assert made.sqnr_db == np.inf


def test_a_table_read_twice(tmp_path: Path) -> None:
    body = (
        "net (int64[3] i, int64[2] j) => (float[a,b] y, float[c,d] z) { y = Gather(t, i) z = Gather(t, j) }"
    )
    made = build(tmp_path, body, {"t": weight(20, 8)}, feeds={"i": i64([1, 2, 3]), "j": i64([7, 0])})
    assert [
        t.size for v in made.quantized.graph.initializers.values() if (t := v.const_value) and t.size > 8
    ] == [160]
    assert made.sqnr_db > 42


@pytest.mark.parametrize("granularity", list(Granularity))
def test_a_tied_table_that_is_a_weight_too(granularity: Granularity, tmp_path: Path) -> None:
    body = "net (int64[3] i) => (float[a,b] y) { e = Gather(t, i) r = Tanh(e) y = Gemm<transB=1>(r, t) }"
    made = build(
        tmp_path,
        body,
        {"t": weight(20, 8)},
        feeds={"i": i64([1, 2, 3])},
        device=target(granularity=granularity),
    )
    assert made.forms()["e"] == "weight_only"
    assert made.forms()["y"] == "static"
    assert made.sqnr_db > 34


@pytest.mark.parametrize("method", [FLOAT, WEIGHT_ONLY])
@pytest.mark.parametrize("granularity", list(Granularity))
def test_a_float_gemm_behind_a_table(granularity: Granularity, method: Method, tmp_path: Path) -> None:
    """The DequantizeLinear of a table states no zero point, and is a trap like any other."""
    body = "net (int64[3] i) => (float[a,b] y) { e = Gather(t, i) d = Gemm(e, u, b) y = Gemm(d, v) }"
    weights = {"t": weight(20, 8), "u": weight(8, 6), "b": weight(6), "v": weight(6, 3)}
    made = build(
        tmp_path,
        body,
        weights,
        feeds={"i": i64([1, 2, 3])},
        method={"d": method},
        device=target(granularity=granularity),
    )
    assert made.fused.integer_kernels == {"QGemm": 1}
    assert made.sqnr_db > 33


@pytest.mark.parametrize("activation", [U8, S8])
@pytest.mark.parametrize(
    "then, bounds",
    [
        ("Relu(c)", {}),
        ("Clip(c, lo, hi)", {"lo": f32(-1), "hi": f32(2)}),
        ("Clip(c, lo)", {"lo": f32(-0.5)}),
    ],
)
@pytest.mark.parametrize("main", ["Conv(x, w)", "Add(p, q)"])
def test_an_activation_that_saturation_does_not_imply_clips_integers(
    main: str, then: str, bounds: dict[str, Array], activation: QuantType, tmp_path: Path
) -> None:
    """In float it would keep the runtime from making an integer kernel of what is before it."""
    sides = "p = Conv(x, w) q = Conv(x, v)" if main.startswith("Add") else ""
    body = net(f"{sides} c = {main} r = {then} y = Conv(r, v)", f"{ANY} y, {ANY} r")
    made = build(tmp_path, body, CONV | bounds, device=target(activation, symmetric=True))
    assert made.fused.integer_kernels == {"QLinearConv": 2, "Clip": 1} | (
        {"QLinearConv": 3, "QLinearAdd": 1} if sides else {}
    )
    assert made.fused.float_operators == {}
    assert made.sqnr_db > 32
    got = run(made.path, {"x": weight(1, 4, 8, 8, scale=3)})["r"]
    low = float(bounds.get("lo", f32(0)))
    assert got.min() == pytest.approx(low, abs=0.02)
    assert "hi" not in bounds or got.max() == pytest.approx(2, abs=0.02)


@pytest.mark.parametrize("low, high", [(0.5, 6), (-6, -0.5), (1, -1)])
def test_a_clip_to_one_side_of_zero(low: float, high: float, tmp_path: Path) -> None:
    bounds = {"lo": f32(low), "hi": f32(high)}
    made = build(tmp_path, net("c = Conv(x, w) r = Clip(c, lo, hi) y = Conv(r, v)"), CONV | bounds)
    assert made.fused.integer_kernels == {"QLinearConv": 2, "Clip": 1}
    assert made.sqnr_db > 33


@pytest.mark.parametrize("sizes", ["2,4,8", "n,t,8"])
@pytest.mark.parametrize("method", [DYNAMIC, FLOAT])
def test_a_sum_before_a_layer_normalization_is_not_fused_with_it(
    method: Method, sizes: str, tmp_path: Path
) -> None:
    """SkipLayerNormalization takes six times as long on the CPU, and comes where the shapes are known."""
    body = f"""net (float[{sizes}] x) => (float[{sizes}] y) {{
        p = MatMul(x, w) s = Add(p, x) n = LayerNormalization<axis = -1>(s, g, b) y = MatMul(n, v)
    }}"""
    weights = {"w": weight(8, 8), "v": weight(8, 8, seed=3), "g": weight(8), "b": weight(8)}
    feeds = {"x": np.asarray(np.random.default_rng(0).normal(size=(2, 4, 8)), np.float32)}
    made = build(tmp_path, body, weights, feeds=feeds, method=method)
    assert made.fused.float_operators["LayerNormalization"] == 1
    assert "SkipLayerNormalization" not in made.fused.float_operators
    assert made.sqnr_db > (30 if method is DYNAMIC else 120)
    plain = what_the_runtime_did(tmp_path / "float.onnx", Runtime()).float_operators
    assert plain["SkipLayerNormalization"] == 1, "the runtime has changed: the Sum is needed no more"


@pytest.mark.parametrize("granularity", list(Granularity))
def test_rows_of_a_table_are_restored_by_what_is_quick(granularity: Granularity, tmp_path: Path) -> None:
    body = "net (int64[3] i) => (float[a,b] y) { y = Gather(t, i) }"
    made = build(
        tmp_path,
        body,
        {"t": weight(20, 8)},
        feeds={"i": i64([1, 2, 3])},
        method=WEIGHT_ONLY,
        device=target(granularity=granularity),
    )
    restored = {"Cast", "Mul"} if granularity is Granularity.PER_CHANNEL else {"DequantizeLinear"}
    assert set(ops(made.quantized)) == {"Gather"} | restored
    assert made.sqnr_db > 38
