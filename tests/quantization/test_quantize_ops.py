"""Every operator of the targets' kernel lists, quantized and run: right numbers, on the kernels planned.

Floors are what was measured, rounded down by about 1 dB: a form that loses more has become wrong.
"""

from pathlib import Path

import numpy as np
import pytest
from support.onnx_models import Array, f32, i64
from support.quantize_cases import GRANULARITIES, Case, check
from support.quantizing import DYNAMIC, FLOAT, S8, STATIC, U8, WEIGHT_ONLY, build, target, weight

from edgepack.ir.scheme import Granularity, QuantType
from edgepack.quantization.plan.types import Method

ACTIVATIONS = [U8, S8]


def conv(shape: str, *kernel: int, attributes: str = "", bias: bool = True, then: str = "") -> Case:
    weights = {"w": weight(*kernel)} | ({"b": weight(kernel[0], seed=5)} if bias else {})
    bounds = {"zero": f32(0), "six": f32(6), "minus": f32(-1), "one": f32(1)}
    weights |= {name: bound for name, bound in bounds.items() if name in then}
    dims = ",".join("abcde"[: len(kernel)])
    inner = "c" if then else "y"
    node = f"{inner} = Conv{attributes}(x, w{', b' * bias})"
    body = f"net (float[{shape}] x) => (float[{dims}] y) {{ {node} {then} }}"
    return Case(body, weights, {"QLinearConv": 1}, 33, weight_only_db=36)


CONVOLUTIONS = {
    "1-D": conv("1,4,16", 8, 4, 3, attributes="<pads=[1,1]>"),
    "2-D": conv("1,4,8,8", 8, 4, 3, 3),
    "3-D": conv("1,2,5,5,5", 4, 2, 3, 3, 3),
    "grouped": conv("1,8,8,8", 8, 4, 3, 3, attributes="<group=2>"),
    "depthwise": conv("1,8,8,8", 8, 1, 3, 3, attributes="<group=8,pads=[1,1,1,1]>"),
    "dilated": conv("1,4,9,9", 8, 4, 3, 3, attributes="<dilations=[2,2]>"),
    "same": conv("1,4,9,9", 8, 4, 3, 3, attributes='<auto_pad="SAME_UPPER",strides=[2,2]>'),
    "no bias": conv("1,4,8,8", 8, 4, 3, 3, bias=False),
    "Relu": conv("1,4,8,8", 8, 4, 3, 3, then="y = Relu(c)"),
    "Relu6": conv("1,4,8,8", 8, 4, 3, 3, then="y = Clip(c, zero, six)"),
    "Clip": conv("1,4,8,8", 8, 4, 3, 3, then="y = Clip(c, minus, one)"),
}


def gemm(trans_b: int, bias: Array | None = None) -> Case:
    weights = {"w": weight(12, 16) if trans_b else weight(16, 12)} | ({} if bias is None else {"b": bias})
    third = "" if bias is None else ", b"
    body = f"net (float[5,16] x) => (float[a,b] y) {{ y = Gemm<transB={trans_b}>(x, w{third}) }}"
    return Case(body, weights, {"QGemm": 1}, 38, 39, 41)


def matmul(shape: str, dims: str, k: int = 16) -> Case:
    body = f"net (float[{shape}] x) => (float[{dims}] y) {{ y = MatMul(x, w) }}"
    return Case(body, {"w": weight(k, 12)}, {"MatMulIntegerToFloat": 1}, 38, 38, 39)


