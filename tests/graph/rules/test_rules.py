import numpy as np
import pytest
from support.normalizing import check
from support.onnx_models import f32, i64, ops, parse, randoms

from edgepack.graph.normalize import normalize

# --- padding -------------------------------------------------------------------------------------------


def test_padding_computed_in_the_graph_goes_into_conv() -> None:
    """As PyTorch writes dynamic "same" padding: sizes by Shape, pads by Concat, Reshape, Slice, Transpose."""
    body = """net (float[n, 3, 7, 7] x) => (float[n, 2, 4, 4] y) {
        s = Shape (x)
        i = Constant <value = int64 {2}> ()
        h = Gather <axis = 0> (s, i)
        two = Constant <value = int64 {2}> ()
        r = Mod (h, two)
        zero = Constant <value = int64[1] {0}> ()
        l = Unsqueeze (r, zero)
        z = Constant <value = int64[2] {0, 0}> ()
        p = Concat <axis = 0> (z, l, l, z, l, l)
        q = Pad (x, p)
        y = Conv <strides = [2, 2], pads = [0, 0, 0, 0]> (q, w)
    }"""
    normal, notes = check(parse(body, weights=randoms(w=(2, 3, 3, 3))), randoms(x=(2, 3, 7, 7)))
    assert ops(normal) == {"Conv": 1} and notes.applied["fold_pad"] == 1
    assert list(normal.graph[0].attributes["pads"].as_ints()) == [1, 1, 1, 1]


PADS = [
    ("Pad (x, p)", [0, 0, 1, 2, 0, 0, 0, 1], "Conv <pads = [1, 0, 0, 1]>", True),
    ("Pad (x, p)", [0, 0, 1, 1, 0, 0, 1, 1], "AveragePool <kernel_shape = [3, 3]>", True),
    ("Pad (x, p)", [0, 0, 1, 1, 0, 0, 1, 1], "AveragePool <kernel_shape = [3, 3], ceil_mode = 1>", False),
    (
        "Pad (x, p)",
        [0, 0, 1, 1, 0, 0, 1, 1],
        "AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]>",
        False,
    ),
    ("Pad (x, p)", [0, 0, 1, 1, 0, 0, 1, 1], "MaxPool <kernel_shape = [3, 3]>", False),
    ("Pad (x, p, one)", [0, 0, 1, 1, 0, 0, 1, 1], "Conv", False),
    ("Pad (x, p, none)", [0, 0, 1, 1, 0, 0, 1, 1], 'Conv <auto_pad = "VALID">', True),
    ('Pad <mode = "reflect"> (x, p)', [0, 0, 1, 1, 0, 0, 1, 1], "Conv", False),
    ("Pad (x, p)", [0, 0, -1, 0, 0, 0, 0, -1], "Conv", False),
    ("Pad (x, p)", [0, 0, 0, 0, 1, 0, 0, 0], "Conv", False),
    ("Pad (x, p)", [0, 0, 0, 0, 0, 0, 0, 0], "MaxPool <kernel_shape = [3, 3]>", True),
    ("Pad (x, p, none, axes)", [1, 2, 0, 1], "Conv", True),
]


@pytest.mark.parametrize(("pad", "amounts", "then", "folded"), PADS)
def test_padding(pad: str, amounts: list[int], then: str, folded: bool) -> None:
    op, _, attributes = then.partition(" ")
    arguments = "p1, w" if op == "Conv" else "p1"
    body = f"""net (float[n, 2, 6, 6] x) => (float[a, b, c, d] y) {{
        p1 = {pad}
        y = {op} {attributes} ({arguments})
    }}"""
    weights = {**randoms(w=(3, 2, 3, 3)), "p": i64(amounts), "one": f32(1), "none": f32(0)}
    model = parse(body, opset=18, weights={**weights, "axes": i64([-2, 3])})
    normal, _ = check(model, randoms(x=(2, 2, 6, 6)))
    assert (ops(normal)["Pad"] == 0) == folded


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("size", [7, 8])
def test_automatic_padding_becomes_numbers(mode: str, size: int) -> None:
    body = f"""net (float[n, 2, {size}, {size}] x) => (float[a, b, c, d] y) {{
        c1 = Conv <auto_pad = "{mode}", strides = [2, 2], kernel_shape = [3, 3]> (x, w)
        y = MaxPool <auto_pad = "{mode}", kernel_shape = [2, 2]> (c1)
    }}"""
    normal, _ = check(parse(body, weights=randoms(w=(3, 2, 3, 3))), randoms(x=(2, 2, size, size)))
    assert not any("auto_pad" in node.attributes for node in normal.graph)


