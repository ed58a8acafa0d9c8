import numpy as np
import pytest
from support.normalizing import check, refusals
from support.onnx_models import batch_norm, conv_net, f32, ops, parse, randoms

from edgepack.graph.normalize import normalize

# --- folding into linear operators ---------------------------------------------------------------------


def test_batch_norm_into_conv_keeps_everything_else() -> None:
    normal, notes = check(conv_net(), randoms(x=(2, 3, 8, 8)))
    assert ops(normal)["BatchNormalization"] == 0 and notes.applied == {"fold_after": 1}
    assert (notes.nodes_before, notes.nodes_after) == (8, 7)


def test_batch_norm_into_grouped_conv_transpose() -> None:
    body = """net (float[n, 6, 4, 4] x) => (float[n, 4, 8, 8] y) {
        c = ConvTranspose <group = 2, strides = [2, 2], kernel_shape = [2, 2]> (x, w, b)
        y = BatchNormalization <epsilon = 0.01> (c, bn_scale, bn_bias, bn_mean, bn_var)
    }"""
    model = parse(body, weights={**randoms(w=(6, 2, 2, 2), b=(4,)), **batch_norm("bn", 4)})
    normal, _ = check(model, randoms(x=(2, 6, 4, 4)))
    assert ops(normal) == {"ConvTranspose": 1}


@pytest.mark.parametrize("gemm", ["alpha = 0.5, beta = 2.0", "transB = 1"])
def test_batch_norm_into_gemm(gemm: str) -> None:
    body = f"""net (float[n, 4] x) => (float[n, 3] y) {{
        g = Gemm <{gemm}> (x, w, b)
        y = BatchNormalization (g, bn_scale, bn_bias, bn_mean, bn_var)
    }}"""
    shape = (3, 4) if "transB" in gemm else (4, 3)
    model = parse(body, weights={**randoms(w=shape, b=(3,)), **batch_norm("bn", 3)})
    normal, _ = check(model, randoms(x=(5, 4)))
    assert ops(normal) == {"Gemm": 1}


def test_batch_norm_after_matmul_of_a_matrix_becomes_gemm() -> None:
    body = """net (float[n, 4] x) => (float[n, 3] y) {
        m = MatMul (x, w)
        a = Add (b, m)
        y = BatchNormalization (a, bn_scale, bn_bias, bn_mean, bn_var)
    }"""
    model = parse(body, weights={**randoms(w=(4, 3), b=(3,)), **batch_norm("bn", 3)})
    normal, notes = check(model, randoms(x=(5, 4)))
    assert ops(normal) == {"Gemm": 1} and notes.applied["matmul_add_to_gemm"] == 1


def test_batch_norm_of_another_axis_than_the_matmul_stays() -> None:
    body = """net (float[n, 3, 4] x) => (float[n, 3, 3] y) {
        m = MatMul (x, w)
        y = BatchNormalization (m, bn_scale, bn_bias, bn_mean, bn_var)
    }"""
    model = parse(body, weights={**randoms(w=(4, 3)), **batch_norm("bn", 3)})
    normal, notes = check(model, randoms(x=(2, 3, 4)))
    assert ops(normal)["BatchNormalization"] == 1
    assert refusals(notes) == {
        "fold_after": "its constant is not one number per output channel of the MatMul"
    }


def test_training_batch_norm_stays() -> None:
    body = """net (float[2, 3, 4, 4] x) => (float[2, 2, 4, 4] y) {
        c = Conv (x, w)
        y, mean, var = BatchNormalization <training_mode = 1> (c, bn_scale, bn_bias, bn_mean, bn_var)
    }"""
    model = parse(body, weights={**randoms(w=(2, 3, 1, 1)), **batch_norm("bn", 2)})
    normal, _ = normalize(model, min_opset=13, max_opset=21)
    assert ops(normal)["BatchNormalization"] == 1


AFTER_CONV = [
    ("m = Mul (c, s)  y = Add (m, t)", {"s": (4, 1, 1), "t": (1, 4, 1, 1)}),
    ("m = Sub (t, c)  y = Mul (s, m)", {"s": (1,), "t": (4, 1, 1)}),
    ("m = Sub (c, t)  y = Div (m, s)", {"s": (4, 1, 1), "t": ()}),
    ("y = Add (c, t)", {"t": (1, 1, 1)}),
]


