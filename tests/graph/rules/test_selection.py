import numpy as np
import onnx_ir as ir
import pytest
from support.normalizing import check
from support.onnx_models import Array, i64, ops, parse, randoms

from edgepack.ir.model import walk_nodes

TOLERANCE = 1e-5
TOKENS, CHANNELS, HEADS = 6, 8, 2
X = randoms(x=(3, TOKENS, CHANNELS))
WEIGHTS = randoms(
    wq=(8, 8), wk=(8, 8), wv=(8, 8), wo=(8, 8), w1=(8, 16), w2=(16, 8), bq=(8,), b1=(16,), g=(8,), b=(8,)
)
SHAPES = {"heads": i64([0, 0, HEADS, -1]), "joined": i64([0, 0, CHANNELS])}


def layer(shape: str = "joined", mask: str = "", last: str = "") -> str:
    """One encoder layer from ``x`` to ``z``; ``shape`` joins the heads again."""
    scores = f"raw = MatMul (q, k) scores = Add (raw, {mask})" if mask else "scores = MatMul (q, k)"
    return f"""
        mq = MatMul (x, wq) aq = Add (mq, bq) rq = Reshape (aq, heads)
        q = Transpose <perm = [0, 2, 1, 3]> (rq)
        mk = MatMul (x, wk) rk = Reshape (mk, heads) k = Transpose <perm = [0, 2, 3, 1]> (rk)
        mv = MatMul (x, wv) rv = Reshape (mv, heads) v = Transpose <perm = [0, 2, 1, 3]> (rv)
        {scores}
        p = Softmax <axis = -1> (scores)
        c = MatMul (p, v) tc = Transpose <perm = [0, 2, 1, 3]> (c) j = Reshape (tc, {shape})
        o = MatMul (j, wo) r1 = Add (o, x) n1 = LayerNormalization <axis = -1> (r1, g, b)
        h = MatMul (n1, w1) hb = Add (h, b1) a = Relu (hb) d = MatMul (a, w2) r2 = Add (d, n1)
        z = LayerNormalization <axis = -1> (r2, g, b) {last}"""


def rows(model: ir.Model) -> dict[str, object]:
    """How many tokens each MatMul with a weight computes, by its output."""
    products = [n for n in walk_nodes(model.graph) if n.op_type == "MatMul"]
    return {n.outputs[0].name: n.outputs[0].shape[-2] for n in products if n.outputs[0].shape is not None}  # type: ignore[misc]


def one_token(inputs: str, outputs: str, body: str, feeds: dict[str, Array], **more: Array) -> ir.Model:
    model = parse(f"net ({inputs}) => ({outputs}) {{ {body} }}", weights=WEIGHTS | SHAPES | more)
    normal, notes = check(model, feeds, tolerance=TOLERANCE)
    assert notes.applied.get("select_early") == 1
    return normal


@pytest.mark.parametrize("sizes", ["3, 6, 8", "n, 6, 8", "n, t, 8"])
@pytest.mark.parametrize("token", [0, -1])
def test_the_last_layer_works_on_one_token(sizes: str, token: int) -> None:
    body = layer(last="y = Gather <axis = 1> (z, at)")
    normal = one_token(f"float[{sizes}] x", "float[n, 8] y", body, X, at=i64(token))
    found = rows(normal)
    assert {found[name] for name in ("mq", "raw", "c", "o", "h", "d") if name in found} == {1}
    assert 1 not in (found["mk"], found["mv"])
    assert len([n for n in walk_nodes(normal.graph) if n.op_type == "Gather"]) == 2


def test_two_tokens() -> None:
    """A distilled classifier uses two."""
    body = layer(last="y = Gather <axis = 1> (z, first) e = Gather <axis = 1> (z, second)")
    more = {"first": i64(0), "second": i64(1)}
    normal = one_token("float[n, 6, 8] x", "float[n, 8] y, float[n, 8] e", body, X, **more)
    assert rows(normal)["d"] == 2