PRODUCTS = {
    "Gemm": gemm(0),
    "Gemm transB": gemm(1),
    "Gemm bias [N]": gemm(0, weight(12, seed=3)),
    "Gemm transB bias [1, N]": gemm(1, weight(1, 12, seed=3)),
    "Gemm transB scalar bias": gemm(1, f32(0.7)),
    "Gemm square transB": Case(
        "net (float[5,16] x) => (float[a,b] y) { y = Gemm<transB=1>(x, w, b) }",
        {"w": weight(16, 16), "b": weight(16, seed=2)},
        {"QGemm": 1}, 38, 39, 41,
    ),
    "Gemm Relu Gemm": Case(
        "net (float[5,16] x) => (float[a,b] y) { c = Gemm<transB=1>(x, w, b) d = Relu(c) y = Gemm(d, v) }",
        {"w": weight(16, 16), "b": weight(16), "v": weight(16, 7, seed=2)},
        {"QGemm": 2}, 36, 37, 39,
    ),
    "MatMul": matmul("5,16", "a,b"),
    "MatMul of three dimensions": matmul("2,5,16", "a,b,c"),
    "MatMul with odd sizes": matmul("2,5,7", "a,b,c", 7),
    "MatMul of a vector": matmul("16", "a"),
    "MatMul Add": Case(
        "net (float[2,5,16] x) => (float[a,b,c] y) { c = MatMul(x, w) d = Add(c, b) e = Sigmoid(d)"
        " y = MatMul(e, v) }",
        {"w": weight(16, 12), "b": weight(12, seed=2), "v": weight(12, 8, seed=3)},
        {"QLinearMatMul": 1, "QLinearAdd": 1, "QLinearSigmoid": 1, "MatMulIntegerToFloat": 1}, 41, 43, 43,
    ),
    "attention": Case(
        "net (float[2,5,16] x) => (float[a,b,c] y) { q = MatMul(x, wq) k = MatMul(x, wk)"
        " t = Transpose<perm=[0,2,1]>(k) s = MatMul(q, t) p = Softmax<axis=-1>(s) v = MatMul(x, wv)"
        " y = MatMul(p, v) }",
        {n: weight(16, 16, seed=i, scale=s) for n, i, s in (("wq", 1, 0.2), ("wk", 2, 0.2), ("wv", 3, 0.5))},
        {"QLinearMatMul": 4, "QLinearSoftmax": 1, "MatMulIntegerToFloat": 1}, 30, 33, 33,
    ),
}  # fmt: skip

_INNER = {"w0": weight(4, 4, 1, 1), "w1": weight(3, 4, 1, 1, seed=2), "w2": weight(4, 4, 1, 1, seed=3)}
_K = weight(4, 1, 1, seed=4)  # some negative


def between(nodes: str, kernel: str = "", floor: float = 30, convs: int = 2, **constants: Array) -> Case:
    """Nodes from ``c`` to ``o`` between two convolutions: integer all the way."""
    body = f"net (float[1,4,8,8] x) => (float[a,b,c,d] y) {{ c = Conv(x, w0) {nodes} y = Conv(o, w1) }}"
    used = {name: array for name, array in _INNER.items() if f" {name})" in body}
    return Case(body, used | constants, {"QLinearConv": convs} | ({kernel: 1} if kernel else {}), floor)


