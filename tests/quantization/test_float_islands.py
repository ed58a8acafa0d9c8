"""Float islands: float groups between integer ones, which the runtime must not quantize."""

from pathlib import Path

import onnx_ir as ir
import pytest
from support.convs import CONV, array, net
from support.onnx_models import Array, i64
from support.quantizing import FLOAT, S8, U8, WEIGHT_ONLY, build, target, weight

from edgepack.config.target import Runtime
from edgepack.ir.files import load_model
from edgepack.ir.scheme import QuantType
from edgepack.quantization.plan.types import Precision
from edgepack.runtime.fused import fusion_report


def test_a_float_pool_stays_in_float(tmp_path: Path) -> None:
    """The runtime would run an int8 pool, channels-first: ten times as slow."""
    body = """net (float[1, 4, 8, 8] x) => (float[a, b, c, d] y) {
        c = Conv(x, w)  o = MaxPool<kernel_shape=[2,2],strides=[2,2]>(c)  y = Conv(o, v) }"""
    weights = {"w": weight(6, 4, 1, 1), "v": weight(3, 6, 1, 1, seed=2)}
    made = build(tmp_path, body, weights, precision={"c": Precision.FLOAT})
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
def test_a_float_group_after_moving_operators_stays_in_float(
    inner: str, integer: str, tmp_path: Path
) -> None:
    body = f"net (float[1, 4, 6, 6] x) => (float[a, b, c, d] y) {{ c = Conv(x, w) {inner} y = Conv(e, v) }}"
    weights = {"w": weight(8, 4, 1, 1), "v": weight(3, 8, 1, 1, seed=2), "s": i64([8, 36])}
    more = {"r": i64([1, 8, 6, 6]), "one": i64([0, 0, 0, 1]), "six": i64([1, 8, 6, 6])}
    made = build(tmp_path, body, weights | more, precision={"o": Precision.FLOAT}, device=target())
    assert integer not in made.fused.integer_kernels
    assert made.fused.float_operators["Max"] == 1


def test_a_float_convolution_after_moving_operators_stays_in_float(tmp_path: Path) -> None:
    """The runtime would quantize its weights, per tensor."""
    body = """net (float[1, 4, 6, 6] x) => (float[a, b, c, d] y) {
        c = Conv(x, w)  q = Transpose<perm=[0,1,3,2]>(c)  o = Conv(q, z)  y = Conv(o, v) }"""
    weights = {"w": weight(8, 4, 1, 1), "v": weight(3, 8, 1, 1, seed=2), "z": weight(8, 8, 1, 1, seed=4)}
    made = build(tmp_path, body, weights, precision={"o": Precision.FLOAT})
    assert made.fused.integer_kernels == {"QLinearConv": 2}


ISLAND_METHODS = [FLOAT, WEIGHT_ONLY]


@pytest.mark.parametrize("activation", [U8, S8])
@pytest.mark.parametrize("precision", ISLAND_METHODS)
@pytest.mark.parametrize(
    "node, weights, float_op",
    [
        ("Conv(c, u)", {"u": weight(4, 4, 3, 3, seed=9)}, "Conv"),
        ("Conv<group=2>(c, u, b)", {"u": weight(4, 2, 1, 1, seed=9), "b": weight(4)}, "Conv"),
        ("ConvTranspose(c, u)", {"u": weight(4, 4, 2, 2, seed=9)}, "ConvTranspose"),
        (
            "ConvTranspose<group=2>(c, u, b)",
            {"u": weight(4, 2, 2, 2, seed=9), "b": weight(4)},
            "ConvTranspose",
        ),
        ("MatMul(c, u)", {"u": weight(8, 8, seed=9)}, "MatMul"),
    ],
)
def test_float_islands_between_integer_groups_stay_float(
    node: str,
    weights: dict[str, Array],
    float_op: str,
    precision: Precision,
    activation: QuantType,
    tmp_path: Path,
) -> None:
    device = target(activation)
    body = net(f"c = Conv(x, w) d = {node} y = Conv(d, v)")
    made = build(tmp_path, body, CONV | weights, precision={"d": precision}, device=device)
    assert made.fused.integer_kernels == {"QLinearConv": 2}
    assert made.fused.float_operators == {float_op: 1}
    # And they compute the same as without optimizations of the runtime.
    without = device.runtime.model_copy(update={"disabled_optimizers": ("WeightBiasQuantization",)})
    assert fusion_report(made.path, without).float_operators == {float_op: 1}
    assert made.sqnr_db > 30


@pytest.mark.parametrize("precision", ISLAND_METHODS)
@pytest.mark.parametrize("trans_b", [0, 1])
def test_a_float_gemm_between_integer_ones(trans_b: int, precision: Precision, tmp_path: Path) -> None:
    body = f"""net (float[5,16] x) => (float[a,b] y) {{
        c = Gemm(x, w, b) d = Gemm<transB={trans_b}>(c, u, b2) r = Relu(d) y = Gemm(r, v) }}"""
    shape = (6, 12) if trans_b else (12, 6)
    weights = {"w": weight(16, 12), "b": weight(12), "u": weight(*shape), "b2": weight(6), "v": weight(6, 4)}
    made = build(tmp_path, body, weights, precision={"r": precision})
    assert made.fused.integer_kernels == {"QGemm": 2}
    assert made.fused.float_operators in ({"FusedGemm": 1}, {"Gemm": 1}, {"Gemm": 1, "Relu": 1})


def test_the_runtime_quantizes_float_islands_without_the_guard(tmp_path: Path) -> None:
    """Without the guard the runtime quantizes the weight. Once it does not, the guard can be removed."""
    body = net("c = Conv(x, w) d = Conv(c, u) y = Conv(d, v)")
    made = build(tmp_path, body, CONV | {"u": weight(4, 4, 3, 3)}, precision={"d": FLOAT})
    model = load_model(made.path)
    (guard,) = (n for n in model.graph if [v.name for v in n.outputs] == ["c_q_island_dq"])
    for index, name in ((1, "plain_scale"), (2, "plain_zero")):
        value = guard.inputs[index]
        assert value is not None
        numbers = array(model, value.name or "")
        assert numbers.shape == (4,)
        plain = ir.Value(name=name, const_value=ir.tensor(numbers[0], name=name))
        model.graph.register_initializer(plain)
        guard.replace_input_with(index, plain)
    path = tmp_path / "unguarded.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    assert fusion_report(path, Runtime()).integer_kernels == {"QLinearConv": 3}
