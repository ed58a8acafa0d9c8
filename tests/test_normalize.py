import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_models import Array, batch_norm, conv_net, difference, f32, i64, ops, parse, randoms, run

from edgepack.errors import ModelError
from edgepack.model import fingerprint, load_model, save_model, set_constant
from edgepack.normalize import NormalizeNotes, normalize

HERE = Path(__file__).parent
TOLERANCE = 2e-6


def check(
    model: ir.Model, feeds: dict[str, Array], *, min_opset: int = 13, tolerance: float = TOLERANCE
) -> tuple[ir.Model, NormalizeNotes]:
    """Normalize and compare outputs with the original's; also: deterministic, idempotent, valid, pure."""
    before, signature = fingerprint(model), _signature(model)
    normal, notes = normalize(model, min_opset=min_opset, max_opset=21)
    assert fingerprint(model) == before
    assert _signature(normal) == signature
    onnx.checker.check_model(ir.to_proto(normal), full_check=True)
    assert difference(run(model, feeds, optimize=False), run(normal, feeds)) <= tolerance
    again, _ = normalize(model, min_opset=min_opset, max_opset=21)
    assert fingerprint(again) == fingerprint(normal)
    twice, notes_twice = normalize(normal, min_opset=min_opset, max_opset=21)
    assert fingerprint(twice) == fingerprint(normal), notes_twice
    return normal, notes


def _signature(model: ir.Model) -> list[tuple[str | None, object]]:
    fed = [v for v in model.graph.inputs if not v.is_initializer()]
    return [(v.name, v.dtype) for v in (*fed, *model.graph.outputs)]


def refusals(notes: NormalizeNotes) -> dict[str, str]:
    return {r.rule: r.reason for r in notes.refused}


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
        assert ops(normal) == {"MatMul": 1}
        assert all(v.dtype == normal.graph.inputs[0].dtype for v in normal.graph.initializers.values())


def test_an_overflowing_constant_is_not_folded() -> None:
    body = "net (float[n, 4] x) => (float[n, 4] y) { a = Div (x, s)  y = Relu (a) }"
    for number in (1e-42, 0.0, 3e38):  # the reciprocal is infinite, or too small to be exact
        model = parse(body, weights={"s": f32(number)})
        assert ops(normalize(model, min_opset=13, max_opset=21)[0])["Div"] == 1


# --- what has more than one user -----------------------------------------------------------------------


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
def test_values_captured_by_a_body_are_not_folded(condition: bool) -> None:
    model = parse(CAPTURED, weights={**randoms(w=(3, 3, 1, 1), s=(3, 1, 1)), **batch_norm("bn", 3)})
    feeds = {**randoms(x=(2, 3, 4, 4)), "c": np.asarray(condition)}
    normal, notes = check(model, feeds)
    # The body's Conv took the BatchNormalization there; the outer Conv feeds two graphs and stays.
    assert ops(normal) == {"Conv": 2, "Mul": 2, "If": 1}
    assert notes.applied["drop_no_op"] == 1 and notes.applied["lift_constant"] == 1


def test_a_body_that_returns_an_outer_value_through_identity() -> None:
    body = """net (bool c, float[n] x) => (float[n] y) {
        r = Relu (x)
        y = If (c) <
            then_branch = yes () => (float[n] t) { t = Identity (r) },
            else_branch = no () => (float[n] e) { e = Identity (x) }>
    }"""
    for condition in (True, False):
        normal, _ = check(parse(body), {**randoms(x=(3,)), "c": np.asarray(condition)})
        assert ops(normal)["Identity"] == 2  # a body's output must be made in the body


# --- padding -------------------------------------------------------------------------------------------


