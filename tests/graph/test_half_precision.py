"""Half precision becomes float32: equal weights, unchanged input and output types, no inner Casts."""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.normalizing import check, refusals
from support.onnx_models import Array, difference, f32, ops, parse, randoms, run

from edgepack.errors import ModelError
from edgepack.graph.half_precision import float32_bytes
from edgepack.graph.normalize import normalize
from edgepack.graph.notes import NormalizeNotes
from edgepack.ir.files import load_model, save_model
from edgepack.ir.fingerprint import fingerprint

F16, F32, BF16 = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.BFLOAT16
HALF_TOLERANCE = 4e-3
"""The error of float16 itself over a few layers."""

NET = """net ({t}[batch, 3, 8, 8] x) => ({t}[batch, 5] y) {{
    c = Conv <pads = [1, 1, 1, 1]> (x, w1)
    r = Relu (c)
    g = GlobalAveragePool (r)
    f = Flatten (g)
    m = Gemm <transB = 1> (f, w3, b3)
    y = Softmax (m)
}}"""
SHAPES = {"w1": (4, 3, 3, 3), "w3": (5, 4), "b3": (5,)}


def half(arrays: dict[str, Array], dtype: type = np.float16) -> dict[str, Array]:
    return {name: array.astype(dtype) for name, array in arrays.items()}


def half_precision(arrays: dict[str, Array]) -> dict[str, Array]:
    return {name: array.astype(np.float16).astype(np.float32) for name, array in arrays.items()}


def normal(model: ir.Model) -> tuple[ir.Model, NormalizeNotes]:
    return normalize(model, min_opset=13, max_opset=23)


def test_weights_are_equal_and_inputs_and_outputs_keep_their_types() -> None:
    """Given:: x [float16] -> Conv .. Softmax -> y.  Result:: x -> Cast -> Conv .. Softmax -> Cast -> y."""
    weights = randoms(**SHAPES)
    model = parse(NET.format(t="float16"), weights=half(weights))
    feeds = half(randoms(x=(2, 3, 8, 8)))
    made, notes = check(model, feeds, tolerance=HALF_TOLERANCE)
    assert ops(made)["Cast"] == 2
    assert notes.half_precision.types == ("float16",)
    assert notes.half_precision.kept == ()
    for name in SHAPES:
        tensor = made.graph.initializers[name].const_value
        assert tensor is not None and tensor.dtype == F32
        np.testing.assert_array_equal(tensor.numpy(), weights[name].astype(np.float16).astype(np.float32))
    assert {v.dtype for node in made.graph for v in node.outputs if not v.is_graph_output()} == {F32}
    twin, _ = normal(parse(NET.format(t="float"), weights=half_precision(weights)))
    exact = run(twin, {"x": feeds["x"].astype(np.float32)})["y"]
    np.testing.assert_array_equal(run(made, feeds)["y"], exact.astype(np.float16))


MIXED = """net ({t}[batch, 3, 8, 8] x) => (float[batch, 5] y) {{
    h = Cast <to = 10> (x)
    c = Conv <pads = [1, 1, 1, 1]> (h, w1)
    a = Cast <to = 1> (c)
    e = Exp (a)
    b = Cast <to = 10> (e)
    g = GlobalAveragePool (b)
    f = Flatten (g)
    m = Gemm <transB = 1> (f, w3, b3)
    y = Cast <to = 1> (m)
}}"""


def test_casts_between_nodes_left_in_float32_go() -> None:
    """As a converter writes a model whose inputs, outputs and a few nodes stay in float32."""
    weights = randoms(**SHAPES)
    model = parse(MIXED.format(t="float"), weights=half(weights))
    made, _ = check(model, randoms(x=(2, 3, 8, 8)), tolerance=HALF_TOLERANCE)
    assert ops(made)["Cast"] == 0
    nodes = MIXED.format(t="float").replace("Cast <to = 10>", "Identity").replace("Cast <to = 1>", "Identity")
    twin, _ = normal(parse(nodes, weights=half_precision(weights)))
    assert fingerprint(made) == fingerprint(twin)


def test_an_input_that_is_cast_at_once() -> None:
    weights = half(randoms(**SHAPES))
    model = parse(MIXED.format(t="float16"), weights=weights)
    made, _ = check(model, half(randoms(x=(2, 3, 8, 8))), tolerance=HALF_TOLERANCE)
    assert [n.op_type for n in made.graph].count("Cast") == 1
    assert made.graph[0].op_type == "Cast" and made.graph.inputs[0].dtype == F16


def test_an_output_that_is_also_read_and_one_that_is_a_weight() -> None:
    body = """net (float16[2, 4] x) => (float16[2, 4] h, float16[2, 4] y, float16[4] b) {
        h = Add (x, b)
        y = Tanh (h)
    }"""
    model = parse(body, weights=half(randoms(b=(4,))))
    made, _ = check(model, half(randoms(x=(2, 4))), tolerance=HALF_TOLERANCE)
    assert [v.dtype for v in made.graph.outputs] == [F16] * 3