@pytest.mark.parametrize(("tail", "shapes"), AFTER_CONV)
def test_constants_after_conv(tail: str, shapes: dict[str, tuple[int, ...]]) -> None:
    body = (
        f"net (float[n, 3, 5, 5] x) => (float[n, 4, 5, 5] y) {{ c = Conv <pads=[1,1,1,1]> (x, w)  {tail} }}"
    )
    weights = randoms(w=(4, 3, 3, 3), **shapes)
    normal, _ = check(parse(body, weights=weights), randoms(x=(2, 3, 5, 5)))
    assert ops(normal) == {"Conv": 1}


def test_a_constant_per_column_does_not_go_into_conv() -> None:
    body = "net (float[n, 3, 4, 4] x) => (float[n, 4, 4, 4] y) { c = Conv (x, w)  y = Mul (c, s) }"
    model = parse(body, weights=randoms(w=(4, 3, 1, 1), s=(4,)))  # 4 channels and 4 columns
    normal, notes = check(model, randoms(x=(1, 3, 4, 4)))
    assert ops(normal) == {"Conv": 1, "Mul": 1} and "fold_after" in refusals(notes)


def test_a_constant_that_adds_channels_or_dimensions_stays() -> None:
    for shape, out in {(4, 1, 1): "[n, 4, 4, 4]", (2, 1, 1, 1, 1): "[2, n, 1, 4, 4]"}.items():
        body = f"net (float[n, 3, 4, 4] x) => (float{out} y) {{ c = Conv (x, w)  y = Mul (c, s) }}"
        normal, _ = check(parse(body, weights=randoms(w=(1, 3, 1, 1), s=shape)), randoms(x=(2, 3, 4, 4)))
        assert ops(normal) == {"Conv": 1, "Mul": 1}


BEFORE = [  # a node before the linear one, the linear one, shapes of its constants, operators left
    ("Mul (x, s)", "Conv <pads=[1,1,1,1], group=2>", (6, 2, 3, 3), (4, 1, 1), {"Conv": 1}),
    ("Add (x, s)", "Conv <group=2>", (6, 2, 3, 3), (1, 4, 1, 1), {"Conv": 1}),
    ("Add (x, s)", "Conv <pads=[0,1,0,0]>", (6, 4, 3, 3), (4, 1, 1), {"Conv": 1, "Add": 1}),
    ("Add (x, s)", 'Conv <auto_pad="SAME_UPPER">', (6, 4, 3, 3), (), {"Conv": 1, "Add": 1}),
    ("Mul (x, s)", "ConvTranspose <group=2>", (4, 3, 2, 2), (4, 1, 1), {"ConvTranspose": 1}),
    ("Sub (s, x)", "ConvTranspose", (4, 3, 2, 2), (4, 1, 1), {"ConvTranspose": 1, "Sub": 1}),
    ("Div (x, s)", "Conv", (6, 4, 1, 1), (4, 1, 1), {"Conv": 1}),
    ("Mul (x, s)", "Conv", (6, 4, 1, 1), (5,), {"Conv": 1, "Mul": 1}),
]


@pytest.mark.parametrize(("before", "linear", "w", "s", "left"), BEFORE)
def test_constants_before(
    before: str, linear: str, w: tuple[int, ...], s: tuple[int, ...], left: dict[str, int]
) -> None:
    op, _, attributes = linear.partition(" ")
    body = f"""net (float[n, 4, 5, 5] x) => (float[n, c, h, k] y) {{
        p = {before}
        y = {op} {attributes} (p, w)
    }}"""
    normal, _ = check(parse(body, weights=randoms(w=w, s=s)), randoms(x=(2, 4, 5, 5)))
    assert ops(normal) == left


def test_a_constant_that_broadcasts_the_input_stays() -> None:
    body = "net (float[n, 1, 4, 4] x) => (float[n, 2, 4, 4] y) { p = Mul (x, s)  y = Conv (p, w) }"
    normal, _ = check(parse(body, weights=randoms(w=(2, 3, 1, 1), s=(3, 1, 1))), randoms(x=(2, 1, 4, 4)))
    assert ops(normal) == {"Mul": 1, "Conv": 1}


