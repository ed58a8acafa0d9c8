"""The tanh approximation of GELU, in the decompositions of several exporters."""

import numpy as np
import pytest
from support.normalizing import check
from support.onnx_models import f32, ops, parse, randoms

from edgepack.graph.normalize import normalize

NUMBERS = {
    "half": f32(0.5), "one": f32(1), "k": f32((2 / np.pi) ** 0.5), "c": f32(0.044715), "three": f32(3),
    "two": f32(2), "kc": f32(0.044715 * (2 / np.pi) ** 0.5), "other": f32(0.05), "sixth": f32(1 / 6),
}  # fmt: skip
SPELLED = {
    "torch": """h = Mul (x, half) s = Mul (x, x) q = Mul (s, x) m = Mul (q, c) a = Add (x, m) u = Mul (a, k)
        t = Tanh (u) o = Add (t, one) y = Mul (h, o)""",
    "tensorflow": """q = Pow (x, three) m = Mul (c, q) a = Add (x, m) u = Mul (k, a) t = Tanh (u)
        o = Add (one, t) h = Mul (half, x) y = Mul (h, o)""",
    "jax": """q = Pow (x, three) m = Mul (c, q) a = Add (x, m) u = Mul (k, a) t = Tanh (u)
        o = Add (one, t) h = Mul (half, o) y = Mul (x, h)""",
    "factored": """s = Pow (x, two) m = Mul (c, s) b = Add (one, m) g = Mul (k, x) u = Mul (g, b) t = Tanh (u)
        o = Add (t, one) d = Div (o, two) y = Mul (d, x)""",
    "distributed": """s = Mul (x, x) q = Mul (x, s) m = Mul (kc, q) g = Mul (x, k) u = Add (m, g) t = Tanh (u)
        o = Add (t, one) h = Mul (x, half) y = Mul (o, h)""",
}


def net(nodes: str, before: str = "") -> str:
    given = "x" if not before else "z"
    return f"net (float[2, 6, 8] {given}) => (float[2, 6, 8] y) {{ {before} {nodes} }}"


@pytest.mark.parametrize("before", ["", "x = Mul (z, z)", "x = Add (z, three)"])
@pytest.mark.parametrize("name", SPELLED)
def test_decompositions_of_exporters(name: str, before: str) -> None:
    model = parse(net(SPELLED[name], before), weights=NUMBERS)
    normal, notes = check(model, randoms(**{"z" if before else "x": (2, 6, 8)}), tolerance=1e-5)
    assert ops(normal)["Gelu"] == 1 and ops(normal)["Tanh"] == 0, ops(normal)
    assert notes.opset_after == 20


@pytest.mark.parametrize(
    "nodes",
    [
        SPELLED["torch"].replace("Mul (q, c)", "Mul (q, other)"),
        SPELLED["torch"].replace("Add (t, one)", "Add (t, half)"),
        SPELLED["torch"].replace("Mul (x, half)", "Mul (x, two)"),
        SPELLED["torch"].replace("Tanh (u)", "Sigmoid (u)"),
        SPELLED["tensorflow"].replace("Pow (x, three)", "Pow (x, two)"),
    ],
)
def test_similar_graphs_are_not_rewritten(nodes: str) -> None:
    normal, notes = check(parse(net(nodes), weights=NUMBERS), randoms(x=(2, 6, 8)), tolerance=1e-5)
    assert "Gelu" not in ops(normal)
    assert notes.opset_after == 17


def test_a_target_without_the_operator() -> None:
    normal, notes = normalize(parse(net(SPELLED["torch"]), weights=NUMBERS), min_opset=13, max_opset=19)
    assert ops(normal)["Tanh"] == 1 and notes.opset_after == 17
