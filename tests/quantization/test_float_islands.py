"""Float units between integer ones, which the runtime must not make integers of."""

from pathlib import Path

import pytest
from support.onnx_models import i64
from support.quantizing import build, target, weight

from edgepack.quantization.plan.plan import Method


def test_a_float_pool_stays_in_float(tmp_path: Path) -> None:
    """Given the choice, the runtime pools stored integers, channels first: ten times as slow."""
    body = """net (float[1, 4, 8, 8] x) => (float[a, b, c, d] y) {
        c = Conv(x, w)  o = MaxPool<kernel_shape=[2,2],strides=[2,2]>(c)  y = Conv(o, v) }"""
    weights = {"w": weight(6, 4, 1, 1), "v": weight(3, 6, 1, 1, seed=2)}
    made = build(tmp_path, body, weights, method={"c": Method.FLOAT})
    assert made.fused.float_operators == {"Conv": 1, "MaxPool": 1, "Max": 1}
    assert made.fused.integer_kernels == {"QLinearConv": 1}


@pytest.mark.parametrize(
    ("inner", "integer"),
    [
        ("q = Reshape(c, s) o = Softmax(q) e = Reshape(o, r)", "QLinearSoftmax"),
        (
            "q = Transpose<perm=[0,2,3,1]>(c) o = Sigmoid(q) e = Transpose<perm=[0,3,1,2]>(o)",
            "QLinearSigmoid",
        ),
        ("q = MaxPool<kernel_shape=[1,1]>(c) o = Sigmoid(q) e = Identity(o)", "QLinearSigmoid"),
        ("q = Transpose<perm=[0,1,3,2]>(c) o = Add(q, q) e = Identity(o)", "QLinearAdd"),
        ("q = Slice(c, one, six) o = Sigmoid(q) e = Identity(o)", "QLinearSigmoid"),
    ],
)
def test_a_float_unit_behind_moves_stays_in_float(inner: str, integer: str, tmp_path: Path) -> None:
    body = f"net (float[1, 4, 6, 6] x) => (float[a, b, c, d] y) {{ c = Conv(x, w) {inner} y = Conv(e, v) }}"
    weights = {"w": weight(8, 4, 1, 1), "v": weight(3, 8, 1, 1, seed=2), "s": i64([8, 36])}
    more = {"r": i64([1, 8, 6, 6]), "one": i64([0, 0, 0, 1]), "six": i64([1, 8, 6, 6])}
    made = build(tmp_path, body, weights | more, method={"o": Method.FLOAT}, device=target())
    assert integer not in made.fused.integer_kernels
    assert made.fused.float_operators["Max"] == 1


def test_a_float_convolution_behind_moves_stays_in_float(tmp_path: Path) -> None:
    """The runtime would quantize its weights, per tensor and unasked."""
    body = """net (float[1, 4, 6, 6] x) => (float[a, b, c, d] y) {
        c = Conv(x, w)  q = Transpose<perm=[0,1,3,2]>(c)  o = Conv(q, z)  y = Conv(o, v) }"""
    weights = {"w": weight(8, 4, 1, 1), "v": weight(3, 8, 1, 1, seed=2), "z": weight(8, 8, 1, 1, seed=4)}
    made = build(tmp_path, body, weights, method={"o": Method.FLOAT})
    assert made.fused.integer_kernels == {"QLinearConv": 2}