# --- activations ---------------------------------------------------------------------------------------

HARD_SWISH = [
    "a = Add (x, three)  c = Clip (a, zero, six)  m = Mul (x, c)  y = Div (m, six)",
    "a = Add (three, x)  c = Clip (a, zero, six)  d = Div (c, six)  y = Mul (d, x)",
    "a = Add (x, three)  c = Clip (a, zero, six)  m = Mul (c, x)  y = Mul (sixth, m)",
    "h = HardSigmoid <alpha = 0.16666667, beta = 0.5> (x)  y = Mul (x, h)",
]
NUMBERS = {name: f32(n) for name, n in {"three": 3, "zero": 0, "six": 6, "sixth": 1 / 6}.items()}


@pytest.mark.parametrize("nodes", HARD_SWISH)
def test_hard_swish(nodes: str) -> None:
    model = parse(f"net (float[n, 4] x) => (float[n, 4] y) {{ {nodes} }}", opset=12, weights=NUMBERS)
    normal, notes = check(model, {"x": np.linspace(-5, 5, 40, dtype=np.float32).reshape(10, 4)})
    assert ops(normal) == {"HardSwish": 1} and notes.opset_after == 14


@pytest.mark.parametrize(
    "nodes",
    [
        "a = Add (x, six)  c = Clip (a, zero, six)  m = Mul (x, c)  y = Div (m, six)",
        "a = Add (x, three)  c = Clip (a, three, six)  m = Mul (x, c)  y = Div (m, six)",
        "a = Add (x, three)  c = Clip (a, zero, six)  m = Mul (a, c)  y = Div (m, six)",
        "a = Add (x, three)  c = Clip (a, zero, six)  m = Mul (x, c)  y = Div (m, three)",
        "h = HardSigmoid (x)  y = Mul (x, h)",
    ],
)
def test_similar_graphs_are_not_hard_swish(nodes: str) -> None:
    model = parse(f"net (float[n, 4] x) => (float[n, 4] y) {{ {nodes} }}", opset=12, weights=NUMBERS)
    normal, notes = check(model, {"x": np.linspace(-5, 5, 40, dtype=np.float32).reshape(10, 4)})
    assert ops(normal)["HardSwish"] == 0 and notes.opset_after == 13


def test_hard_swish_needs_opset_14() -> None:
    model = parse(f"net (float[n, 4] x) => (float[n, 4] y) {{ {HARD_SWISH[0]} }}", opset=12, weights=NUMBERS)
    normal, notes = normalize(model, min_opset=13, max_opset=13)
    assert notes.opset_after == 13 and ops(normal) == {"Add": 1, "Clip": 1, "Mul": 2}


@pytest.mark.parametrize("shape", [(1,), (3, 1, 1)])
def test_one_slope_for_all_channels(shape: tuple[int, ...]) -> None:
    body = "net (float[2, 3, 4, 4] x) => (float[2, 3, 4, 4] y) { y = PRelu (x, slope) }"
    normal, _ = check(
        parse(body, weights={"slope": np.full(shape, 0.25, np.float32)}), randoms(x=(2, 3, 4, 4))
    )
    assert ops(normal) == {"LeakyRelu": 1}


def test_channels_with_slopes_of_their_own() -> None:
    body = "net (float[2, 3, 4, 4] x) => (float[2, 3, 4, 4] y) { y = PRelu (x, slope) }"
    slopes = np.asarray([0.1, 0.2, 0.1], np.float32).reshape(3, 1, 1)
    normal, _ = check(parse(body, weights={"slope": slopes}), randoms(x=(2, 3, 4, 4)))
    assert ops(normal) == {"PRelu": 1}


def test_hard_sigmoid_alone() -> None:
    nodes = "a = Add (x, three)  c = Clip (a, zero, six)  y = Div (c, six)"
    model = parse(f"net (float[n, 4] x) => (float[n, 4] y) {{ {nodes} }}", weights=NUMBERS)
    normal, _ = check(model, {"x": np.linspace(-5, 5, 40, dtype=np.float32).reshape(10, 4)})
    assert ops(normal) == {"HardSigmoid": 1}


# --- no-op nodes ---------------------------------------------------------------------------------------