@pytest.mark.parametrize(
    "nodes",
    [
        "s = Shape (x) c = ConstantOfShape <value = float16[1] {14336}> (s) y = Add (x, c)",
        "i = Cast <to = 7> (x) c = CastLike (i, x) y = Mul (c, x)",
        "e = EyeLike <dtype = 10> (x) y = Add (x, e)",
        "k = Constant <value = float16[1] {13312}> () y = Mul (x, k)",
        "n = LayerNormalization <stash_type = 1> (x, b, b) y = Relu (n)",
        "y = Clip (x, low, high)",
    ],
)
def test_types_in_attributes(nodes: str) -> None:
    body = "net (float16[4, 4] x) => (float16[4, 4] y) { " + nodes + " }"
    weights = {
        name: array
        for name, array in half({"b": f32([1, 2, 3, 4]), "low": f32(-65504), "high": f32(0.5)}).items()
        if name in nodes.replace("(", " ").replace(",", " ").replace(")", " ").split()
    }
    made, _ = check(parse(body, weights=weights), half(randoms(x=(4, 4))), tolerance=HALF_TOLERANCE)
    assert all(v.dtype != F16 for node in made.graph for v in node.outputs if not v.is_graph_output())


def test_subgraphs() -> None:
    body = """net (float16[2, 3] x, bool up) => (float16[2, 3] y) {
        t = Add (x, x)
        z = If (up) <
            then_branch = one () => (float16[2, 3] a) { a = Mul (t, k) },
            else_branch = other () => (float16[2, 3] b) { b = Sub (x, t) }
        >
        y = Relu (z)
    }"""
    model = parse(body, weights=half(randoms(k=(3,))))
    for up in (True, False):
        feeds = {**half(randoms(x=(2, 3))), "up": np.asarray(up)}
        made, _ = check(model, feeds, tolerance=HALF_TOLERANCE)
    assert ops(made)["Cast"] == 2


def test_a_loop_carries_float32() -> None:
    body = """net (float16[3] x, int64 n) => (float16[3] y) {
        more = Constant <value = bool {1}> ()
        y = Loop (n, more, x) <body = step (int64 i, bool go, float16[3] v) => (bool again, float16[3] w) {
            again = Identity (go)
            w = Mul (v, k)
        }>
    }"""
    model = parse(body, weights=half({"k": f32([0.5, 2, 0.25])}))
    feeds = {"x": f32([1, 2, 3]).astype(np.float16), "n": np.asarray(3)}
    made, _ = check(model, feeds, tolerance=0)
    np.testing.assert_array_equal(run(made, feeds)["y"], f32([0.125, 16, 3 / 64]).astype(np.float16))


def test_what_overflows_in_float16_does_not() -> None:
    body = "net (float16[1, 2] x) => (float16[1, 1] y) { p = MatMul (x, w) y = Mul (p, s) }"
    weights = half({"w": f32([[60000], [60000]]), "s": f32([0.25])})
    made, _ = normal(parse(body, weights=weights))
    assert run(made, {"x": np.ones((1, 2), np.float16)})["y"].item() == 30000


def test_bfloat16_inside() -> None:
    """onnxruntime has no CPU kernels for it, so the reference is the same model in float32."""
    nodes = MIXED.format(t="float").replace("to = 10", "to = 16")
    weights = randoms(**SHAPES)
    made, notes = normal(parse(nodes, weights=half(weights, ml_dtypes.bfloat16), opset=22))
    assert notes.half_precision.types == ("bfloat16",)
    exact = {k: v.astype(ml_dtypes.bfloat16).astype(np.float32) for k, v in weights.items()}
    twin = parse(MIXED.format(t="float").replace("to = 10", "to = 1"), weights=exact, opset=22)
    assert fingerprint(made) == fingerprint(normal(twin)[0])


FUSED = """net (float16[2, 4] x) => (float16[2, 4] y) {
    g = com.microsoft.FastGelu (x, b)
    y = Relu (g)
}"""
OWN = """<float16[2, 4] o> net (float16[2, 4] x) => (float16[2, 4] y) {
    a = Add (x, b)
    o = my.own.Op (a, b)
    y = Relu (o)
}"""


def of_other_domains(body: str, weights: dict[str, Array]) -> ir.Model:
    """A model with operators of other domains."""
    header = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft": 1, "my.own": 1]>\n'
    model = ir.from_onnx_text(header + body.replace("<float16[2, 4] o> ", ""))
    for name, array in weights.items():
        tensor = ir.tensor(array, name=name)
        shape = ir.Shape(array.shape)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        for node in model.graph:
            for index, used in enumerate(node.inputs):
                if used is not None and used.name == name:
                    node.replace_input_with(index, value)
        model.graph.register_initializer(value)
    if "<float16[2, 4] o>" in body:
        made = next(v for node in model.graph for v in node.outputs if v.name == "o")
        made.type, made.shape = ir.TensorType(F16), ir.Shape([2, 4])
    return model