def test_padding_computed_in_the_graph_goes_into_conv() -> None:
    """As PyTorch writes dynamic "same" padding: sizes by Shape, pads by Concat, Reshape, Slice, Transpose."""
    body = """net (float[n, 3, 7, 7] x) => (float[n, 2, 4, 4] y) {
        s = Shape (x)
        i = Constant <value = int64 {2}> ()
        h = Gather <axis = 0> (s, i)
        two = Constant <value = int64 {2}> ()
        r = Mod (h, two)
        zero = Constant <value = int64[1] {0}> ()
        l = Unsqueeze (r, zero)
        z = Constant <value = int64[2] {0, 0}> ()
        p = Concat <axis = 0> (z, l, l, z, l, l)
        q = Pad (x, p)
        y = Conv <strides = [2, 2], pads = [0, 0, 0, 0]> (q, w)
    }"""
    normal, notes = check(parse(body, weights=randoms(w=(2, 3, 3, 3))), randoms(x=(2, 3, 7, 7)))
    assert ops(normal) == {"Conv": 1} and notes.applied["fold_pad"] == 1
    assert list(normal.graph[0].attributes["pads"].as_ints()) == [1, 1, 1, 1]


PADS = [
    ("Pad (x, p)", [0, 0, 1, 2, 0, 0, 0, 1], "Conv <pads = [1, 0, 0, 1]>", True),
    ("Pad (x, p)", [0, 0, 1, 1, 0, 0, 1, 1], "AveragePool <kernel_shape = [3, 3]>", True),
    ("Pad (x, p)", [0, 0, 1, 1, 0, 0, 1, 1], "AveragePool <kernel_shape = [3, 3], ceil_mode = 1>", False),
    (
        "Pad (x, p)",
        [0, 0, 1, 1, 0, 0, 1, 1],
        "AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]>",
        False,
    ),
    ("Pad (x, p)", [0, 0, 1, 1, 0, 0, 1, 1], "MaxPool <kernel_shape = [3, 3]>", False),
    ("Pad (x, p, one)", [0, 0, 1, 1, 0, 0, 1, 1], "Conv", False),
    ("Pad (x, p, none)", [0, 0, 1, 1, 0, 0, 1, 1], 'Conv <auto_pad = "VALID">', True),
    ('Pad <mode = "reflect"> (x, p)', [0, 0, 1, 1, 0, 0, 1, 1], "Conv", False),
    ("Pad (x, p)", [0, 0, -1, 0, 0, 0, 0, -1], "Conv", False),
    ("Pad (x, p)", [0, 0, 0, 0, 1, 0, 0, 0], "Conv", False),
    ("Pad (x, p)", [0, 0, 0, 0, 0, 0, 0, 0], "MaxPool <kernel_shape = [3, 3]>", True),
    ("Pad (x, p, none, axes)", [1, 2, 0, 1], "Conv", True),
]


@pytest.mark.parametrize(("pad", "amounts", "then", "folded"), PADS)
def test_padding(pad: str, amounts: list[int], then: str, folded: bool) -> None:
    op, _, attributes = then.partition(" ")
    arguments = "p1, w" if op == "Conv" else "p1"
    body = f"""net (float[n, 2, 6, 6] x) => (float[a, b, c, d] y) {{
        p1 = {pad}
        y = {op} {attributes} ({arguments})
    }}"""
    weights = {**randoms(w=(3, 2, 3, 3)), "p": i64(amounts), "one": f32(1), "none": f32(0)}
    model = parse(body, opset=18, weights={**weights, "axes": i64([-2, 3])})
    normal, _ = check(model, randoms(x=(2, 2, 6, 6)))
    assert (ops(normal)["Pad"] == 0) == folded


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("size", [7, 8])
def test_automatic_padding_becomes_numbers(mode: str, size: int) -> None:
    body = f"""net (float[n, 2, {size}, {size}] x) => (float[a, b, c, d] y) {{
        c1 = Conv <auto_pad = "{mode}", strides = [2, 2], kernel_shape = [3, 3]> (x, w)
        y = MaxPool <auto_pad = "{mode}", kernel_shape = [2, 2]> (c1)
    }}"""
    normal, _ = check(parse(body, weights=randoms(w=(3, 2, 3, 3))), randoms(x=(2, 2, size, size)))
    assert not any("auto_pad" in node.attributes for node in normal.graph)


