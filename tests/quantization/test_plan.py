"""Plans: golden texts of whole plans, and the rules one by one."""

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.onnx_models import Array, f32, i64, parse
from support.quantizing import S8, U8, target, weight

from edgepack.calibration.ranges import Range
from edgepack.config.recipe import Override
from edgepack.config.target import Target
from edgepack.errors import ConfigError
from edgepack.graph.normalize import normalize
from edgepack.ir.fingerprint import fingerprint
from edgepack.ir.scheme import Granularity, QuantParams
from edgepack.quantization.groups import FusionGroup, find_fusion_groups
from edgepack.quantization.plan.plan import make_plan, requested_precisions, tensors_to_observe
from edgepack.quantization.plan.types import Precision, QuantPlan, Request
from edgepack.quantization.weights.params import weight_axis
from edgepack.results import Cause, Reason

GOLDEN = Path(__file__).parents[1] / "golden"
# Defined here, so that golden plans do not depend on the shipped targets.
GOLDEN_TARGET = target(
    dynamic=("MatMul", "Gemm", "LSTM"),
    weight_only=("Gather", "MatMul", "Gemm", "Conv", "ConvTranspose", "LSTM", "GRU"),
)
CONV = {"w": weight(4, 4, 1, 1), "v": weight(4, 4, 1, 1, seed=2)}


def plan(
    body: str,
    weights: dict[str, Array],
    precision: Precision = Precision.STATIC,
    device: Target | None = None,
    ranges: dict[str, tuple[float, float]] | None = None,
    methods: dict[str, Precision] | None = None,
) -> tuple[QuantPlan, ir.Model]:
    """A plan with ranges [-1, 1] except those given; ``methods`` by first output of the main node."""
    device = device or target()
    model, _ = normalize(parse(body, weights=weights), min_opset=13, max_opset=21)
    found = find_fusion_groups(model, device.kernels)
    table = dict.fromkeys(tensors_to_observe(found), Range(-1, 1, -1, 1))
    table |= {name: Range(*bounds, *bounds) for name, bounds in (ranges or {}).items()}
    asked = {u.name: Request(precision) for u in found}
    for name, special in (methods or {}).items():
        asked |= {
            u.name: Request(special, Reason(Cause.REQUEST, "asked here"))
            for u in found
            if name in _values(model, u)
        }
    before = fingerprint(model)
    made = make_plan(model, found, table, device, asked)
    assert fingerprint(model) == before, "a plan touches nothing"
    return made, model


def _values(model: ir.Model, group: FusionGroup) -> list[str | None]:
    return [v.name for n in model.graph if n.name in (group.name, group.activation) for v in n.outputs]


def by_output(made: QuantPlan) -> dict[str, tuple[str, str]]:
    return {u.group.outputs[0]: (str(u.precision), u.reason.text) for u in made.groups if u.group.outputs}


def text(made: QuantPlan) -> str:
    """A plan as lines: one per group, one per quantized activation."""
    lines = []
    for u in made.groups:
        parts = [f"{u.precision:11s} {u.group.op_type}"]
        parts += ["+ activation" + (" (implied)" if u.drop_activation else "")] if u.group.activation else []
        parts.append(f"{', '.join(u.group.inputs) or '-'} -> {', '.join(u.group.outputs)}")
        parts += [f"weight {u.group.weight} {params_text(u.weight)}"] if u.weight is not None else []
        parts += [f"# {u.reason}"] if u.reason else []
        lines.append("  ".join(parts))
    return "\n".join([*lines, *(f"{name}: {params_text(p)}" for name, p in made.activations.items()), ""])


def params_text(params: QuantParams) -> str:
    where = "" if params.axis is None else f" axis {params.axis} x {params.scale.size}"
    return f"{params.type} scale {params.scale.max():.4g} zero {int(params.zero_point.max())}{where}"