_SIDE = "d = Conv(x, w2)"
BETWEEN = {
    "Add": between(f"{_SIDE} o = Add(c, d)", "QLinearAdd", 34, 3),
    "Add of one tensor twice": between("o = Add(c, c)", "QLinearAdd", 34),
    "Add Relu": between(f"{_SIDE} e = Add(c, d) o = Relu(e)", "QLinearAdd", 34, 3),
    "Add Clip": between(
        f"{_SIDE} e = Add(c, d) o = Clip(e, lo, hi)", "QLinearAdd", 34, 3, lo=f32(-1), hi=f32(1)
    ),
    "Mul": between(f"{_SIDE} o = Mul(c, d)", "QLinearMul", 29, 3),
    "Mul Relu": between(f"{_SIDE} e = Mul(c, d) o = Relu(e)", "QLinearMul", 31, 3),
    "HardSigmoid": Case(
        between("o = HardSigmoid(c)").body,
        between("o = HardSigmoid(c)").weights,
        {"QLinearConv": 2, "QLinearAdd": 1},
        33,
    ),
    "HardSigmoid steep": Case(
        between("o = HardSigmoid<alpha=1.5,beta=-0.25>(c)").body,
        between("o = HardSigmoid(c)").weights,
        {"QLinearConv": 2, "QLinearAdd": 1},
        33,
    ),
    "HardSwish": Case(
        between("o = HardSwish(c)").body,
        between("o = HardSwish(c)").weights,
        {"QLinearConv": 2, "QLinearAdd": 1, "QLinearMul": 1},
        30,
    ),
    "squeeze and excitation": Case(
        between("g = GlobalAveragePool(c) h = HardSigmoid(g) o = Mul(c, h)").body,
        between("o = HardSwish(c)").weights,
        {"QLinearConv": 2, "QLinearAdd": 1, "QLinearMul": 1, "QLinearGlobalAveragePool": 1},
        33,
    ),
    "Concat": between(
        f"{_SIDE} e = Concat<axis=2>(c, d) o = Transpose<perm=[0,1,3,2]>(e)", "QLinearConcat", 33, 3
    ),
    "Concat Relu": between(f"{_SIDE} e = Concat<axis=2>(c, d) o = Relu(e)", "QLinearConcat", 33, 3),
    "AveragePool": between("o = AveragePool<kernel_shape=[3,3],pads=[1,1,1,1]>(c)", "QLinearAveragePool", 33),
    "AveragePool of padding": between(
        "o = AveragePool<kernel_shape=[3,3],pads=[1,1,1,1],count_include_pad=1>(c)", "QLinearAveragePool", 33
    ),
    "AveragePool ceil": between(
        "o = AveragePool<kernel_shape=[3,3],strides=[2,2],ceil_mode=1>(c)", "QLinearAveragePool"
    ),
    "GlobalAveragePool": between("o = GlobalAveragePool(c)", "QLinearGlobalAveragePool", 34),
    "Sigmoid": between("o = Sigmoid(c)", "QLinearSigmoid", 42),
    "Softmax over channels": between("o = Softmax<axis=1>(c)", "QLinearSoftmax", 40),
    "Softmax over the last axis": between("o = Softmax<axis=-1>(c)", "QLinearSoftmax", 37),
    "LeakyRelu": between("o = LeakyRelu<alpha=0.2>(c)", "QLinearLeakyRelu", 33),
    "Where": between(f"{_SIDE} o = Where(m, c, d)", "QLinearWhere", 32, 3, m=np.eye(8) > 0),
    "Where constant": between("o = Where(m, c, k)", "QLinearWhere", 34, m=np.eye(8) > 0, k=f32(-0.7)),
    "MaxPool": between("o = MaxPool<kernel_shape=[3,3],strides=[2,2],pads=[1,1,1,1]>(c)", "NhwcMaxPool", 39),
    "Resize nearest": between('o = Resize<mode="nearest">(c, , s)', "Resize", 33, s=f32([1, 1, 2, 2])),
    "Reshape": between("o = Reshape(c, s)", floor=33, s=i64([1, 4, 4, 16])),
    "Transpose": between("o = Transpose<perm=[0,1,3,2]>(c)", floor=33),
    "Flatten": between("f = Flatten(c) o = Reshape(f, s)", floor=33, s=i64([1, 4, 8, 8])),
    "Squeeze, Unsqueeze": between("f = Squeeze(c, a) o = Unsqueeze(f, a)", floor=33, a=i64([0])),
    "Slice": between("o = Slice(c, b, e, a)", floor=33, b=i64([1]), e=i64([7]), a=i64([2])),
    "Split": between(
        "p, q = Split<axis=3>(c, s) o = Concat<axis=2>(p, q)", "QLinearConcat", 33, s=i64([4, 4])
    ),
    "Gather": between("o = Gather<axis=2>(c, i)", floor=33, i=i64([1, 3, 2])),
    "Gather one": between("f = Gather<axis=0>(c, i) o = Unsqueeze(f, a)", floor=33, i=i64(0), a=i64([0])),
    "Expand": between(
        "g = GlobalAveragePool(c) o = Expand(g, s)", "QLinearGlobalAveragePool", 33, s=i64([1, 4, 3, 3])
    ),
    "Tile": between("o = Tile(c, r)", floor=33, r=i64([1, 1, 2, 1])),
}

# Sigmoid before and LeakyRelu behind keep the constant from being folded into a convolution.
_GUARDED = "s = Sigmoid(c) e = {} (s, k) o = LeakyRelu<alpha=0.5>(e)"
CONSTANT_OPERANDS = {
    f"{op} {what}": (op, constant)
    for op in ("Add", "Mul", "Div")  # normalization makes a Mul of Div
    for what, constant in {"scalar": f32(0.6), "negative": f32(-1.7), "by channel": _K}.items()
}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", [*CONVOLUTIONS, *PRODUCTS])
def test_static_units_run_on_integers(
    name: str, activation: QuantType, granularity: Granularity, tmp_path: Path
) -> None:
    case = (CONVOLUTIONS | PRODUCTS)[name]
    made = build(tmp_path, case.body, case.weights, device=target(activation, granularity))
    assert set(made.forms().values()) == {"static"}
    check(made, case, case.static_db)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", BETWEEN)