def test_fused_operators_of_the_runtime() -> None:
    made, notes = check(
        of_other_domains(FUSED, half(randoms(b=(4,)))), half(randoms(x=(2, 4))), tolerance=4e-3
    )
    assert notes.half_precision.kept == ()
    assert ops(made) == {"Cast": 2, "FastGelu": 1, "Relu": 1}


def test_an_unknown_operator_keeps_its_types_and_is_noted() -> None:
    model = of_other_domains(OWN, half(randoms(b=(4,))))
    made, notes = normal(model)
    own = next(n for n in made.graph if n.op_type == "Op")
    assert [v.dtype for v in (*own.inputs, *own.outputs) if v is not None] == [F16] * 3
    add = next(n for n in made.graph if n.op_type == "Add")
    assert [v.dtype for v in (*add.inputs, *add.outputs) if v is not None] == [F32] * 3
    assert refusals(notes)["to_float32"].startswith("my.own::Op is not known to compute in float32")
    assert "'o'" in refusals(notes)["to_float32"]
    assert fingerprint(normal(made)[0]) == fingerprint(made)


def test_an_unknown_operator_must_state_its_types() -> None:
    model = of_other_domains(OWN.replace("<float16[2, 4] o> ", ""), half(randoms(b=(4,))))
    with pytest.raises(ModelError, match=r"node 'o' \(my.own::Op\).*type of its output 'o' is not stated"):
        normal(model)


def test_a_sequence_in_half_precision_is_refused_by_name() -> None:
    body = (
        "net (seq(float16[2]) x) => (float16[2] y) { i = Constant <value_int = 0> () y = SequenceAt (x, i) }"
    )
    with pytest.raises(ModelError, match=r"'x' is .*sequences in half precision"):
        normal(parse(body))


def test_large_weights_are_converted_when_they_are_read(tmp_path: Path) -> None:
    body = "net (float16[1, 2048] x) => (float16[1, 5000] y) { y = MatMul (x, w) }"
    weight = np.random.default_rng(0).normal(size=(2048, 5000)).astype(np.float16)
    save_model(parse(body, weights={"w": weight}), tmp_path / "m.onnx", external=True)
    model = load_model(tmp_path / "m.onnx")
    made, _ = normal(model)
    tensor = made.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.LazyTensor)
    np.testing.assert_array_equal(tensor.numpy(), weight.astype(np.float32))
    assert float32_bytes(model) == 2 * weight.nbytes


UNARY = ("Relu", "Tanh", "Neg", "Sigmoid", "Identity", "Cast <to = 1>", "Cast <to = 10>")
BINARY = ("Add", "Mul", "Sub", "Max")


@st.composite
def chains(draw: st.DrawFn) -> tuple[str, str]:
    """Nodes of a random graph: in half precision with Casts inserted, and the same all in float32."""
    values = [("x", 10), ("b", 10)]
    mixed: list[str] = []
    for index in range(draw(st.integers(1, 8))):
        op = draw(st.sampled_from([*UNARY, *BINARY]))
        first, dtype = draw(st.sampled_from(values))
        operands = [first]
        if op in BINARY:
            operands.append(draw(st.sampled_from([name for name, own in values if own == dtype])))
        mixed.append(f"v{index} = {op} ({', '.join(operands)})")
        values.append((f"v{index}", {"Cast <to = 1>": 1, "Cast <to = 10>": 10}.get(op, dtype)))
    last, _ = values[-1]
    plain = [re.sub("Cast <to = [0-9]*>", "Identity", line) for line in mixed]
    return "\n".join([*mixed, f"y = Cast <to = 10> ({last})"]), "\n".join([*plain, f"y = Identity ({last})"])


@settings(max_examples=60, deadline=None)
@given(chains())
def test_any_mixture_computes_the_same_as_in_float32(nodes: tuple[str, str]) -> None:
    mixed, plain = nodes
    weights = {"b": f32([0.5, -1.25, 3])}
    model = parse(f"net (float16[2, 3] x) => (float16[2, 3] y) {{ {mixed} }}", weights=half(weights))
    twin = parse(f"net (float[2, 3] x) => (float[2, 3] y) {{ {plain} }}", weights=weights)
    feeds = half(randoms(x=(2, 3)))
    made, _ = normal(model)
    assert fingerprint(normal(made)[0]) == fingerprint(made)
    exact = run(normal(twin)[0], {"x": feeds["x"].astype(np.float32)})["y"]
    assert difference(run(made, feeds), {"y": exact.astype(np.float16)}) == 0
    inner = {v.dtype for node in made.graph for v in node.outputs if not v.is_graph_output()}
    assert inner <= {F32}
