"""Names of constants that normalization and passes have changed are restored where possible."""

import numpy as np
from support.onnx_models import f32, parse, run

from edgepack.graph.constant_names import restore_constant_names
from edgepack.graph.normalize import normalize

BATCH_NORM = """net (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y{more}) {{
    c = Conv (x, w)
    y = BatchNormalization (c, gain, shift, mean, spread)
    {rest}
}}"""
WEIGHTS = {
    "w": f32(np.random.default_rng(0).normal(size=(2, 2, 1, 1))),
    "gain": f32([1.5, 0.5]),
    "shift": f32([0.1, -0.2]),
    "mean": f32([0.3, 0.4]),
    "spread": f32([1.0, 2.0]),
}
X = f32(np.random.default_rng(1).normal(size=(1, 2, 4, 4)))


def test_a_folded_weight_gets_the_original_name() -> None:
    original = parse(BATCH_NORM.format(more="", rest=""), weights=WEIGHTS)
    model, _ = normalize(original, min_opset=13, max_opset=21)
    assert "w" not in model.graph.initializers
    before = run(model, {"x": X})["y"]
    restore_constant_names(model, original)
    (conv,) = model.graph
    assert conv.inputs[1] is not None and conv.inputs[1].name == "w"
    assert "w" in model.graph.initializers
    assert np.array_equal(run(model, {"x": X})["y"], before)


def test_the_name_stays_with_the_constant_that_the_model_still_has() -> None:
    body = BATCH_NORM.format(more=", float[1, 2, 4, 4] z", rest="z = Conv (x, w)")
    original = parse(body, weights=WEIGHTS)
    model, _ = normalize(original, min_opset=13, max_opset=21)
    expected = run(model, {"x": X})
    restore_constant_names(model, original)
    names = {node.outputs[0].name: node.inputs[1].name for node in model.graph if node.inputs[1] is not None}
    assert names == {"y": "w_folded", "z": "w"}
    assert all(np.array_equal(a, expected[key]) for key, a in run(model, {"x": X}).items())


def test_original_names_with_such_a_suffix_are_kept() -> None:
    body = "net (float[1, 4] x) => (float[1, 4] y) { a = Add (x, w_folded) y = Mul (a, v_1) }"
    original = parse(body, weights={"w_folded": f32([1, 2, 3, 4]), "v_1": f32([4, 3, 2, 1])})
    model = original.clone()
    restore_constant_names(model, original)
    assert set(model.graph.initializers) == {"w_folded", "v_1"}
