import numpy as np
import pytest
from support.normalizing import check
from support.onnx_models import Array, ops, parse, randoms

X = randoms(x=(3, 4, 5))


def test_selection_keeps_its_axis() -> None:
    body = """net (float[n, 4, 5] x) => (float[n, 1, 5] y) {
        i = Constant <value = int64 {-2}> ()
        g = Gather <axis = 1> (x, i)
        one = Constant <value = int64[1] {1}> ()
        y = Unsqueeze (g, one)
    }"""
    normal, _ = check(parse(body), X)
    assert ops(normal) == {"Gather": 1}


def test_unsqueeze_elsewhere_stays() -> None:
    body = """net (float[n, 4, 5] x) => (float[n, 5, 1] y) {
        i = Constant <value = int64 {2}> ()
        g = Gather <axis = 1> (x, i)
        two = Constant <value = int64[1] {2}> ()
        y = Unsqueeze (g, two)
    }"""
    normal, _ = check(parse(body), X)
    assert ops(normal) == {"Gather": 1, "Unsqueeze": 1}


def test_pairs_of_a_matrix_become_one_selection() -> None:
    """As PyTorch exports ``x[:, rows, columns]`` of an interaction."""
    pairs = [(1, 0), (2, 0), (2, 1), (-1, 3)]
    lines = []
    for k, (i, j) in enumerate(pairs):
        lines.append(f"""
        i{k} = Constant <value = int64 {{{i}}}> ()
        j{k} = Constant <value = int64 {{{j}}}> ()
        r{k} = Gather <axis = 1> (x, i{k})
        e{k} = Gather <axis = 1> (r{k}, j{k})
        u{k} = Unsqueeze (e{k}, one)""")
    names = ", ".join(f"u{k}" for k in range(len(pairs)))
    body = f"""net (float[n, 4, 5] x, float[n, 2] z) => (float[n, 6] y) {{
        one = Constant <value = int64[1] {{1}}> () {"".join(lines)}
        y = Concat <axis = 1> ({names}, z)
    }}"""
    normal, _ = check(parse(body), X | randoms(z=(3, 2)))
    assert ops(normal) == {"Reshape": 1, "Gather": 1, "Concat": 1}


@pytest.mark.parametrize(("axis", "left"), [(1, {"Concat", "Reshape"}), (2, {"Unsqueeze", "Concat"})])
def test_stack(axis: int, left: set[str]) -> None:
    """Stacking along the last axis would need the values moved: it stays."""
    shape = "n, 2, 5" if axis == 1 else "n, 5, 2"
    body = f"""net (float[n, 5] a, float[n, 5] b) => (float[{shape}] y) {{
        at = Constant <value = int64[1] {{{axis}}}> ()
        u = Unsqueeze (a, at)
        v = Unsqueeze (b, at)
        y = Concat <axis = {axis}> (u, v)
    }}"""
    normal, _ = check(parse(body), randoms(a=(3, 5), b=(3, 5)))
    assert set(ops(normal)) == left


def test_stack_then_flatten_is_a_join() -> None:
    body = """net (float[n, 5] a, float[n, 5] b) => (float[n, 10] y) {
        at = Constant <value = int64[1] {1}> ()
        u = Unsqueeze (a, at)
        v = Unsqueeze (b, at)
        s = Concat <axis = 1> (u, v)
        f = Flatten (s)
        y = Relu (f)
    }"""
    feeds: dict[str, Array] = randoms(a=(3, 5), b=(3, 5))
    normal, _ = check(parse(body), feeds)
    assert ops(normal) == {"Concat": 1, "Relu": 1}
    assert all(np.isfinite(v).all() for v in feeds.values())


def test_different_tensors_are_not_merged() -> None:
    body = """net (float[n, 4] a, float[n, 4] b) => (float[n, 2] y) {
        i = Constant <value = int64[1] {1}> ()
        u = Gather <axis = 1> (a, i)
        v = Gather <axis = 1> (b, i)
        y = Concat <axis = 1> (u, v)
    }"""
    normal, _ = check(parse(body), randoms(a=(3, 4), b=(3, 4)))
    assert ops(normal) == {"Gather": 2, "Concat": 1}
