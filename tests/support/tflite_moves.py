"""Single operators that move data, pool or resize, for the ``.tflite`` writer."""

import numpy as np
from support.onnx_models import f32
from support.tflite_cases import SAME, TWO, Case, ints

POOLS: dict[str, Case] = {
    "MaxPool": Case("y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)", "float[1, 8, 5, 4]"),
    "MaxPool, pads": Case(
        "y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x)", "float[1, 8, 5, 5]"
    ),
    "MaxPool, uneven pads": Case(
        "y = MaxPool <kernel_shape = [3, 2], pads = [1, 0, 0, 1]> (x)", "float[1, 8, 9, 9]"
    ),
    "MaxPool, ceil": Case(
        "y = MaxPool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1> (x)", "float[1, 8, 5, 5]"
    ),
    "MaxPool, one axis": Case(
        "y = MaxPool <kernel_shape = [3], strides = [2]> (x)", "float[1, 8, 9]", inputs="float[1, 8, 20] x"
    ),
    "AveragePool": Case("y = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (x)", "float[1, 8, 5, 4]"),
    "AveragePool, pads": Case("y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x)", SAME),
    "AveragePool, pads count": Case(
        "y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (x)", SAME
    ),
    "AveragePool, ceil": Case(
        "y = AveragePool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1> (x)", "float[1, 8, 5, 5]"
    ),
    "AveragePool, one axis": Case(
        "y = AveragePool <kernel_shape = [4], strides = [4]> (x)",
        "float[1, 8, 5]",
        inputs="float[1, 8, 20] x",
    ),
    "GlobalAveragePool": Case("y = GlobalAveragePool (x)", "float[1, 8, 1, 1]"),
    "GlobalMaxPool": Case("y = GlobalMaxPool (x)", "float[1, 8, 1, 1]"),
    "ReduceMean, image": Case("y = ReduceMean <axes = [2, 3], keepdims = 0> (x)", "float[1, 8]"),
    "ReduceMean, channels": Case("y = ReduceMean <axes = [1]> (x)", "float[1, 1, 10, 9]"),
    "ReduceMean, last": Case(
        "y = ReduceMean <axes = [-1]> (x)", "float[2, 5, 1]", inputs="float[2, 5, 10] x"
    ),
    "ReduceMean, axes as input": Case(
        "y = ReduceMean <keepdims = 0> (x, a)", "float[1, 8]", constants={"a": ints(2, 3)}, opset=18
    ),
    "ReduceSum": Case("y = ReduceSum <keepdims = 0> (x, a)", "float[1, 8, 10]", constants={"a": ints(-1)}),
    "ReduceMax": Case("y = ReduceMax <axes = [2], keepdims = 0> (x)", "float[1, 8, 9]"),
    "ReduceMin": Case("y = ReduceMin <axes = [3]> (x)", "float[1, 8, 10, 1]"),
}
MOVES: dict[str, Case] = {
    "Concat, channels": Case("r = Sigmoid (x) y = Concat <axis = 1> (x, r)", "float[1, 16, 10, 9]", steps=2),
    "Concat, last axis": Case("y = Concat <axis = -1> (x, z)", "float[1, 8, 10, 18]", inputs=TWO),
    "Split": Case(
        "a, b = Split <axis = 1> (x, n) r = Relu (a) y = Concat <axis = 1> (b, r)",
        SAME,
        constants={"n": ints(3, 5)},
    ),
    "Split, equal parts": Case("a, b = Split <axis = 2> (x) y = Add (a, b)", "float[1, 8, 5, 9]"),
    "Slice": Case(
        "y = Slice (x, s, e, a)", "float[1, 8, 4, 9]", constants={"s": ints(2), "e": ints(6), "a": ints(2)}
    ),
    "Slice, steps": Case(
        "y = Slice (x, s, e, a, t)",
        "float[1, 8, 5, 3]",
        constants={"s": ints(0, 1), "e": ints(2**40, -1), "a": ints(2, -1), "t": ints(2, 3)},
    ),
    "Slice, channels from the end": Case(
        "y = Slice (x, s, e, a)",
        "float[1, 3, 10, 9]",
        constants={"s": ints(-3), "e": ints(2**40), "a": ints(1)},
    ),
    "Pad": Case("y = Pad (x, p)", "float[1, 8, 13, 10]", constants={"p": ints(0, 0, 1, 0, 0, 0, 2, 1)}),
    "Pad, reflect": Case(
        'y = Pad <mode = "reflect"> (x, p)',
        "float[1, 8, 12, 11]",
        constants={"p": ints(0, 0, 1, 1, 0, 0, 1, 1)},
    ),
    "Pad, edge": Case(
        'y = Pad <mode = "edge"> (x, p)', "float[1, 8, 12, 9]", constants={"p": ints(0, 0, 2, 0, 0, 0, 0, 0)}
    ),
    "Reshape": Case("y = Reshape (x, s)", "float[1, 720]", constants={"s": ints(1, -1)}),
    "Reshape, to more axes": Case(
        "y = Reshape (x, s)", "float[1, 2, 4, 10, 9]", constants={"s": ints(0, 2, 4, 10, 9)}
    ),
    "Flatten": Case("y = Flatten (x)", "float[1, 720]"),
    "Squeeze": Case(
        "g = GlobalAveragePool (x) y = Squeeze (g, a)", "float[1, 8]", constants={"a": ints(2, 3)}
    ),
    "Unsqueeze": Case(
        "y = Unsqueeze (x, a)", "float[1, 1, 5, 10]", inputs="float[5, 10] x", constants={"a": ints(0, 1)}
    ),
    "Transpose": Case("y = Transpose <perm = [0, 2, 3, 1]> (x)", "float[1, 10, 9, 8]"),
    "Transpose, 3 axes": Case(
        "y = Transpose <perm = [1, 0, 2]> (x)", "float[5, 2, 10]", inputs="float[2, 5, 10] x"
    ),
    "channel shuffle": Case(
        "a = Reshape (x, s) t = Transpose <perm = [0, 2, 1, 3, 4]> (a) y = Reshape (t, r)",
        SAME,
        constants={"s": ints(1, 2, 4, 10, 9), "r": ints(1, 8, 10, 9)},
    ),
    "Gather": Case("y = Gather <axis = 1> (x, i)", "float[1, 3, 10, 9]", constants={"i": ints(6, 0, -1)}),
    "Gather, one": Case(
        "y = Gather <axis = 2> (x, i)", "float[1, 8, 9]", constants={"i": np.array(3, np.int64)}
    ),
    "DepthToSpace": Case("y = DepthToSpace <blocksize = 2> (x)", "float[1, 2, 20, 18]"),
    "DepthToSpace, CRD": Case('y = DepthToSpace <blocksize = 2, mode = "CRD"> (x)', "float[1, 2, 20, 18]"),
    "SpaceToDepth": Case(
        "y = SpaceToDepth <blocksize = 2> (x)", "float[1, 32, 5, 4]", inputs="float[1, 8, 10, 8] x"
    ),
    "Expand": Case(
        "y = Expand (x, s)",
        "float[1, 8, 4, 5]",
        inputs="float[1, 8, 1, 1] x",
        constants={"s": ints(1, 8, 4, 5)},
    ),
    "Tile": Case(
        "y = Tile (x, r)", "float[2, 10, 10]", inputs="float[2, 5, 10] x", constants={"r": ints(1, 2, 1)}
    ),
}
RESIZES: dict[str, Case] = {
    f"{mode}, {coordinates}, {name}": Case(
        f'y = Resize <mode = "{mode}", coordinate_transformation_mode = "{coordinates}"{nearest}> (x, , s)',
        shape,
        constants={"s": f32(scales)},
    )
    for mode, coordinates, nearest in (
        ("nearest", "asymmetric", ', nearest_mode = "floor"'),
        ("nearest", "half_pixel", ', nearest_mode = "round_prefer_floor"'),
        ("linear", "half_pixel", ""),
        ("linear", "align_corners", ""),
        ("linear", "asymmetric", ""),
        ("linear", "pytorch_half_pixel", ""),
    )
    for name, scales, shape in (
        ("twice", [1, 1, 2, 2], "float[1, 8, 20, 18]"),
        ("three times", [1, 1, 3, 3], "float[1, 8, 30, 27]"),
    )
}