MODELS: dict[str, tuple[str, dict[str, Array]]] = {
    "residual": (
        """net (float[1,4,8,8] x) => (float[1,3] y) {
            a = Conv(x, w1, b1)
            r = Clip(a, zero, six)
            d = Conv<group=4>(r, w2)
            s = Add(r, d)
            t = Relu(s)
            m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(t)
            g = GlobalAveragePool(m)
            f = Flatten(g)
            l = Gemm<transB=1>(f, w3, b3)
            y = Softmax(l)
        }""",
        {
            "w1": weight(4, 4, 1, 1), "b1": weight(4), "zero": f32(0), "six": f32(6),
            "w2": weight(4, 1, 1, 1), "w3": weight(3, 4), "b3": weight(3),
        },
    ),
    "attention": (
        """net (int64[1,5] ids, float[1,1,5] mask) => (float[1,5,8] y) {
            e = Gather(table, ids)
            n = LayerNormalization(e, scale, shift)
            q = MatMul(n, wq)
            k = MatMul(n, wk)
            v = MatMul(n, wv)
            t = Transpose<perm=[0,2,1]>(k)
            s = MatMul(q, t)
            a = Add(s, mask)
            p = Softmax(a)
            c = MatMul(p, v)
            o = MatMul(c, wo)
            y = Add(o, e)
        }""",
        {
            "table": weight(20, 8), "scale": weight(8), "shift": weight(8), "wq": weight(8, 8),
            "wk": weight(8, 8, seed=2), "wv": weight(8, 8, seed=3), "wo": weight(8, 8, seed=4),
        },
    ),
    "recurrent": (
        """net (float[6,1,8] x) => (float[6,4] y) {
            h, last = GRU<hidden_size=8>(x, gw, gr)
            s = Squeeze(h, one)
            l, state = LSTM<hidden_size=8>(s, lw, lr)
            f = Reshape(l, shape)
            y = Gemm(f, w, b)
        }""",
        {
            "gw": weight(1, 24, 8), "gr": weight(1, 24, 8), "lw": weight(1, 32, 8), "lr": weight(1, 32, 8),
            "one": i64([1]), "shape": i64([6, 8]), "w": weight(8, 4), "b": weight(4),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", [Precision.STATIC, Precision.DYNAMIC, Precision.WEIGHT_ONLY])
def test_golden_plans(name: str, precision: Precision) -> None:
    """After an intended change: ``EDGEPACK_GOLDEN=write pytest tests/quantization/test_plan.py``."""
    made, _ = plan(*MODELS[name], precision, GOLDEN_TARGET)
    path = GOLDEN / f"{name}_{precision}.txt"
    if os.environ.get("EDGEPACK_GOLDEN") == "write":
        path.write_text(text(made), encoding="utf-8")
    assert text(made) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", list(Precision))
def test_float_groups_have_a_reason(name: str, precision: Precision) -> None:
    made, _ = plan(*MODELS[name], precision)
    assert all(u.reason for u in made.of(Precision.FLOAT))


@pytest.mark.parametrize("activation, symmetric", [(U8, False), (S8, False), (S8, True)])
@pytest.mark.parametrize(
    "then, bounds, implied",
    [
        ("Relu(c)", (0, 3), True),
        ("Clip(c, zero, six)", (0, 6), True),
        ("Clip(c, zero, six)", (0, 2), True),
        ("Clip(c, minus, six)", (-1, 6), True),
        ("Clip(c, one, six)", (1, 6), False),
    ],
)
def test_saturation_replaces_an_activation_only_where_it_does_the_same(
    then: str, bounds: tuple[float, float], implied: bool, activation: object, symmetric: bool
) -> None:
    numbers = {"zero": f32(0), "six": f32(6), "minus": f32(-1), "one": f32(1)}
    body = f"net (float[1,4,8,8] x) => (float[1,4,8,8] y) {{ c = Conv(x, w) y = {then} }}"
    used = {"w": CONV["w"]} | {n: a for n, a in numbers.items() if n in then}
    device = target(S8 if activation is S8 else U8, symmetric=symmetric)
    made, _ = plan(body, used, device=device, ranges={"y": bounds})
    # A symmetric range covers values below zero, the activation does not.
    assert made.groups[0].drop_activation is (implied and not symmetric)


def test_moving_groups_have_the_parameters_of_their_input() -> None:
    body = """net (float[1,4,8,8] x) => (float[a,b,c,d] y) {
        c = Conv(x, w) m = MaxPool<kernel_shape=[2,2]>(c) t = Transpose<perm=[0,1,3,2]>(m) y = Conv(t, v) }"""
    made, _ = plan(body, CONV, ranges={"c": (-2, 3), "m": (0, 1), "t": (0, 1)})
    assert made.activations["c"] == made.activations["m"] == made.activations["t"]


def test_light_groups_are_integer_only_between_integer_groups() -> None:
    body = """net (float[1,4,8,8] x) => (float[a,b,c,d] y, float[e,f,g,h] z) {
        s = Sigmoid(x) c = Conv(s, w) y = Sigmoid(c) t = Tanh(c) u = Add(c, t) z = Conv(u, v) }"""
    precisions = by_output(plan(body, CONV)[0])
    assert precisions["s"] == ("float", "its input 'x' is float")
    assert precisions["y"] == ("float", "no integer group follows")
    assert precisions["u"] == ("float", "its input 't' is float")
    assert precisions["c"][0] == precisions["z"][0] == "static"


def test_groups_of_a_value_that_no_sample_reached_are_float() -> None:
    device = target()
    body = "net (float[1,4,8,8] x) => (float[a,b,c,d] y) { c = Conv(x, w) s = Sigmoid(c) y = Conv(s, v) }"
    model, _ = normalize(parse(body, weights=CONV), min_opset=13, max_opset=21)
    found = find_fusion_groups(model, device.kernels)
    made = make_plan(
        model, found, {n: Range(-1, 1, -1, 1) for n in ("x", "c", "y")}, device,
        {u.name: Request(Precision.STATIC) for u in found},
    )  # fmt: skip
    precisions = by_output(made)
    assert precisions["y"] == ("float", "no sample reached 's'")
    assert precisions["s"][0] == "float"
    assert precisions["c"][0] == "static"


def test_the_reason_is_that_of_the_request_only_where_it_is_met() -> None:
    body = """net (float[6,8,8] x) => (float[a,b,c,d] y, float[e,f,g] z) {
        y = LSTM<hidden_size=10>(x, w, r) z = MatMul(x, x) }"""
    weights = {"w": weight(1, 40, 8), "r": weight(1, 40, 10)}

    def asked(precision: Precision, name: str) -> tuple[str, str]:
        return by_output(plan(body, weights, Precision.FLOAT, methods={name: precision})[0])[name]

    assert asked(Precision.DYNAMIC, "y") == ("dynamic", "asked here")
    assert asked(Precision.STATIC, "y") == ("dynamic", "no static kernel for LSTM")
    assert asked(Precision.STATIC, "z") == ("static", "asked here")
    assert asked(Precision.DYNAMIC, "z") == ("float", "two activations: no dynamic kernel")
    # Requested by the search, which measured float to be faster: that reason stays.
    assert asked(Precision.WEIGHT_ONLY, "z") == ("float", "asked here")


def test_a_matmul_without_integer_consumers_has_a_float_output() -> None:
    made, _ = plan("net (float[5,16] x) => (float[a,b] y) { y = MatMul(x, w) }", {"w": weight(16, 12)})
    assert set(made.activations) == {"x"}


def test_weights_that_the_file_needs_in_float_are_not_stored_twice() -> None:
    body = (
        "net (float[5,8] x, float[8,8] k) => (float[5,8] y, float[8,8] z) { y = MatMul(x, w) z = Sub(k, w) }"
    )
    stored = by_output(plan(body, {"w": weight(8, 8)}, Precision.WEIGHT_ONLY)[0])
    assert stored["y"][0] == "float"
    assert "needs 'w' in float" in stored["y"][1]
    # Speed has priority over bytes.
    assert by_output(plan(body, {"w": weight(8, 8)}, Precision.STATIC)[0])["y"][0] == "static"


def test_a_large_bias_increases_the_scale_of_small_weights() -> None:
    tiny = np.full((4, 4, 1, 1), 1e-9, np.float32)
    body = "net (float[1,4,8,8] x) => (float[a,b,c,d] y) { y = Conv(x, w, b) }"
    made, _ = plan(body, {"w": tiny, "b": f32([0, 1, 100, -100])})
    params, x = made.groups[0].weight, made.activations["x"]
    assert params is not None
    stored = np.abs([0, 1, 100, 100]) / (params.scale * x.scale)
    assert (stored <= 2**30 * 1.01).all()


def test_a_dead_input_and_a_dead_channel_have_scales() -> None:
    body = "net (float[1,4,8,8] x) => (float[a,b,c,d] y) { y = Conv(x, w) }"
    zeros = np.zeros((4, 4, 1, 1), np.float32)
    made, _ = plan(body, {"w": zeros}, ranges={"x": (0, 0), "y": (0, 0)})
    params = made.groups[0].weight
    assert params is not None
    assert (params.scale * made.activations["x"].scale > 0).all()


@pytest.mark.parametrize("granularity", list(Granularity))
def test_channel_axes(granularity: Granularity) -> None:
    cases = [
        ("net (float[1,4,8,8] x) => (float[a,b,c,d] y) { y = Conv(x, w) }", weight(6, 4, 1, 1), 0),
        ("net (float[5,16] x) => (float[a,b] y) { y = Gemm(x, w) }", weight(16, 12), 1),
        ("net (float[5,16] x) => (float[a,b] y) { y = Gemm<transB=1>(x, w) }", weight(12, 16), 0),
        ("net (float[5,16] x) => (float[a,b] y) { y = MatMul(x, w) }", weight(16, 12), 1),
        ("net (float[1,4,8,8] x) => (float[a,b,c,d] y) { y = ConvTranspose(x, w) }", weight(4, 6, 2, 2), 1),
    ]
    for body, array, axis in cases:
        made, model = plan(body, {"w": array}, device=target(granularity=granularity))
        params = made.groups[0].weight
        assert params is not None
        expected = axis if granularity is Granularity.PER_CHANNEL else None
        assert params.axis == expected
        assert weight_axis(model.graph[0].op_type, model.graph[0]) in (axis, axis - array.ndim)


def test_overrides_by_name_win_over_those_by_type() -> None:
    body = "net (float[1,4,8,8] x) => (float[a,b,c,d] y) { c = Conv(x, w) y = Conv(c, v) }"
    model, _ = normalize(parse(body, weights=CONV), min_opset=13, max_opset=21)
    found = find_fusion_groups(model, target().kernels)
    first, second = found[0].name, found[1].name
    overrides = [
        Override(op_types=("Conv",), method="float", reason="all of them"),
        Override(nodes=(first,), method="weight_only", reason="this one"),
    ]
    asked = requested_precisions(found, overrides)
    this, every = Reason(Cause.REQUEST, "this one"), Reason(Cause.REQUEST, "all of them")
    assert asked == {first: Request(Precision.WEIGHT_ONLY, this), second: Request(Precision.FLOAT, every)}
    assert requested_precisions(found, [Override(nodes=("*",), method="auto")]) == {}


@pytest.mark.parametrize(
    "override, message",
    [
        (Override(nodes=("nowhere",), method="float"), "no node is named 'nowhere'"),
        (Override(op_types=("Convv",), method="float"), "has no 'Convv', did you mean 'Conv'"),
    ],
)
def test_an_override_of_something_that_is_not_there_is_an_error(override: Override, message: str) -> None:
    body = "net (float[1,4,8,8] x) => (float[a,b,c,d] y) { c = Conv(x, w) y = Conv(c, v) }"
    model, _ = normalize(parse(body, weights=CONV), min_opset=13, max_opset=21)
    with pytest.raises(ConfigError, match=message):
        requested_precisions(find_fusion_groups(model, target().kernels), [override])
