"""Fusion groups: their nodes, their roles, and the reasons for float."""

import numpy as np
import onnx_ir as ir
import pytest
from support.onnx_models import Array, f32, i64, parse
from support.quantizing import target, weight

from edgepack.graph.normalize import normalize
from edgepack.ir.fingerprint import fingerprint
from edgepack.quantization.groups import FusionGroup, Role, activation_bounds, find_fusion_groups
from edgepack.quantization.plan.plan import tensors_to_observe

KERNELS = target().kernels


def groups(body: str, weights: dict[str, Array] | None = None) -> dict[str, FusionGroup]:
    """Groups by the name of the first output of their main node."""
    model, _ = normalize(parse(body, weights=weights), min_opset=13, max_opset=21)
    before = fingerprint(model)
    found = find_fusion_groups(model, KERNELS)
    assert fingerprint(model) == before
    nodes = [name for u in found for name in (u.name, *([u.activation] if u.activation else []))]
    assert sorted(nodes) == sorted(n.name or "" for n in model.graph), "every node is in exactly one group"
    by_name = {n.name: n for n in model.graph}
    return {by_name[u.name].outputs[0].name or "": u for u in found}


CONV = {"w": weight(4, 4, 1, 1), "b": weight(4)}


def test_a_convolution_is_grouped_with_its_bias_and_activation() -> None:
    found = groups("net (float[1,4,8,8] x) => (float[1,4,8,8] y) { c = Conv(x, w, b) y = Relu(c) }", CONV)
    group = found["c"]
    assert (group.role, group.inputs, group.outputs) == (Role.HEAVY, ("x",), ("y",))
    assert (group.weight, group.bias, group.constants) == ("w", "b", ())
    assert group.kind == "dense 1x1 Conv"


@pytest.mark.parametrize(
    "rest",
    [
        "c = Conv(x, w) y = Relu(c) z = Sigmoid(c)",  # two consumers
        "z = Conv(x, w) y = Relu(z)",  # an output of the model itself
    ],
)
def test_an_activation_is_its_own_group_where_its_input_has_other_consumers(rest: str) -> None:
    body = f"net (float[1,4,8,8] x) => (float[1,4,8,8] y, float[1,4,8,8] z) {{ {rest} }}"
    found = groups(body, {"w": CONV["w"]})
    assert found["y"].op_type == "Relu"
    assert found["y"].reason.text == "the target's runtime has no integer kernel for Relu"


def test_an_activation_in_a_subgraph_is_not_grouped_with_an_outer_node() -> None:
    body = """net (float[1,4,8,8] x, bool p) => (float[1,4,8,8] y) {
        c = Conv(x, w)
        y = If(p) <then_branch = a () => (float[1,4,8,8] t) { t = Relu(c) },
                   else_branch = b () => (float[1,4,8,8] e) { e = Neg(c) }>
    }"""
    found = groups(body, {"w": CONV["w"]})
    assert found["c"].activation is None
    assert found["y"].reason.text == "control flow: its subgraphs stay in float"


def test_bounds_of_activations() -> None:
    model = parse(
        "net (float[2] x) => (float[2] a, float[2] b, float[2] c)"
        " { a = Relu(x) b = Clip(x, lo) c = Clip(x, , hi) }",
        weights={"lo": f32(-1), "hi": f32(6)},
    )
    a, b, c = model.graph
    assert activation_bounds(a) == (0, np.inf)
    assert activation_bounds(b) == (-1, np.inf)
    assert activation_bounds(c) == (-np.inf, 6)