def test_light_and_moving_units_between_convolutions_run_on_integers(
    name: str, activation: QuantType, tmp_path: Path
) -> None:
    case = BETWEEN[name]
    made = build(tmp_path, case.body, case.weights, device=target(activation))
    check(made, case, case.static_db)


@pytest.mark.parametrize("name", CONSTANT_OPERANDS)
def test_constant_operands_of_either_sign_and_shape(name: str, tmp_path: Path) -> None:
    op, constant = CONSTANT_OPERANDS[name]
    case = between(_GUARDED.format(op), floor=30, k=constant)
    made = build(tmp_path, case.body, case.weights)
    assert made.fused.float_operators == {}
    assert made.fused.leftover_dequantize == 1
    assert made.sqnr_db >= 30


LEFT_IN_FLOAT = {
    "AveragePool dilated": ("AveragePool<kernel_shape=[2,2],dilations=[2,2]>(c)", 19),
    "AveragePool that counts beyond the edge": (
        "AveragePool<kernel_shape=[3,3],strides=[2,2],ceil_mode=1,count_include_pad=1>(c)", 17,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_IN_FLOAT)
def test_what_integer_kernels_do_otherwise_stays_float(name: str, tmp_path: Path) -> None:
    """As integer kernels the first does not load, and the second gives other numbers (11 dB)."""
    node, opset = LEFT_IN_FLOAT[name]
    case = between(f"o = {node}")
    made = build(tmp_path, case.body, case.weights, opset=opset)
    assert made.fused.integer_kernels == {"QLinearConv": 2}
    assert made.fused.float_operators == {name.split(maxsplit=1)[0]: 1, "Max": 1}
    assert made.sqnr_db >= 33


@pytest.mark.parametrize(
    "node",
    [
        "Add(c, c)", "Mul(c, c)", "Concat<axis=2>(c, c)", "AveragePool<kernel_shape=[2,2]>(c)",
        "GlobalAveragePool(c)", "Sigmoid(c)", "LeakyRelu(c)", "Softmax(c)",
    ],
)  # fmt: skip
def test_light_units_that_are_asked_to_be_float_are(node: str, tmp_path: Path) -> None:
    case = between(f"o = {node}")
    made = build(tmp_path, case.body, case.weights, method={"o": FLOAT})
    assert made.fused.integer_kernels == {"QLinearConv": 2}
    assert made.fused.float_operators["Max"] == 1
    assert made.sqnr_db >= 33


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_dynamic_products(name: str, granularity: Granularity, tmp_path: Path) -> None:
    case = PRODUCTS[name]
    made = build(tmp_path, case.body, case.weights, method=DYNAMIC, device=target(granularity=granularity))
    weighted = sum(u.group.weight is not None for u in made.plan.groups)
    assert len(made.plan.of(DYNAMIC)) == weighted
    assert sum(made.fused.integer_kernels.values()) == weighted
    assert set(made.fused.integer_kernels) <= {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    assert "Add" not in made.fused.float_operators, "the bias is part of the kernel"
    assert made.sqnr_db >= case.dynamic_db


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", [*CONVOLUTIONS, *PRODUCTS])
def test_stored_weights_compute_in_float(name: str, granularity: Granularity, tmp_path: Path) -> None:
    case = (CONVOLUTIONS | PRODUCTS)[name]
    made = build(
        tmp_path, case.body, case.weights, method=WEIGHT_ONLY, device=target(granularity=granularity)
    )
    assert set(made.fused.integer_kernels) <= {"MatMulNBits"}
    # Nothing is dequantized anew in every run: it is folded, or the kernel reads the bytes.
    assert made.fused.leftover_dequantize == 0
    assert made.sqnr_db >= case.weight_only_db
    stored = {v.const_value.dtype.name for v in made.quantized.graph.initializers.values() if v.const_value}
    assert "INT8" in stored


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("group", [1, 2])
def test_a_transposed_convolution_has_stored_weights(
    group: int, granularity: Granularity, tmp_path: Path
) -> None:
    node = f"y = ConvTranspose<strides=[2,2],group={group}>(x, w, b)"
    body = f"net (float[1,4,8,8] x) => (float[a,b,c,d] y) {{ {node} }}"
    weights = {"w": weight(4, 6 // group, 2, 2), "b": weight(6)}
    made = build(tmp_path, body, weights, device=target(granularity=granularity))
    assert made.forms() == {"y": "weight_only"}
    assert made.fused.float_operators == {"ConvTranspose": 1}
    assert made.sqnr_db >= 42


TABLES = {
    "rows": ("int64[2,5] i", "a,b,c", "", weight(20, 8), i64(np.arange(10).reshape(2, 5))),
    "one row": ("int64 i", "a", "", weight(20, 8), i64(3)),
    "columns": ("int64[3] i", "a,b", "<axis=1>", weight(20, 8), i64([1, 5, 3])),
    "a vector": ("int64[3] i", "a", "", weight(20), i64([1, 5, 3])),
    "the middle axis": ("int64[3] i", "a,b,c", "<axis=1>", weight(4, 20, 6), i64([1, 5, 3])),
    "a negative axis": ("int64[3] i", "a,b", "<axis=-2>", weight(20, 8), i64([1, 5, 3])),
}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", TABLES)
def test_tables_keep_int8_rows(name: str, granularity: Granularity, tmp_path: Path) -> None:
    ids, dims, axis, table, index = TABLES[name]
    body = f"net ({ids}) => (float[{dims}] y) {{ y = Gather{axis}(t, i) }}"
    made = build(tmp_path, body, {"t": table}, device=target(granularity=granularity), feeds={"i": index})
    assert made.forms() == {"y": "weight_only"}
    assert made.sqnr_db >= 42


@pytest.mark.parametrize("opset", [13, 17, 21, 23])
def test_opsets(opset: int, tmp_path: Path) -> None:
    body = (
        "net (float[1,4,8,8] x) => (float[a,b] y) { c = Conv(x, w, b) r = Relu(c) p = GlobalAveragePool(r)"
        " f = Flatten(p) y = Gemm<transB=1>(f, v, u) }"
    )
    weights = {"w": weight(8, 4, 3, 3), "b": weight(8), "v": weight(5, 8, seed=3), "u": weight(5, seed=4)}
    made = build(tmp_path, body, weights, opset=opset)
    assert made.quantized.graph.opset_imports[""] == opset
    assert made.fused.integer_kernels == {"QLinearConv": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1}
    assert made.fused.float_operators == {}
    assert made.sqnr_db >= 38


PRODUCT_SHAPES = {"5,16": "a,b", "2,5,16": "a,b,c", "2,s,16": "a,b,c", "n,s,16": "a,b,c"}


@pytest.mark.parametrize("bias", [(12,), (1, 12)])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", PRODUCT_SHAPES)
@pytest.mark.parametrize("method", [STATIC, DYNAMIC, WEIGHT_ONLY])
def test_a_product_with_a_float_add_behind_it_stays_integer(
    method: Method, shape: str, granularity: Granularity, bias: tuple[int, ...], tmp_path: Path
) -> None:
    """The runtime makes a Gemm of MatMul and Add where it knows the shapes, and must find an integer one."""
    nodes = "c = MatMul(x, w) d = Add(c, b) y = Tanh(d)"
    body = f"net (float[{shape}] x) => (float[{PRODUCT_SHAPES[shape]}] y) {{ {nodes} }}"
    weights = {"w": weight(16, 12, scale=0.1), "b": weight(*bias, seed=3)}
    made = build(tmp_path, body, weights, method=method, device=target(granularity=granularity))
    if method is WEIGHT_ONLY and shape == "5,16":  # normalization makes a Gemm of it, folded at load
        assert made.fused.leftover_dequantize == 0
    else:
        assert sum(made.fused.integer_kernels.values()) == 1
        assert set(made.fused.float_operators) <= {"Add", "Tanh"}
    assert made.sqnr_db >= 36


def test_a_bias_too_large_for_32_bits_is_still_right(tmp_path: Path) -> None:
    body = "net (float[2,5,16] x) => (float[a,b,c] y) { c = MatMul(x, w) d = Add(c, b) y = Tanh(d) }"
    dead = weight(16, 12, scale=0.1)
    dead[:, 3] = 0
    made = build(tmp_path, body, {"w": dead, "b": weight(12, seed=3)})
    assert made.sqnr_db >= 36