# --- activations ---------------------------------------------------------------------------------------

HARD_SWISH = [
    "a = Add (x, three)  c = Clip (a, zero, six)  m = Mul (x, c)  y = Div (m, six)",
    "a = Add (three, x)  c = Clip (a, zero, six)  d = Div (c, six)  y = Mul (d, x)",
    "a = Add (x, three)  c = Clip (a, zero, six)  m = Mul (c, x)  y = Mul (sixth, m)",
    "h = HardSigmoid <alpha = 0.16666667, beta = 0.5> (x)  y = Mul (x, h)",
]
NUMBERS = {name: f32(n) for name, n in {"three": 3, "zero": 0, "six": 6, "sixth": 1 / 6}.items()}


@pytest.mark.parametrize("nodes", HARD_SWISH)
def test_hard_swish(nodes: str) -> None:
    model = parse(f"net (float[n, 4] x) => (float[n, 4] y) {{ {nodes} }}", opset=12, weights=NUMBERS)
    normal, notes = check(model, {"x": np.linspace(-5, 5, 40, dtype=np.float32).reshape(10, 4)})
    assert ops(normal) == {"HardSwish": 1} and notes.opset_after == 14


@pytest.mark.parametrize(
    "nodes",
    [
        "a = Add (x, six)  c = Clip (a, zero, six)  m = Mul (x, c)  y = Div (m, six)",
        "a = Add (x, three)  c = Clip (a, three, six)  m = Mul (x, c)  y = Div (m, six)",
        "a = Add (x, three)  c = Clip (a, zero, six)  m = Mul (a, c)  y = Div (m, six)",
        "a = Add (x, three)  c = Clip (a, zero, six)  m = Mul (x, c)  y = Div (m, three)",
        "h = HardSigmoid (x)  y = Mul (x, h)",
    ],
)
def test_what_only_looks_like_hard_swish(nodes: str) -> None:
    model = parse(f"net (float[n, 4] x) => (float[n, 4] y) {{ {nodes} }}", opset=12, weights=NUMBERS)
    normal, notes = check(model, {"x": np.linspace(-5, 5, 40, dtype=np.float32).reshape(10, 4)})
    assert ops(normal)["HardSwish"] == 0 and notes.opset_after == 13


def test_hard_swish_needs_opset_14() -> None:
    model = parse(f"net (float[n, 4] x) => (float[n, 4] y) {{ {HARD_SWISH[0]} }}", opset=12, weights=NUMBERS)
    normal, notes = normalize(model, min_opset=13, max_opset=13)
    assert notes.opset_after == 13 and ops(normal) == {"Add": 1, "Clip": 1, "Mul": 2}


def test_hard_sigmoid_alone() -> None:
    nodes = "a = Add (x, three)  c = Clip (a, zero, six)  y = Div (c, six)"
    model = parse(f"net (float[n, 4] x) => (float[n, 4] y) {{ {nodes} }}", weights=NUMBERS)
    normal, _ = check(model, {"x": np.linspace(-5, 5, 40, dtype=np.float32).reshape(10, 4)})
    assert ops(normal) == {"HardSigmoid": 1}


# --- what does nothing ---------------------------------------------------------------------------------

NOTHING = [
    "y = Identity (r)",
    "y = Dropout (r)",
    "y = Cast <to = 1> (r)",
    "y = Transpose <perm = [0, 1, 2]> (r)",
    "y = Concat <axis = 1> (r)",
    "y = Mul (r, ones)",
    "y = Sub (r, zeros)",
    "y = Reshape (r, shape)",
    "y = Expand (r, shape)",
    "y = Pad (r, nopads)",
    "y = Slice (r, starts, ends)",
    "t = Transpose <perm = [2, 0, 1]> (r)  y = Transpose <perm = [1, 2, 0]> (t)",
    "f = Flatten (r)  y = Reshape (f, shape)",
    "z = Relu (r)  y = Clip (z, zeros1)",
]
NEUTRAL = {
    "ones": np.ones((1, 3, 4), np.float32),
    "zeros": np.zeros(4, np.float32),
    "zeros1": f32(0),
    "shape": i64([2, 3, 4]),
    "nopads": np.zeros(6, np.int64),
    "starts": i64([0, 0]),
    "ends": i64([2**62, 3]),
}