def test_scale_and_shift_before_padding_leave_an_addition() -> None:
    body = """net (float[n, 3, 5, 5] x) => (float[n, 4, 5, 5] y) {
        m = Mul (x, s)
        a = Add (m, t)
        y = Conv <pads = [1, 1, 1, 1]> (a, w)
    }"""
    weights = {**randoms(w=(4, 3, 3, 3), t=(3, 1, 1)), "s": f32([0.5, 2.0, -1.5]).reshape(3, 1, 1)}
    normal, _ = check(parse(body, weights=weights), randoms(x=(2, 3, 5, 5)))
    assert ops(normal) == {"Add": 1, "Conv": 1}
    zero = parse(body, weights={**weights, "s": f32([0.5, 0, 1]).reshape(3, 1, 1)})
    normal, notes = check(zero, randoms(x=(2, 3, 5, 5)))
    assert ops(normal) == {"Mul": 1, "Add": 1, "Conv": 1}
    assert refusals(notes) == {"fold_before": "a shift cannot pass the zero padding of the Conv"}


def test_scales_into_matmul_and_gemm() -> None:
    body = """net (float[n, 2, 4] x, float[n, 4] z) => (float[n, 2, 3] y, float[n, 3] u) {
        a = Mul (x, s)
        m = MatMul (a, w)
        b = Add (m, c)
        y = Div (b, eight)
        d = Sub (z, s)
        e = Mul (d, s)
        u = Gemm <alpha = 0.5> (e, w)
    }"""
    weights = {**randoms(w=(4, 3), s=(4,), c=(3,)), "eight": f32(8)}
    normal, _ = check(parse(body, weights=weights), randoms(x=(2, 2, 4), z=(3, 4)))
    assert ops(normal) == {"MatMul": 1, "Add": 1, "Gemm": 1}


def test_folding_in_double_and_half_precision() -> None:
    for kind, dtype, tolerance in (("double", np.float64, 1e-14), ("float16", np.float16, 4e-3)):
        body = f"net ({kind}[n, 4] x) => ({kind}[n, 3] y) {{ m = Mul (x, s)  y = MatMul (m, w) }}"
        weights = {name: array.astype(dtype) for name, array in randoms(w=(4, 3), s=(4,)).items()}
        feeds = {"x": randoms(x=(2, 4))["x"].astype(dtype)}
        normal, _ = check(parse(body, weights=weights), feeds, tolerance=tolerance)
        borders = {} if kind == "double" else {"Cast": 2}  # between them half precision is float32
        assert ops(normal) == {"MatMul": 1, **borders}


def test_an_overflowing_constant_is_not_folded() -> None:
    body = "net (float[n, 4] x) => (float[n, 4] y) { a = Div (x, s)  y = Relu (a) }"
    for number in (1e-42, 0.0, 3e38):  # the reciprocal is infinite, or too small to be exact
        model = parse(body, weights={"s": f32(number)})
        assert ops(normalize(model, min_opset=13, max_opset=21)[0])["Div"] == 1


# --- several consumers --------------------------------------------------------------------------------


def test_shared_weights_serve_both_users() -> None:
    body = """net (float[n, 3, 4, 4] x) => (float[n, 3, 4, 4] y, float[n, 3, 4, 4] z) {
        a = Conv (x, w, b)
        y = BatchNormalization (a, bn_scale, bn_bias, bn_mean, bn_var)
        c = Conv (x, w, b)
        d = Mul (c, b)
        z = Conv (d, w, b)
    }"""
    weights = {**randoms(w=(3, 3, 1, 1)), "b": randoms(b=(3,))["b"], **batch_norm("bn", 3)}
    body = body.replace("Mul (c, b)", "Mul (c, half)")
    model = parse(body, weights={**weights, "half": f32(0.5)})
    normal, _ = check(model, randoms(x=(2, 3, 4, 4)))
    assert ops(normal) == {"Conv": 3}