def test_a_slice_of_one() -> None:
    body = layer(last="y = Slice (z, start, end, axes)")
    more = {"start": i64([-1]), "end": i64([2**63 - 1]), "axes": i64([1])}
    normal = one_token("float[n, t, 8] x", "float[n, 1, 8] y", body, X, **more)
    assert rows(normal)["d"] == 1 and "Slice" not in ops(normal)


def test_masks_of_every_kind() -> None:
    """A mask that is broadcast along the tokens is unchanged, one with a row per token is selected too."""
    for mask in ("3, 1, 1, 6", "3, 1, 6, 6", "1, 2, 6, 6", "6, 6"):
        size = tuple(int(d) for d in mask.split(","))
        body = layer(mask="m", last="y = Gather <axis = 1> (z, at)")
        feeds = X | {"m": np.where(randoms(m=size)["m"] > 1, -1e4, 0).astype(np.float32)}
        inputs = f"float[n, t, 8] x, float[{mask}] m"
        assert rows(one_token(inputs, "float[n, 8] y", body, feeds, at=i64(0)))["d"] == 1


def test_a_shape_computed_at_run_time() -> None:
    """The sizes come from the input of the layer, and a mask of unknown size is added."""
    body = layer("computed", mask="m", last="y = Gather <axis = 1> (z, at)").replace(
        "mq =",
        """s = Shape (x) s0 = Gather (s, zero) s1 = Gather (s, one)
        computed = Concat <axis = 0> (s0, s1, rest) mq =""",
        1,
    )
    more = {"zero": i64([0]), "one": i64([1]), "rest": i64([-1]), "at": i64(0)}
    feeds = X | randoms(m=(3, 1, 6, 6))
    normal = one_token("float[n, t, 8] x, float[k, l, i, j] m", "float[n, 8] y", body, feeds, **more)
    assert rows(normal)["mq"] == 1


@pytest.mark.parametrize(
    ("last", "why"),
    [
        ("y = Gather <axis = 1> (z, at) e = Relu (z)", "all tokens are read"),
        ("y = Gather <axis = 1> (z, at) e = ReduceMean <keepdims = 0, axes = [1]> (z)", "their mean is read"),
        ("y = Gather <axis = 1> (z, many) e = Identity (y)", "most tokens are read"),
    ],
)
def test_what_is_not_rewritten(last: str, why: str) -> None:
    outputs = "float[n, m, 8] y, float[n, m, 8] e" if "many" in last else "float[n, 8] y, float[n, m, 8] e"
    outputs = outputs.replace("m, 8] e", "8] e") if "ReduceMean" in last else outputs
    weights = WEIGHTS | SHAPES | {"at": i64(0), "many": i64([0, 1, 2, 3])}
    model = parse(f"net (float[n, 6, 8] x) => ({outputs}) {{ {layer(last=last)} }}", weights=weights)
    _, notes = check(model, X, tolerance=TOLERANCE)
    assert "select_early" not in notes.applied, why


def test_tokens_that_depend_on_each_other_are_kept() -> None:
    """A convolution or a softmax over tokens needs all of them."""
    body = """net (float[n, 6, 8] x) => (float[n, 8] y) {
        h = MatMul (x, wq) s = Softmax <axis = 1> (h) y = Gather <axis = 1> (s, at)
    }"""
    _, notes = check(parse(body, weights=WEIGHTS | {"at": i64(0)}), X, tolerance=TOLERANCE)
    assert "select_early" not in notes.applied


def test_without_a_matmul_nothing_is_gained() -> None:
    body = "net (float[n, 6, 8] x) => (float[n, 8] y) { h = Relu (x) y = Gather <axis = 1> (h, at) }"
    _, notes = check(parse(body, weights={"at": i64(0)}), X)
    assert "select_early" not in notes.applied


def test_a_middle_token_of_unknown_sizes_stays_where_sizes_might_repeat() -> None:
    body = """net (float[n, t, 8] x, float[n, u, 8] e) => (float[n, 8] y) {
        h = MatMul (x, wq) s = Add (h, e) y = Gather <axis = 1> (s, at)
    }"""
    feeds = X | randoms(e=(3, 1, 8))
    _, notes = check(parse(body, weights=WEIGHTS | {"at": i64(2)}), feeds)
    assert "select_early" not in notes.applied