@pytest.mark.parametrize("nodes", NOTHING)
def test_nodes_that_do_nothing_go(nodes: str) -> None:
    body = f"net (float[2, 3, 4] x) => (float[2, 3, 4] y) {{ r = Relu (x)  {nodes} }}"
    normal, _ = check(parse(body, weights=NEUTRAL), randoms(x=(2, 3, 4)))
    assert ops(normal) == {"Relu": 1}


SOMETHING = [
    "y = Slice (r, ends2, starts2, axis, minus)",
    "y = Mul (r, bigger)",
    "y = Transpose <perm = [1, 0, 2]> (r)",
    "y = Cast <to = 11> (r)",
    "y = Dropout (r, half, yes)",
]


@pytest.mark.parametrize("nodes", SOMETHING)
def test_nodes_that_do_something_stay(nodes: str) -> None:
    kind = "double" if "Cast" in nodes else "float"
    body = f"net (float[2, 2, 1] x) => ({kind}[a, b, c] y) {{ r = Relu (x)  {nodes} }}"
    weights = {
        "bigger": np.ones((1, 4), np.float32),
        "ends2": i64([1]),
        "starts2": i64([-3]),
        "axis": i64([0]),
        "minus": i64([-1]),
        "half": f32(0.5),
        "yes": np.asarray(True),
    }
    model = parse(body, weights=weights)
    normal, _ = normalize(model, min_opset=13, max_opset=21)
    assert sum(ops(normal).values()) == 2
    if "Dropout" not in nodes:
        check(model, randoms(x=(2, 2, 1)))


def test_outputs_keep_their_names() -> None:
    body = """net (float[n] x) => (float[n] y, float[n] z, float[n] u, float[n] v) {
        y = Identity (x)
        r = Relu (x)
        z = Identity (r)
        u = Identity (r)
        v = Identity (u)
    }"""
    normal, _ = check(parse(body), randoms(x=(3,)))
    assert [v.name for v in normal.graph.outputs] == ["y", "z", "u", "v"] and ops(normal)["Relu"] == 1


def test_an_output_that_is_constant() -> None:
    body = """net (float[n] x) => (float[n] y, float[2] z) {
        y = Relu (x)
        c = Constant <value = float[2] {1.0, 2.0}> ()
        z = Neg (c)
    }"""
    normal, _ = check(parse(body), randoms(x=(3,)))
    assert [v.name for v in normal.graph.outputs] == ["y", "z"]


def test_shapes_that_only_copy_dimensions_become_constant() -> None:
    body = """net (float[n, l, 8] x) => (float[n, l, 2, 4] y, float[n, k] z) {
        s = Shape (x)
        zero = Constant <value = int64 {0}> ()
        one = Constant <value = int64 {1}> ()
        axis = Constant <value = int64[1] {0}> ()
        a = Gather (s, zero)
        b = Gather (s, one)
        a1 = Unsqueeze (a, axis)
        b1 = Unsqueeze (b, axis)
        heads = Constant <value = int64[2] {2, 4}> ()
        shape = Concat <axis = 0> (a1, b1, heads)
        y = Reshape (x, shape)
        all = Constant <value = int64[1] {-1}> ()
        flat = Concat <axis = 0> (a1, all)
        z = Reshape (y, flat)
    }"""
    normal, notes = check(parse(body), randoms(x=(2, 5, 8)))
    assert ops(normal) == {"Reshape": 2} and notes.applied["constant_reshape"] == 2


def test_a_shape_that_swaps_dimensions_is_not_a_copy() -> None:
    body = """net (float[n, l] x) => (float[l, n] y) {
        s = Shape (x)
        ten = Constant <value = int64[2] {1, 0}> ()
        t = Gather (s, ten)
        y = Reshape (x, t)
    }"""
    check(parse(body), randoms(x=(2, 5)))