G = "net (float[5,16] x) => (float[5,12] y) {{ y = Gemm{}(x, w{}) }}"
GEMM = {"w": weight(16, 12)}
REASONS = {
    "transA": (
        "net (float[16,5] x) => (float[5,12] y) { y = Gemm<transA=1>(x, w) }", GEMM, "transA is set",
    ),
    "a bias by row": (G.format("", ", b"), GEMM | {"b": weight(5, 1)}, "its bias differs by row"),
    "a bias by row of a square": (
        "net (float[12,16] x) => (float[12,12] y) { y = Gemm(x, w, b) }",
        GEMM | {"b": weight(12, 1)}, "its bias differs by row",
    ),
    "a full bias": (G.format("", ", b"), GEMM | {"b": weight(5, 12)}, "its bias differs by row"),
    "a computed bias of Gemm": (
        "net (float[5,16] x, float[12] b) => (float[5,12] y) { y = Gemm(x, w, b) }", GEMM,
        "its bias is computed at run time",
    ),
    "a computed bias of Conv": (
        "net (float[1,4,8,8] x, float[4] b) => (float[1,4,8,8] y) { y = Conv(x, w, b) }", {"w": CONV["w"]},
        "its bias is computed at run time",
    ),
    "a computed weight": (
        "net (float[1,4,8,8] x, float[4,4,1,1] w) => (float[1,4,8,8] y) { y = Conv(x, w) }", {},
        "its weight is computed at run time",
    ),
    "a constant on the left": (
        "net (float[2,16,5] x) => (float[2,12,5] y) { y = MatMul(w, x) }", {"w": weight(12, 16)},
        "its constant operand is the left one, or has not two dimensions",
    ),
    "a batch of weights": (
        "net (float[2,5,16] x) => (float[2,5,12] y) { y = MatMul(x, w) }", {"w": weight(2, 16, 12)},
        "its constant operand is the left one, or has not two dimensions",
    ),
    "LSTM layout": (
        "net (float[2,6,8] x) => (float[a,b,c,d] y) { y = LSTM<hidden_size=10,layout=1>(x, w, r) }",
        {"w": weight(1, 40, 8), "r": weight(1, 40, 10)}, "layout is set",
    ),
    "LSTM with a computed recurrent weight": (
        "net (float[6,2,8] x, float[1,40,10] r) => (float[a,b,c,d] y) { y = LSTM<hidden_size=10>(x, w, r) }",
        {"w": weight(1, 40, 8)}, "its recurrent weight is computed at run time",
    ),
    "linear interpolation": (
        'net (float[1,4,8,8] x) => (float[a,b,c,d] y) { y = Resize<mode="linear">(x, , s) }',
        {"s": f32([1, 1, 2, 2])}, "the runtime interpolates in float",
    ),
    "indices of a pooling": (
        "net (float[1,4,8,8] x) => (float[a,b,c,d] y, int64[a,b,c,d] i)"
        " { y, i = MaxPool<kernel_shape=[2,2]>(x) }",
        {}, "'i' is int64, not float32",
    ),
    "integers": ("net (int64[4] x) => (int64[4] y) { y = Add(x, x) }", {}, "'x' is int64, not float32"),
    "half precision": (
        "net (float16[4] x) => (float16[4] y) { y = Add(x, x) }", {}, "'y' is float16, not float32",
    ),
    "minus infinity": (
        "net (bool[1,4] m, float[1,4] x) => (float[1,4] y) { y = Where(m, x, k) }", {"k": f32(-np.inf)},
        "a constant operand has infinity, or a large value for it, as masks do",
    ),
    "a mask": (
        "net (bool[1,4] m, float[1,4] x) => (float[1,4] y) { y = Where(m, x, k) }", {"k": f32(-3.4e38)},
        "a constant operand has infinity, or a large value for it, as masks do",
    ),
    "no kernel": (
        "net (float[1,4] x) => (float[1,4] y) { y = LayerNormalization(x, s) }", {"s": f32([1, 2, 3, 4])},
        "the target's runtime has no integer kernel for LayerNormalization",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_a_group_that_must_stay_float_has_a_reason(name: str) -> None:
    body, weights, reason = REASONS[name]
    group = groups(body, weights)["y"]
    assert (group.role, group.reason.text) == (Role.FLOAT, reason)


@pytest.mark.parametrize(("attribute", "bias"), [("<alpha=0.5>", ""), ("<beta=2.0>", ", b")])
def test_a_gemm_with_a_factor_stays_float_unless_it_is_normalized(attribute: str, bias: str) -> None:
    weights = GEMM | ({"b": weight(12)} if bias else {})
    model = parse(G.format(attribute, bias), weights=weights)
    model.graph[0].name = "gemm"
    (group,) = find_fusion_groups(model, KERNELS)
    assert (group.role, group.reason.text) == (Role.FLOAT, "alpha or beta is not 1")
    assert groups(G.format(attribute, bias), weights)["y"].role is Role.HEAVY


def test_a_split_with_an_unused_output_stays_float() -> None:
    # Not normalized: that may remove the output.
    model = parse(
        "net (float[1,4] x) => (float[1,2] y) { y, z = Split<axis=1>(x, s) }", weights={"s": i64([2, 2])}
    )
    model.graph[0].name = "split"
    model.graph[0].outputs[1].dtype = model.graph[0].outputs[0].dtype = ir.DataType.FLOAT
    (group,) = find_fusion_groups(model, KERNELS)
    assert group.reason.text == "the runtime splits integers only where every output is used"
    assert group.outputs == ("y",)


def test_ranges_are_measured_only_where_integer_groups_can_be() -> None:
    body = """net (float[1,4,8] x, bool[1,4,4] m) => (float[1,4,4] y) {
        q = MatMul(x, w)
        t = Transpose<perm=[0,2,1]>(q)
        s = MatMul(q, t)
        k = Where(m, zero, none)
        a = Add(s, k)
        p = Softmax<axis=-1>(a)
        y = MatMul(p, v)
    }"""
    weights = {"w": weight(8, 8), "v": weight(4, 4), "zero": f32(0), "none": f32(-np.inf)}
    model, _ = normalize(parse(body, weights=weights), min_opset=13, max_opset=21)
    observed = tensors_to_observe(find_fusion_groups(model, KERNELS))
    assert set(observed) >= {"x", "q", "s", "p", "y"}
    assert {"k", "a"}.isdisjoint(observed), "infinite, and never integer"
