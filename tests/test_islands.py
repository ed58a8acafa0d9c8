"""Float units between integer ones, which the runtime must not make integers of."""

from pathlib import Path

from quantizing import build, weight

from edgepack.quantize.plan import Method


def test_a_float_pool_stays_in_float(tmp_path: Path) -> None:
    """Given the choice, the runtime pools stored integers, channels first: ten times as slow."""
    body = """net (float[1, 4, 8, 8] x) => (float[a, b, c, d] y) {
        c = Conv(x, w)  o = MaxPool<kernel_shape=[2,2],strides=[2,2]>(c)  y = Conv(o, v) }"""
    weights = {"w": weight(6, 4, 1, 1), "v": weight(3, 6, 1, 1, seed=2)}
    made = build(tmp_path, body, weights, method={"c": Method.FLOAT})
    assert made.fused.float_operators == {"Conv": 1, "MaxPool": 1, "Max": 1}
    assert made.fused.integer_kernels == {"QLinearConv": 1}