NOTHING = [
    "y = Identity (r)",
    "y = Dropout (r)",
    "y = Cast <to = 1> (r)",
    "y = Transpose <perm = [0, 1, 2]> (r)",
    "y = Concat <axis = 1> (r)",
    "y = Mul (r, ones)",
    "y = Sub (r, zeros)",
    "y = Reshape (r, shape)",
    "y = Expand (r, shape)",
    "y = Pad (r, nopads)",
    "y = Slice (r, starts, ends)",
    "t = Transpose <perm = [2, 0, 1]> (r)  y = Transpose <perm = [1, 2, 0]> (t)",
    "f = Flatten (r)  y = Reshape (f, shape)",
    "z = Relu (r)  y = Clip (z, zeros1)",
]
NEUTRAL = {
    "ones": np.ones((1, 3, 4), np.float32),
    "zeros": np.zeros(4, np.float32),
    "zeros1": f32(0),
    "shape": i64([2, 3, 4]),
    "nopads": np.zeros(6, np.int64),
    "starts": i64([0, 0]),
    "ends": i64([2**62, 3]),
}


@pytest.mark.parametrize("nodes", NOTHING)
def test_nodes_that_do_nothing_go(nodes: str) -> None:
    body = f"net (float[2, 3, 4] x) => (float[2, 3, 4] y) {{ r = Relu (x)  {nodes} }}"
    normal, _ = check(parse(body, weights=NEUTRAL), randoms(x=(2, 3, 4)))
    assert ops(normal) == {"Relu": 1}


SOMETHING = [
    "y = Slice (r, ends2, starts2, axis, minus)",
    "y = Mul (r, bigger)",
    "y = Transpose <perm = [1, 0, 2]> (r)",
    "y = Cast <to = 11> (r)",
    "y = Dropout (r, half, yes)",
]


@pytest.mark.parametrize("nodes", SOMETHING)
def test_nodes_that_do_something_stay(nodes: str) -> None:
    kind = "double" if "Cast" in nodes else "float"
    body = f"net (float[2, 2, 1] x) => ({kind}[a, b, c] y) {{ r = Relu (x)  {nodes} }}"
    weights = {
        "bigger": np.ones((1, 4), np.float32),
        "ends2": i64([1]),
        "starts2": i64([-3]),
        "axis": i64([0]),
        "minus": i64([-1]),
        "half": f32(0.5),
        "yes": np.asarray(True),
    }
    model = parse(body, weights=weights)
    normal, _ = normalize(model, min_opset=13, max_opset=21)
    assert sum(ops(normal).values()) == 2
    if "Dropout" not in nodes:
        check(model, randoms(x=(2, 2, 1)))


def test_outputs_keep_their_names() -> None:
    body = """net (float[n] x) => (float[n] y, float[n] z, float[n] u, float[n] v) {
        y = Identity (x)
        r = Relu (x)
        z = Identity (r)
        u = Identity (r)
        v = Identity (u)
    }"""
    normal, _ = check(parse(body), randoms(x=(3,)))
    assert [v.name for v in normal.graph.outputs] == ["y", "z", "u", "v"] and ops(normal)["Relu"] == 1


def test_an_output_that_is_constant() -> None:
    body = """net (float[n] x) => (float[n] y, float[2] z) {
        y = Relu (x)
        c = Constant <value = float[2] {1.0, 2.0}> ()
        z = Neg (c)
    }"""
    normal, _ = check(parse(body), randoms(x=(3,)))
    assert [v.name for v in normal.graph.outputs] == ["y", "z"]


def test_shapes_that_only_copy_dimensions_become_constant() -> None:
    body = """net (float[n, l, 8] x) => (float[n, l, 2, 4] y, float[n, k] z) {
        s = Shape (x)
        zero = Constant <value = int64 {0}> ()
        one = Constant <value = int64 {1}> ()
        axis = Constant <value = int64[1] {0}> ()
        a = Gather (s, zero)
        b = Gather (s, one)
        a1 = Unsqueeze (a, axis)
        b1 = Unsqueeze (b, axis)
        heads = Constant <value = int64[2] {2, 4}> ()
        shape = Concat <axis = 0> (a1, b1, heads)
        y = Reshape (x, shape)
        all = Constant <value = int64[1] {-1}> ()
        flat = Concat <axis = 0> (a1, all)
        z = Reshape (y, flat)
    }"""
    normal, notes = check(parse(body), randoms(x=(2, 5, 8)))
    assert ops(normal) == {"Reshape": 2} and notes.applied["constant_reshape"] == 2