# --- what exporters write ------------------------------------------------------------------------------

EXPORTS = {
    "cnn_script": ((3, 3, 16, 16), {"HardSwish": 1, "BatchNormalization": 0, "Pad": 0, "Conv": 3}),
    "cnn_dynamo": ((3, 3, 16, 16), {"HardSwish": 1, "BatchNormalization": 0, "Pad": 0, "Conv": 3}),
    "attention_script": ((3, 7, 16), {"Erf": 1, "MatMul": 6, "Shape": 0, "Concat": 0}),
    "attention_dynamo": ((3, 7, 16), {"Gelu": 1, "MatMul": 6, "Shape": 0, "Concat": 0}),
    "lstm_script": ((3, 7, 4), {"LSTM": 1, "Gemm": 1}),
    "lstm_dynamo": ((3, 7, 4), {"LSTM": 1, "Gemm": 1}),
    "mlp_script": ((3, 4), {"Gemm": 2, "Relu": 1, "Mul": 0, "Sub": 0, "Div": 0}),
    "mlp_dynamo": ((3, 4), {"Gemm": 2, "Relu": 1, "Mul": 0, "Sub": 0, "Div": 0}),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_pytorch_exports(name: str) -> None:
    shape, expected = EXPORTS[name]
    normal, _ = check(load_model(HERE / "exports" / f"{name}.onnx"), randoms(x=shape))
    assert {op: ops(normal)[op] for op in expected} == expected


def test_paddle_style_weights_in_constant_nodes() -> None:
    model = conv_net()
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        assert tensor is not None
        node = ir.node("Constant", [], attributes={"value": tensor})
        node.outputs[0].name = f"{value.name}_c"
        model.graph.insert_before(model.graph[0], node)
        value.replace_all_uses_with(node.outputs[0])
        del model.graph.initializers[value.name or ""]
    normal, notes = check(model, randoms(x=(2, 3, 8, 8)))
    assert ops(normal)["Constant"] == ops(normal)["BatchNormalization"] == 0
    assert notes.applied["lift_constant"] == 9


def test_tf2onnx_style() -> None:
    """NHWC outside, NCHW inside; the same weights twice; weights among the inputs; Reshape by constant."""
    inputs = "float[n, 8, 8, 3] x, float[3, 3, 1, 1] w, float[3, 1, 1] s, int64[2] flat"
    nodes = """{
        t = Transpose <perm = [0, 3, 1, 2]> (x)
        c = Conv (t, w)
        m = Mul (c, s)
        u = Transpose <perm = [0, 2, 3, 1]> (m)
        v = Transpose <perm = [0, 3, 1, 2]> (u)
        r = Relu (v)
        d = Conv (r, w)
        b = Transpose <perm = [0, 2, 3, 1]> (d)
        f = Reshape (b, flat)
        g = MatMul (f, k)
        y = Add (g, bias)
    }"""
    weights = {**randoms(w=(3, 3, 1, 1), s=(3, 1, 1), k=(192, 5), bias=(5,)), "flat": i64([-1, 192])}
    model = parse(f"net ({inputs}) => (float[n, 5] y) {nodes}", opset=13, weights=weights)
    assert len(model.graph.inputs) == 4
    normal, notes = check(model, randoms(x=(2, 8, 8, 3)))
    assert [v.name for v in normal.graph.inputs] == ["x"] and notes.applied["initializers_from_inputs"] == 1
    assert ops(normal) == {"Transpose": 2, "Conv": 2, "Relu": 1, "Reshape": 1, "Gemm": 1}


OLD = {
    7: """net (float[2, 3, 4, 4] x) => (float[2, 6, 8, 8] y) {
        c = Conv <pads = [1, 1, 1, 1], kernel_shape = [3, 3]> (x, w)
        b = BatchNormalization (c, bn_scale, bn_bias, bn_mean, bn_var)
        k = Clip <min = 0.0, max = 6.0> (b)
        d = Dropout (k)
        y = Upsample <mode = "nearest", scales = [1.0, 1.0, 2.0, 2.0]> (d)
    }""",
    9: """net (float[2, 3, 4, 4] x) => (float[2, 6, 7, 7] y) {
        c = Conv <pads = [1, 1, 1, 1], kernel_shape = [3, 3]> (x, w)
        b = BatchNormalization (c, bn_scale, bn_bias, bn_mean, bn_var)
        u = Upsample <mode = "linear"> (b, scales)
        y = Slice <axes = [2, 3], starts = [0, 0], ends = [7, 7]> (u)
    }""",
    10: """net (float[2, 3, 4, 4] x) => (float[2, 6, 4, 4] y, int64[2, 6, 4, 2] i) {
        c = Conv <pads = [1, 1, 1, 1], kernel_shape = [3, 3]> (x, w)
        b = BatchNormalization (c, bn_scale, bn_bias, bn_mean, bn_var)
        y = LeakyRelu (b)
        t, i = TopK <axis = 3> (y, two)
    }""",
    11: """net (float[2, 3, 4, 4] x) => (float[2, 6] y, float[2, 1, 6] z) {
        c = Conv <pads = [1, 1, 1, 1], kernel_shape = [3, 3]> (x, w)
        b = BatchNormalization (c, bn_scale, bn_bias, bn_mean, bn_var)
        r = ReduceSum <axes = [2, 3], keepdims = 0> (b)
        u = Unsqueeze <axes = [1]> (r)
        p, q = Split <axis = 2, split = [2, 4]> (u)
        z = Concat <axis = 2> (p, q)
        s = Squeeze <axes = [1]> (z)
        y = LogSoftmax (s)
    }""",
}


SIX = """net (float[2, 3, 4, 4] x) => (float[2, 6] y) {
    c = Conv <pads = [1, 1, 1, 1], kernel_shape = [3, 3]> (x, w)
    b = BatchNormalization <is_test = 1> (c, bn_scale, bn_bias, bn_mean, bn_var)
    k = Clip <min = 0.0, max = 6.0> (b)
    p = Pad <pads = [0, 0, 1, 1, 0, 0, 1, 1], mode = "constant", value = 0.0> (k)
    a = AveragePool <kernel_shape = [6, 6]> (p)
    d = Dropout <is_test = 1> (a)
    f = Flatten (d)
    s = Mul <broadcast = 1, axis = 1> (f, v)
    y = Softmax (s)
}"""
THIRTEEN = """net (float[2, 3, 4, 4] x) => (float[2, 6] y) {
    c = Conv <pads = [1, 1, 1, 1], kernel_shape = [3, 3]> (x, w)
    b = BatchNormalization (c, bn_scale, bn_bias, bn_mean, bn_var)
    zero = Constant <value = float {0.0}> ()
    six = Constant <value = float {6.0}> ()
    k = Clip (b, zero, six)
    a = AveragePool <kernel_shape = [6, 6], pads = [1, 1, 1, 1], count_include_pad = 1> (k)
    f = Flatten (a)
    s = Mul (f, v)
    y = Softmax (s)
}"""


def test_opset_6_which_the_runtime_no_longer_reads() -> None:
    weights = {**randoms(w=(6, 3, 3, 3), v=(6,)), **batch_norm("bn", 6)}
    old, new = parse(SIX, opset=6, weights=weights), parse(THIRTEEN, opset=13, weights=weights)
    normal, notes = normalize(old, min_opset=13, max_opset=21)
    feeds = randoms(x=(2, 3, 4, 4))
    assert difference(run(new, feeds), run(normal, feeds)) < TOLERANCE
    assert notes.opset_before == 6 and not {"BatchNormalization", "Pad", "Dropout"} & set(ops(normal))


@pytest.mark.parametrize("target", [13, 17, 21])
@pytest.mark.parametrize("opset", OLD)
def test_old_opsets(opset: int, target: int) -> None:
    weights = {
        **randoms(w=(6, 3, 3, 3)),
        **batch_norm("bn", 6),
        "scales": f32([1, 1, 2, 2]),
        "two": i64([2]),
    }
    used = {name: array for name, array in weights.items() if name in OLD[opset]}
    model = parse(OLD[opset], opset=opset, weights=used)
    normal, notes = check(model, randoms(x=(2, 3, 4, 4)), min_opset=target)
    assert notes.opset_before == opset and notes.opset_after == target
    assert not {"BatchNormalization", "Dropout", "Constant", "Upsample"} & set(ops(normal))


def test_softmax_over_several_axes_keeps_its_meaning() -> None:
    body = """net (float[2, 3, 4] x) => (float[2, 3, 4] y, float[2, 3, 4] z) {
        y = Softmax (x)
        z = Softmax <axis = -1> (x)
    }"""
    normal, _ = check(parse(body, opset=11), randoms(x=(2, 3, 4)))
    assert ops(normal)["Softmax"] == 2 and ops(normal)["Flatten"] == 1


def test_bodies_are_raised_too() -> None:
    body = """net (bool c, float[2, 3] x) => (float[2] y) {
        r = Relu (x)
        y = If (c) <
            then_branch = a () => (float[2] t) { s = ReduceSum <axes = [1], keepdims = 0> (r)  t = Neg (s) },
            else_branch = b () => (float[2] e) {
                u = Unsqueeze <axes = [0]> (r)
                v = Squeeze <axes = [0]> (u)
                w = Softmax (v)
                e = ReduceSum <axes = [1], keepdims = 0> (w)
            }>
    }"""
    for condition in (True, False):
        check(parse(body, opset=11), {**randoms(x=(2, 3)), "c": np.asarray(condition)})


def test_functions_are_inlined() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
    net (float[n, 3] x) => (float[n, 3] y) { a = my.twice (x)  y = Relu (a) }
    <domain: "my", opset_import: ["" : 17]>
    twice (p) => (q) { two = Constant <value = float {2.0}> ()  q = Mul (p, two) }"""
    normal, notes = check(ir.from_onnx_text(text), randoms(x=(2, 3)))
    assert ops(normal) == {"Mul": 1, "Relu": 1} and not normal.functions and notes.applied["inline"] == 1


def test_operators_of_the_runtime_stay_and_are_named() -> None:
    text = """<ir_version: 8, opset_import: ["" : 13, "com.microsoft" : 1]>
    net (float[n, 3] x) => (float[n, 3] y) {
        i = Identity (x)
        g = com.microsoft.Gelu (i)
        y = Identity (g)
    }"""
    normal, notes = check(ir.from_onnx_text(text), randoms(x=(2, 3)), min_opset=14)
    assert ops(normal) == {"Gelu": 1} and notes.unsupported == ("com.microsoft::Gelu",)


def test_external_data(tmp_path: Path) -> None:
    save_model(conv_net(), tmp_path / "a.onnx", external=True)
    normal, _ = check(load_model(tmp_path / "a.onnx"), randoms(x=(2, 3, 8, 8)))
    save_model(normal, tmp_path / "b.onnx", external=True)
    feeds = randoms(x=(2, 3, 8, 8))
    assert difference(run(conv_net(), feeds), run(tmp_path / "b.onnx", feeds)) < TOLERANCE


def test_equal_constants_and_nodes_are_merged() -> None:
    body = """net (float[n, 4] x) => (float[n, 4] y) {
        a = Relu (x)
        b = Relu (x)
        c = Gather <axis = 1> (a, i)
        d = Gather <axis = 1> (b, j)
        y = Sub (c, d)
    }"""
    model = parse(body, weights={"i": i64([3, 2, 1, 0]), "j": i64([3, 2, 1, 0])})
    normal, _ = check(model, randoms(x=(2, 4)))
    assert ops(normal) == {"Relu": 1, "Gather": 1, "Sub": 1} and len(normal.graph.initializers) == 1
    set_constant(model, "j", i64([0, 1, 2, 3]))
    normal, _ = check(model, randoms(x=(2, 4)))
    assert ops(normal) == {"Relu": 1, "Gather": 2, "Sub": 1}


def test_random_nodes_are_neither_folded_nor_merged() -> None:
    body = """net (float[2] x) => (float[2] y) {
        a = RandomNormal <shape = [2], seed = 1.0> ()
        b = RandomNormal <shape = [2], seed = 2.0> ()
        c = Sub (a, b)
        y = Add (x, c)
    }"""
    normal, _ = normalize(parse(body), min_opset=13, max_opset=21)
    assert ops(normal) == {"RandomNormal": 2, "Sub": 1, "Add": 1}


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


# --- limits --------------------------------------------------------------------------------------------


def test_too_new_for_the_runtime() -> None:
    with pytest.raises(ModelError, match=r"needs opset 17 .* up to 15: export it with opset 15"):
        normalize(conv_net(), min_opset=13, max_opset=15)


def test_no_standard_operators() -> None:
    text = '<ir_version: 8, opset_import: ["my" : 1]> net (float[n] x) => (float[n] y) { y = my.Op (x) }'
    with pytest.raises(ModelError, match="does not import the standard ONNX operators"):
        normalize(ir.from_onnx_text(text), min_opset=13, max_opset=21)


def test_an_invalid_model_is_reported() -> None:
    model = conv_net()
    next(n for n in model.graph if n.op_type == "Relu").op_type = "Rely"
    with pytest.raises(ModelError, match="Rely"):
        normalize(model, min_opset=13, max_opset=21)


def test_large_constants_are_not_multiplied() -> None:
    body = """net (float[n, 1000, 1000] x) => (float[n, 1000, 1000] y) {
        e = Expand (one, shape)
        y = Add (x, e)
    }"""
    model = parse(body, weights={"one": np.ones(1, np.float32), "shape": i64([1000, 1000])})
    normal, _ = normalize(model, min_opset=13, max_opset=21)
    sizes = [v.const_value.size for v in normal.graph.initializers.values() if v.const_value is not None]
    assert max(sizes, default=0) < 1000


# --- the suite of real models --------------------------------------------------------------------------

SUITE = os.environ.get("EDGEPACK_SUITE")
REAL: dict[str, Callable[[dict[str, int]], bool]] = {
    "dlrm_ml100k": lambda n: n["Gather"] == 16,
    "dscnn_fsdd": lambda n: n["Conv"] == 9,
    "efficientnet_lite0": lambda n: n["Conv"] == 49 and not n["Pad"] + n["Shape"] + n["Slice"] + n["Concat"],
    "fastestdet": lambda n: n["Conv"] == 70 and not n["Pad"],
    "minilm_sst2": lambda n: n["MatMul"] == 48 and n["Erf"] == 6 and n["Sqrt"] == 13,
    "ppocrv4_rec": lambda n: n["HardSwish"] == 28 and n["Div"] == n["Sqrt"] and not n["BatchNormalization"],
}


@pytest.mark.skipif(SUITE is None, reason="EDGEPACK_SUITE does not name the folder of real models")
@pytest.mark.parametrize("task", REAL)
def test_real_models(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert SUITE is not None
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(SUITE)
    import score  # type: ignore[import-not-found]  # from the suite, if there is one

    path = Path(SUITE) / task / "model.onnx"
    model = load_model(path)
    before, start = fingerprint(model), time.process_time()
    normal, notes = normalize(model, min_opset=13, max_opset=21)
    seconds = time.process_time() - start
    assert fingerprint(model) == before and notes.opset_after >= 13 and seconds < 6
    assert REAL[task](ops(normal))
    save_model(normal, tmp_path / "n.onnx")
    for feeds in score.feeds(task, "calib")[0][:3]:
        # ppocrv4_rec: onnxruntime's own optimizers change its output by 2e-4
        assert difference(run(path, feeds), run(tmp_path / "n.onnx", feeds)) < (
            2e-4 if task == "ppocrv4_rec" else 1e-5
        )
