"""Channel padding: depthwise convolutions of 24 channels get 32, and the outputs stay the same."""

import re

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass
from support.onnx_models import Array, f32, parse, run
from support.quantizing import weight

from edgepack.graph.pad_channels import pad_depthwise

HEAD = "net (float[2, 6, 9, 8] x) => (float[a, b, c, d] y) {"
BLOCK = {
    "w": weight(24, 6, 1, 1), "b": weight(24, seed=2), "d": weight(24, 1, 3, 3, seed=3),
    "e": weight(24, seed=4), "v": weight(5, 24, 1, 1, seed=5),
}  # fmt: skip
DEPTHWISE = "Conv <group = 24, pads = [1, 1, 1, 1]>"
SQUEEZE = {
    "s": weight(4, 24, 1, 1, seed=6), "t": weight(24, 4, 1, 1, seed=7), "u": weight(24, seed=8),
    "three": f32(3), "k": weight(1, 24, 1, 1, seed=9), "n": weight(24, 1, 1, seed=10),
    "d2": weight(24, 1, 5, 5, seed=11), "lo": f32(-1), "hi": f32(1.5),
}  # fmt: skip

WIDENED = {
    "plain": f"h = Conv (x, w) c = {DEPTHWISE} (h, d) y = Conv (c, v)",
    "biases and activations": f"h = Conv (x, w, b) r = Clip (h, lo, hi) c = {DEPTHWISE} (r, d, e)"
    " q = HardSwish (c) y = Conv (q, v)",
    "two readers": f"h = Conv (x, w, b) c = {DEPTHWISE} (h, d, e) p = Conv (c, v) q = Conv (c, v)"
    " y = Add (p, q)",
    "read before": f"h = Conv (x, w, b) r = Relu (h) c = {DEPTHWISE} (r, d, e) p = Conv (c, v)"
    " q = Conv (r, v) y = Add (p, q)",
    "squeeze and excitation": f"h = Conv (x, w, b) c = {DEPTHWISE} (h, d, e) r = Relu (c)"
    " g = GlobalAveragePool (r) i = Conv (g, s) j = Relu (i) l = Conv (i, t, u) m = HardSigmoid (l)"
    " q = Mul (r, m) y = Conv (q, v)",
    "constants by channel": f"h = Conv (x, w, b) z = Mul (h, k) c = {DEPTHWISE} (z, d, e) r = Add (n, c)"
    " q = Mul (r, three) y = Conv (q, v)",
    "residual inside": f"h = Conv (x, w, b) c = {DEPTHWISE} (h, d, e) r = Add (h, c) y = Conv (r, v)",
    "two in a row": f"h = Conv (x, w, b) c = {DEPTHWISE} (h, d, e) r = Relu (c)"
    " f = Conv <group = 24> (r, d2) y = Conv (f, v)",
}


def depthwise(model: ir.Model) -> list[int]:
    groups = [n.attributes.get_int("group", 1) for n in model.graph if n.op_type == "Conv"]
    return [group for group in groups if group > 1]


def parsed(nodes: str, weights: dict[str, Array]) -> ir.Model:
    used = {k: v for k, v in weights.items() if re.search(rf"\b{k}\b", nodes)}
    return ShapeInferencePass()(parse(f"{HEAD} {nodes} }}", weights=used)).model


@pytest.mark.parametrize("name", WIDENED)
def test_the_function_is_the_same(name: str) -> None:
    model = parsed(WIDENED[name], BLOCK | SQUEEZE)
    before = [v.const_value.numpy().copy() for v in model.graph.initializers.values() if v.const_value]
    wide, count = pad_depthwise(model, 16)
    assert depthwise(wide) == [32] * count and count == len(depthwise(model))
    feeds = {"x": weight(2, 6, 9, 8, seed=20)}
    np.testing.assert_allclose(run(wide, feeds)["y"], run(model, feeds)["y"], rtol=1e-5, atol=1e-5)
    after = [v.const_value.numpy() for v in model.graph.initializers.values() if v.const_value]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


REFUSED = {
    "of the input": "y = Conv <group = 6> (x, o)",
    "graph output": f"h = Conv (x, w) y = {DEPTHWISE} (h, d)",
    "concatenated": f"h = Conv (x, w) c = {DEPTHWISE} (h, d) q = Concat <axis = 1> (c, h) y = Conv (q, big)",
    "grouped reader": f"h = Conv (x, w) c = {DEPTHWISE} (h, d) y = Conv <group = 2> (c, half)",
    "broadcast": f"h = Conv (x, w) c = {DEPTHWISE} (h, d) m = Conv (x, one) q = Mul (c, m) y = Conv (q, v)",
    "normalized over channels": f"h = Conv (x, w) c = {DEPTHWISE} (h, d) q = Softmax <axis = 1> (c)"
    " y = Conv (q, v)",
    "multiplied": "h = Conv (x, w) c = Conv <group = 24> (h, two) y = Conv (c, big)",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_channels_that_cannot_grow_are_not_padded(name: str) -> None:
    other = {
        "o": weight(6, 1, 3, 3), "big": weight(5, 48, 1, 1), "half": weight(6, 12, 1, 1),
        "one": weight(1, 6, 1, 1), "two": weight(48, 1, 3, 3),
    }  # fmt: skip
    model = parsed(REFUSED[name], BLOCK | other)
    wide, count = pad_depthwise(model, 16)
    assert count == 0
    assert depthwise(wide) == depthwise(model)


@pytest.mark.parametrize(("channels", "grown"), [(16, 16), (24, 32), (30, 32), (8, 8), (20, 20), (33, 48)])
def test_no_more_than_half_is_added(channels: int, grown: int) -> None:
    nodes = f"h = Conv (x, w) c = Conv <group = {channels}> (h, d) y = Conv (c, v)"
    weights = {"w": weight(channels, 6, 1, 1), "d": weight(channels, 1, 3, 3), "v": weight(5, channels, 1, 1)}
    assert depthwise(pad_depthwise(parsed(nodes, weights), 16)[0]) == [grown]