def test_transposes_with_other_consumers_are_merged() -> None:
    """The rule of onnxscript merges only Transposes without other consumers."""
    body = """net (float[n, 2, 6, 5] x) => (float[n, 2, 6, 5] y, float[n, 6, 5, 2] z) {
        last = Transpose <perm = [0, 2, 3, 1]> (x)
        z = Relu (last)
        first = Transpose <perm = [0, 3, 1, 2]> (last)
        y = Neg (first)
    }"""
    normal, notes = check(parse(body), randoms(x=(2, 2, 6, 5)))
    assert notes.applied["merge_transposes"] == 1
    assert ops(normal) == {"Transpose": 1, "Relu": 1, "Neg": 1}


def test_clips_that_do_not_overlap_stay_two() -> None:
    """One Clip from 2 to 0 would be 0 everywhere; both together are 2."""
    body = "net (float[n, 4] x) => (float[n, 4] y) { c = Clip (x, a, b) y = Clip (c, d, e) }"
    held = {"a": f32(-1), "b": f32(0), "d": f32(2), "e": f32(3)}
    normal, _ = check(parse(body, weights=held), randoms(x=(3, 4)))
    assert ops(normal) == {"Clip": 2}


def test_the_static_part_of_a_shape_is_folded() -> None:
    """PyTorch: ``interpolate(z, x.shape[2:])``: constant folding leaves a Slice of a dynamic shape."""
    body = """net (float[n, 2, 6, 5] x, float[n, 2, 3, 3] z) => (float[n, 4, 6, 5] y) {
        s = Shape (x)
        size = Slice (s, two, four)
        o = Shape (z)
        batch = Slice (o, zero, two)
        sizes = Concat <axis = 0> (batch, size)
        r = Resize <mode = "nearest"> (z, , , sizes)
        y = Concat <axis = 1> (x, r)
    }"""
    held = {"zero": i64([0]), "two": i64([2]), "four": i64([4])}
    normal, notes = check(parse(body, weights=held), randoms(x=(2, 2, 6, 5), z=(2, 2, 3, 3)))
    assert notes.applied["slice_of_shape"] > 0
    assert ops(normal)["Slice"] == 0 and ops(normal)["Shape"] == 1


EXPANDED = """net (bool[n, 1, 1, l] m) => (bool[a, b, c, d] y) {
    s = Shape (m)
    b = Gather (s, first)
    l = Gather (s, last)
    sizes = Concat <axis = 0> (b, keep, l, l)
    minus = Mul (ones, less)
    told = Equal (sizes, minus)
    w = Where (told, ones, sizes)
    y = Expand (m, w)
}"""


@pytest.mark.parametrize("kept", [-1, 1])
def test_sizes_that_are_not_negative_need_no_comparison(kept: int) -> None:
    """As PyTorch writes ``mask.expand(n, -1, l, l)``; the second axis is then known to be 1."""
    held = {"first": i64([0]), "last": i64([3]), "keep": i64([kept]), "ones": i64([1] * 4), "less": i64(-1)}
    normal, notes = check(parse(EXPANDED, weights=held), {"m": np.ones((2, 1, 1, 5), np.bool_)})
    assert notes.applied["expanded_sizes"] == 1 and "Where" not in ops(normal)
    (shape,) = (n.outputs[0].shape for n in normal.graph if n.op_type == "Expand")
    assert shape is not None and shape[1] == 1


def test_sizes_that_may_be_minus_one_keep_the_comparison() -> None:
    body = EXPANDED.replace("(b, keep, l, l)", "(b, z, l, l)").replace(
        "sizes =", "z = Sub (b, three) sizes ="
    )
    held = {"first": i64([0]), "last": i64([3]), "ones": i64([1] * 4), "less": i64(-1), "three": i64([3])}
    normal, _ = check(parse(body, weights=held), {"m": np.ones((2, 1, 1, 5), np.bool_)})
    assert ops(normal)["Where"] == 1


def test_a_shape_that_swaps_dimensions_is_not_a_copy() -> None:
    body = """net (float[n, l] x) => (float[l, n] y) {
        s = Shape (x)
        ten = Constant <value = int64[2] {1, 0}> ()
        t = Gather (s, ten)
        y = Reshape (x, t)
    }"""
    check(parse(body), randoms(x=(2, 5)))