def test_a_value_that_is_an_output_or_has_other_users_is_not_folded() -> None:
    body = """net (float[n, 3, 4, 4] x) => (float[n, 3, 4, 4] y, float[n, 3, 4, 4] c, float[n, 3, 4, 4] z) {
        c = Conv (x, w)
        y = Mul (c, s)
        d = Conv (x, v)
        e = Mul (d, s)
        z = Sub (e, d)
    }"""
    model = parse(body, weights=randoms(w=(3, 3, 1, 1), v=(3, 3, 1, 1), s=(3, 1, 1)))
    normal, notes = check(model, randoms(x=(2, 3, 4, 4)))
    assert ops(normal) == {"Conv": 2, "Mul": 2, "Sub": 1}
    assert refusals(notes)["fold_after"] == "the Conv before it has other users"


CAPTURED = """net (bool c, float[n, 3, 4, 4] x) => (float[n, 3, 4, 4] y) {
    a = Conv (x, w)
    b = Mul (a, s)
    y = If (c) <
        then_branch = yes () => (float[n, 3, 4, 4] t) {
            k = Constant <value = float {2.0}> ()
            t = Mul (a, k)
        },
        else_branch = no () => (float[n, 3, 4, 4] e) {
            v = Conv (b, w)
            i = Identity (v)
            e = BatchNormalization (i, bn_scale, bn_bias, bn_mean, bn_var)
        }>
}"""


@pytest.mark.parametrize("condition", [True, False])
def test_values_captured_by_a_subgraph_are_not_folded(condition: bool) -> None:
    model = parse(CAPTURED, weights={**randoms(w=(3, 3, 1, 1), s=(3, 1, 1)), **batch_norm("bn", 3)})
    feeds = {**randoms(x=(2, 3, 4, 4)), "c": np.asarray(condition)}
    normal, notes = check(model, feeds)
    # BatchNormalization is folded into the Conv of the subgraph; the outer Conv has consumers in two graphs.
    assert ops(normal) == {"Conv": 2, "Mul": 2, "If": 1}
    assert notes.applied["drop_no_op"] == 1 and notes.applied["lift_constant"] == 1


def test_a_subgraph_that_returns_an_outer_value_through_identity() -> None:
    body = """net (bool c, float[n] x) => (float[n] y) {
        r = Relu (x)
        y = If (c) <
            then_branch = yes () => (float[n] t) { t = Identity (r) },
            else_branch = no () => (float[n] e) { e = Identity (x) }>
    }"""
    for condition in (True, False):
        normal, _ = check(parse(body), {**randoms(x=(3,)), "c": np.asarray(condition)})
        assert ops(normal)["Identity"] == 2  # a subgraph must compute its own outputs


# --- LayerNorm and GELU --------------------------------------------------------------------------------


def test_layer_norm_and_gelu_are_left_whole() -> None:
    body = """net (float[n, 8] x) => (float[n, 3] y) {
        mean = ReduceMean <axes = [1]> (x)
        d = Sub (x, mean)
        sq = Pow (d, two)
        v = ReduceMean <axes = [1]> (sq)
        ve = Add (v, eps)
        sd = Sqrt (ve)
        n1 = Div (d, sd)
        n2 = Mul (n1, gamma)
        n3 = Add (n2, beta)
        h = MatMul (n3, w1)
        e1 = Div (h, root)
        e2 = Erf (e1)
        e3 = Add (e2, one)
        e4 = Mul (h, e3)
        e5 = Mul (e4, half)
        y = MatMul (e5, w2)
    }"""
    numbers = {"two": 2, "eps": 1e-5, "root": 2**0.5, "one": 1, "half": 0.5}
    weights = {**randoms(w1=(8, 6), w2=(6, 3), gamma=(8,), beta=(8,))}
    model = parse(body, weights={**weights, **{name: f32(n) for name, n in numbers.items()}})
    normal, notes = check(model, randoms(x=(4, 8)))
    assert ops(normal) == ops(model)
    assert refusals(notes) == {
        "div_to_mul": "the runtime fuses it with the GELU after",
        "fold_after": "the MatMul before it has other users",
        "fold_before": "the runtime fuses it with the LayerNorm or GELU before",
    }
