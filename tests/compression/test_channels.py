"""Channels: which live or die together, what pins them, and that a model without some of them is right."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.channel_nets import CONV, IMAGE, PRUNED, W, model_of
from support.onnx_models import Array, difference, f32, i64, parse, run
from support.quantizing import weight

from edgepack.compression.channels.atoms import find_groups
from edgepack.compression.channels.reshape import segments
from edgepack.compression.channels.rules import find_channels
from edgepack.compression.operands import replace_operand
from edgepack.compression.slim import slim
from edgepack.graph.normalize import normalize
from edgepack.ir.files import load_model
from edgepack.ir.inputs import InputSpec, input_specs
from edgepack.ir.model import clone
from edgepack.quantization.weights.matrix import weight_of

FLAT = (
    f"net (float[1, 6, 8, 8] x) => (float[1, 7] y) {{ {CONV}"
    " l = MaxPool <kernel_shape = [2, 2], strides = [2, 2]>"
)


def cut_some(model: ir.Model, share: float, seed: int = 0) -> tuple[ir.Model, ir.Model, int]:
    """A model without some of its channels; the whole model, whose readers do not look at those; how many."""
    channels = find_channels(model)
    roots, rng = channels.roots(), np.random.default_rng(seed)
    alive = np.ones(len(roots), np.bool_)
    gone = 0
    for group in find_groups(channels):
        for one in rng.permutation(group.classes)[: round(share * len(group.classes))].tolist():
            without = alive & (roots != one)
            if all(without[track.atoms].any() for track in channels.tracks.values()):
                alive, gone = without, gone + 1
    masked = clone(model)
    twins = dict(zip(model.graph, masked.graph, strict=True))
    for node, atoms in channels.consumers:
        axis = next(c.axis for c in channels.cuts if c.node is node and c.index == 1 and c.atoms is atoms)
        content = np.moveaxis(weight_of(twins[node]).copy(), axis, 0)
        content[~alive[atoms]] = 0
        replace_operand(masked.graph, twins[node], 1, np.moveaxis(content, 0, axis), "masked")
    return slim(model, channels, alive), masked, gone


def check_sizes(model: ir.Model) -> None:
    """The checker with what it infers, against what the model states."""
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def assert_right(model: ir.Model, feeds: dict[str, Array], share: float, seed: int = 0) -> int:
    pruned, masked, gone = cut_some(model, share, seed)
    check_sizes(pruned)
    # Run without the declared shapes of inner values: the runtime infers them.
    assert difference(run(masked, feeds), run(pruned, feeds)) < 1e-4
    return gone


X: dict[str, Array] = {"x": np.random.default_rng(5).normal(size=(1, 6, 8, 8)).astype(np.float32)}


@pytest.mark.parametrize("share", [0.2, 0.6])
@pytest.mark.parametrize("name", PRUNED)
def test_the_rest_computes_what_it_did(name: str, share: float) -> None:
    model = model_of(f"{IMAGE} {{ {PRUNED[name]} }}")
    before = [v.const_value.numpy().copy() for v in model.graph.initializers.values() if v.const_value]
    assert assert_right(model, X, share) > 0
    after = [v.const_value.numpy() for v in model.graph.initializers.values() if v.const_value]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("flatten", ["f = Flatten (l)", "f = Reshape (l, flat)"])
def test_channels_reach_a_product_through_flattening(flatten: str) -> None:
    assert assert_right(model_of(f"{FLAT} (h) {flatten} y = MatMul (f, fc) }}"), X, 0.5) > 2


REFUSED = {
    "softmax over channels": (f"{CONV} r = Softmax <axis = 1> (h) y = Conv (r, v)", "works across channels"),
    "an input that stays": (
        f"{CONV} l = Gather <axis = 1> (x, twelve) r = Add (h, l) y = Conv (r, v)",
        "must stay",
    ),
    "a mean over channels": (
        f"{CONV} l = ReduceMean <axes = [1]> (h) m = Mul (h, l) y = Conv (m, v)",
        "works across channels",
    ),
    "an unknown operator": (
        f"{CONV} l = LRN <size = 3> (h) y = Conv (l, v)",
        "has no channel rule",
    ),
    "an output": (f"{CONV} y = Relu (h)", "is an output of the model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_has_its_reason(name: str) -> None:
    text, reason = REFUSED[name]
    weights = W | {"twelve": i64(list(range(6)) * 2), "three": f32([[[[3]]]])}
    found = find_channels(model_of(f"{IMAGE} {{ {text} }}", weights))
    group = find_groups(found)[0]
    assert not len(group.classes) and reason in group.pinned


def test_the_order_of_split_channels_is_followed() -> None:
    found = find_channels(model_of(f"{IMAGE} {{ {PRUNED['split']} }}"))
    (group, last) = find_groups(found)
    assert len(group.classes) == 6 and len(group.widest) == 12 and not len(last.classes)


def test_kept_by_name() -> None:
    model = model_of(f"{IMAGE} {{ {CONV} k = Conv (x, w2) p = Conv (h, v) q = Conv (k, v) y = Add (p, q) }}")
    channels = find_channels(model)
    first = channels.producers[0][0].name
    assert first is not None
    groups = find_groups(channels, frozenset([first]))
    assert [len(g.classes) for g in groups[:2]] == [0, 12] and "is excluded by `keep`" in groups[0].pinned


# --- attention -------------------------------------------------------------------------------------------

HEADS = 4
ATTENTION = """net (float[1, 5, 16] x) => (float[1, 5, 6] y) {
    q1 = MatMul (x, wq) q2 = Add (q1, bq) q3 = Reshape (q2, split) q = Transpose <perm = [0, 2, 1, 3]> (q3)
    k1 = MatMul (x, wk) k3 = Reshape (k1, split) k = Transpose <perm = [0, 2, 3, 1]> (k3)
    v1 = MatMul (x, wv) v3 = Reshape (v1, split) v = Transpose <perm = [0, 2, 1, 3]> (v3)
    a = MatMul (q, k) s = Softmax <axis = -1> (a) c = MatMul (s, v)
    t = Transpose <perm = [0, 2, 1, 3]> (c) u = Reshape (t, join) y = MatMul (u, wo)
}"""
FUSED = """net (float[1, 5, 16] x) => (float[1, 5, 6] y) {
    p = MatMul (x, wqkv) r = Reshape (p, three) t = Transpose <perm = [2, 0, 3, 1, 4]> (r)
    q = Gather <axis = 0> (t, i0) k1 = Gather <axis = 0> (t, i1) v = Gather <axis = 0> (t, i2)
    k = Transpose <perm = [0, 1, 3, 2]> (k1) a = MatMul (q, k) s = Softmax <axis = -1> (a) c = MatMul (s, v)
    z = Transpose <perm = [0, 2, 1, 3]> (c) u = Reshape (z, join) y = MatMul (u, wo)
}"""
ATTENTION_WEIGHTS = {
    "wq": weight(16, 12), "wk": weight(16, 12, seed=1), "wv": weight(16, 12, seed=2),
    "wo": weight(12, 6, seed=3),
    "bq": weight(12, seed=4), "split": i64([0, -1, HEADS, 3]), "join": i64([1, 5, 12]),
    "wqkv": weight(16, 36, seed=5), "three": i64([1, 5, 3, HEADS, 3]), "i0": i64(0),
    "i1": i64(1), "i2": i64(2),
}  # fmt: skip


@pytest.mark.parametrize("text", [ATTENTION, FUSED])
def test_attention_heads_go_as_a_whole(text: str) -> None:
    model = model_of(text, ATTENTION_WEIGHTS)
    group = find_groups(find_channels(model))[0]
    assert len(group.classes) == HEADS
    feeds = {"x": np.random.default_rng(1).normal(size=(1, 5, 16)).astype(np.float32)}
    assert assert_right(model, feeds, 0.5) == HEADS // 2


def test_attention_heads_go_under_a_mask_whose_shape_is_computed() -> None:
    """As PyTorch exports BERT: the mask is expanded to sizes of which one is told to stay what it is."""
    masked = """net (float[n, 5, 16] x, float[n, 1, 1, l] m) => (float[n, 5, 6] y) {
        shape = Shape (m) n0 = Gather (shape, i0) l = Gather (shape, last)
        sizes = Concat <axis = 0> (n0, keep, l, l) told = Equal (sizes, less) w = Where (told, ones, sizes)
        mask = Expand (m, w)"""
    body = masked + ATTENTION.partition("{")[2].replace(
        "s = Softmax <axis = -1> (a)", "am = Add (a, mask) s = Softmax <axis = -1> (am)"
    )
    vector = {
        "i0": i64([0]),
        "last": i64([3]),
        "keep": i64([-1]),
        "less": i64([-1] * 4),
        "ones": i64([1] * 4),
    }
    held = {**ATTENTION_WEIGHTS, **vector, "join": i64([0, 5, 12])}
    model, _ = normalize(parse(body, weights=held), min_opset=13, max_opset=21)
    (group, *_) = find_groups(find_channels(model))
    assert len(group.classes) == HEADS
    rng = np.random.default_rng(1)
    feeds = {"x": f32(rng.normal(size=(2, 5, 16))), "m": f32(rng.normal(size=(2, 1, 1, 5)))}
    assert assert_right(model, feeds, 0.5) == HEADS // 2


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([1, 48, 4, 4], [24, 2, 16], [([1], [0, 1]), ([2, 3], [2])]),
        (["n", 12, 4, 4], ["n", 192], [([0], [0]), ([1, 2, 3], [1])]),
        (["n", "s", 12], ["n", "s", 3, 4], [([0], [0]), ([1], [1]), ([2], [2, 3])]),
        (["n", 6, "h", "w"], ["n", 6, "k"], [([0], [0]), ([1], [1])]),
        (["n", "s", 3, 4], ["k", 12], [([2, 3], [1])]),
        ([4, 6], [8, 3], [([0, 1], [0, 1])]),
    ],
)
def test_runs_of_axes_with_the_same_elements(
    before: list[Any], after: list[Any], expected: list[Any]
) -> None:
    assert segments(before, after) == expected


# --- random graphs ---------------------------------------------------------------------------------------

LAYERS = (
    "{y} = Relu ({x})",
    "{y} = Conv <pads = [1, 1, 1, 1]> ({x}, {w}, {b})",
    "{y} = Conv <pads = [1, 1, 1, 1], group = 12> ({x}, {d}, {b})",
    "{y} = Conv <group = 4> ({x}, {g})",
    "{y} = ConvTranspose ({x}, {tt})",
    "{y} = Add ({x}, {older})",
    "{y} = Mul ({older}, {x})",
    "{y} = Mul ({x}, {slope})",
    "{y}_r = Reshape ({x}, two) {y}_t = Transpose <perm = [0, 2, 1, 3, 4]> ({y}_r)"
    " {y} = Reshape ({y}_t, back)",
    "{y}_a, {y}_b = Split <axis = 1> ({x}, six) {y} = Concat <axis = 1> ({y}_b, {y}_a)",
    "{y}_c = Concat <axis = 1> ({x}, {older}) {y} = Conv ({y}_c, {w24})",
    "{y}_a = Slice ({x}, from, to, one) {y}_c = Concat <axis = 1> ({y}_a, {x}) {y} = Conv ({y}_c, {w19})",
    "{y}_p = GlobalAveragePool ({x}) {y}_s = Sigmoid ({y}_p) {y} = Mul ({x}, {y}_s)",
    "{y} = MatMul ({x}, {rows})",
    "{y} = Softmax <axis = -1> ({x})",
    "{y}_m = ReduceMean <axes = [1]> ({x}) {y} = Sub ({x}, {y}_m)",
)
SHAPES = {
    "w": (12, 12, 3, 3), "b": (12,), "d": (12, 1, 3, 3), "g": (12, 3, 1, 1), "tt": (12, 12, 1, 1),
    "slope": (12, 1, 1), "w24": (12, 24, 1, 1), "w19": (12, 19, 1, 1), "rows": (8, 8),
}  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    chosen=st.lists(st.sampled_from(LAYERS), min_size=2, max_size=9),
    share=st.floats(0.1, 0.7),
    seed=st.integers(0, 2**16),
)
def test_random_networks(chosen: list[str], share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lines, values = ["h0 = Conv <pads = [1, 1, 1, 1]> (x, w, b)"], ["h0"]
    arrays = dict(W)
    for number, layer in enumerate(chosen, 1):
        own = {name: f"{name}_{number}" for name in SHAPES if f"{{{name}}}" in layer}
        for name, called in own.items():
            size = SHAPES[name]
            arrays[called] = np.asarray(rng.normal(size=size) / np.sqrt(np.prod(size[1:])), np.float32)
        older = values[int(rng.integers(len(values)))]
        lines.append(layer.format(y=f"h{number}", x=values[-1], older=older, **own))
        values.append(f"h{number}")
    lines.append(f"y = Conv ({values[-1]}, v)")
    model = model_of(f"{IMAGE} {{ {'  '.join(lines)} }}", arrays)
    assert_right(model, X, share, seed)


# --- the suite of real models ----------------------------------------------------------------------------

SUITE = os.environ.get("EDGEPACK_SUITE")
TASKS = ("dlrm_ml100k", "dscnn_fsdd", "efficientnet_lite0", "fastestdet", "minilm_sst2", "ppocrv4_rec")


def filling(spec: InputSpec) -> Array:
    """Some input: free sizes are 1 for the first axis and 64 for others."""
    rng = np.random.default_rng(0)
    sizes = [d if isinstance(d, int) else (64 if axis else 1) for axis, d in enumerate(spec.shape or ())]
    if np.issubdtype(spec.dtype, np.integer):
        return np.ones(sizes, spec.dtype)
    return rng.normal(size=sizes).astype(spec.dtype)


@pytest.mark.large
@pytest.mark.skipif(SUITE is None, reason="EDGEPACK_SUITE does not name the folder of real models")
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("task", TASKS)
def test_real_models(task: str, share: float) -> None:
    assert SUITE is not None
    model, _ = normalize(load_model(Path(SUITE) / task / "model.onnx"), min_opset=13, max_opset=21)
    feeds = {spec.name: filling(spec) for spec in input_specs(model)}
    pruned, masked, gone = cut_some(model, share)
    check_sizes(pruned)
    assert gone > 10
    assert difference(run(masked, feeds), run(pruned, feeds)) < 2e-3
    for group in find_groups(find_channels(model)):
        assert len(group.classes) or group.pinned
