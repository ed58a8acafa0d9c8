"""Einsum written as MatMul."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.normalizing import check
from support.onnx_models import f32, ops, parse, randoms

from edgepack.graph.rules.einsum import einsum

SIZES = {"a": 2, "b": 3, "c": 4, "d": 5, "e": 6, "f": 2}


def shape(letters: str) -> tuple[int, ...]:
    return tuple(SIZES[c] for c in letters)


def typed(letters: str, *, open_sizes: bool) -> str:
    return ", ".join(f"N{c}" if open_sizes else str(SIZES[c]) for c in letters)


def net(
    equation: str, *, constant: int | None, open_sizes: bool = False
) -> tuple[str, dict[str, tuple[int, ...]]]:
    """The text of a model, and the shapes of its inputs and constants."""
    left, right = equation.partition("->")[0].split(",")
    names = {"x": left, "z": right}
    fed = [n for i, n in enumerate(names) if i != constant]
    inputs = ", ".join(f"float[{typed(names[n], open_sizes=open_sizes)}] {n}" for n in fed)
    out = ", ".join(f"o{i}" for i in range(len(equation.partition("->")[2])))
    body = f'net ({inputs}) => (float[{out}] y) {{ y = Einsum <equation = "{equation}"> (x, z) }}'
    return body, {n: shape(letters) for n, letters in names.items()}


@pytest.mark.parametrize("open_sizes", [False, True])
@pytest.mark.parametrize(
    ("equation", "constant", "expected"),
    [
        ("abc,cd->abd", 1, {"MatMul": 1}),
        ("abc,dc->abd", 1, {"MatMul": 1}),
        ("abc,dce->adbe", 1, {"MatMul": 1, "Reshape": 1, "Transpose": 1}),
        ("abcd,cde->abe", 1, {"MatMul": 1, "Reshape": 1}),
        ("cd,abc->abd", 0, {"MatMul": 1}),
        ("acb,cd->dab", 1, {"MatMul": 1, "Transpose": 2}),
        ("abcd,abde->abce", None, {"MatMul": 1}),
        ("aebd,acbd->abec", None, {"MatMul": 1, "Transpose": 2}),
        ("abec,acbd->aebd", None, {"MatMul": 1, "Transpose": 2}),
    ],
)
def test_products(equation: str, constant: int | None, expected: dict[str, int], open_sizes: bool) -> None:
    body, shapes = net(equation, constant=constant, open_sizes=open_sizes)
    arrays = randoms(**shapes)
    held = {} if constant is None else {("x", "z")[constant]: arrays.pop(("x", "z")[constant])}
    normal, notes = check(parse(body, weights=held), arrays)
    assert ops(normal) == expected
    assert notes.applied["einsum"] == 1


@pytest.mark.parametrize(
    ("equation", "constant", "reason"),
    [
        ("abc,bcd->abd", 1, "the constant has batch axes"),
        ("abc,c->ab", 1, "a matrix-vector or outer product"),
        ("ab,cd->abcd", 1, "a matrix-vector or outer product"),
        ("abc,ad->bd", None, "it sums over an axis of one operand"),
        ("abcd,abcd->ab", None, "a matrix-vector or outer product"),
        ("abcf,adcf->abd", None, "two activations are summed over several axes"),
        ("aab,bc->ac", None, "an axis is repeated: a diagonal"),
        ("ab,bc", None, "its equation leaves axes to be inferred"),
    ],
)
def test_an_equation_that_is_no_matrix_product(equation: str, constant: int | None, reason: str) -> None:
    body, shapes = net(equation, constant=constant)
    body = body if "->" in equation else body.replace("float[] y", "float[o0, o1] y")
    arrays = {n: f32(np.random.default_rng(1).normal(size=s)) for n, s in shapes.items()}
    held = {} if constant is None else {("x", "z")[constant]: arrays.pop(("x", "z")[constant])}
    normal, _ = check(parse(body, weights=held), arrays)
    assert ops(normal)["Einsum"] == 1
    graph = parse(body, weights=held).graph
    assert einsum(graph, graph[0]) == reason


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_equation_keeps_its_meaning(data: st.DataObject) -> None:
    letters = "abcde"
    left = "".join(data.draw(st.permutations(letters))[: data.draw(st.integers(1, 4))])
    right = "".join(data.draw(st.permutations(letters))[: data.draw(st.integers(1, 4))])
    every = "".join(dict.fromkeys(left + right))
    out = "".join(data.draw(st.permutations(every))[: data.draw(st.integers(1, len(every)))])
    constant = data.draw(st.sampled_from([None, 0, 1]))
    body, shapes = net(f"{left},{right}->{out}", constant=constant)
    arrays = randoms(**shapes)
    held = {} if constant is None else {("x", "z")[constant]: arrays.pop(("x", "z")[constant])}
    check(parse(body, weights=held), arrays, tolerance=1e-5)
