"""Single operators as ONNX text, for the ``.tflite`` writer. Weights are drawn by shape."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from support.onnx_models import Array, f32

Shape = tuple[int, ...]
IMAGE = "float[1, 8, 10, 9] x"


@dataclass(frozen=True, slots=True)
class Case:
    """One operator: nodes from ``x`` to ``y``, and how far its int8 values may be from onnxruntime's."""

    nodes: str
    shape: str
    inputs: str = IMAGE
    weights: Mapping[str, Shape] = field(default_factory=dict)
    constants: Mapping[str, Array] = field(default_factory=dict)
    opset: int = 17
    steps: float = 1.0
    """2 for compositions of several int8 operators."""

    normalized: bool = False
    """Whether normalization rewrites it first."""

    @property
    def body(self) -> str:
        """The model's text."""
        return f"net ({self.inputs}) => ({self.shape} y) {{ {self.nodes} }}"

    def behind_integers(self) -> "Case":
        """The case after int8 heavy operators, since light groups are int8 only next to heavy ones.

        A Conv or MatMul with ones, whose output has the range of its input, keeps all int8 values.
        """
        nodes, constants, inputs = self.nodes, dict(self.constants), self.inputs
        for kind, dims, name in re.findall(r"(float)\[([\d, ]+)\] (\w+)", self.inputs):
            sizes = [int(d) for d in dims.split(",")]
            inputs = inputs.replace(f"{kind}[{dims}] {name}", f"{kind}[{dims}] {name}_in")
            if len(sizes) == 4:
                constants[f"{name}_one"] = np.ones((sizes[1], 1, 1, 1), np.float32)
                nodes = f"{name} = Conv <group = {sizes[1]}> ({name}_in, {name}_one) {nodes}"
            else:
                constants[f"{name}_one"] = np.eye(sizes[-1], dtype=np.float32)
                nodes = f"{name} = MatMul ({name}_in, {name}_one) {nodes}"
        return replace(self, nodes=nodes, constants=constants, inputs=inputs)

    def arrays(self) -> dict[str, Array]:
        """All constants; weights are scaled so that activations stay near one."""
        rng = np.random.default_rng(7)
        drawn = {
            name: rng.normal(0, np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.3, shape).astype(
                np.float32
            )
            for name, shape in self.weights.items()
        }
        return {**drawn, **self.constants}


def ints(*values: int) -> Array:
    """An int64 array."""
    return np.array(values, np.int64)


SAME = "float[1, 8, 10, 9]"
CONV: dict[str, Case] = {
    "dense": Case(
        "y = Conv <pads = [1, 1, 1, 1]> (x, w, b)",
        "float[1, 12, 10, 9]",
        weights={"w": (12, 8, 3, 3), "b": (12,)},
    ),
    "no bias": Case("y = Conv (x, w)", "float[1, 12, 8, 7]", weights={"w": (12, 8, 3, 3)}),
    "pointwise": Case("y = Conv (x, w)", "float[1, 12, 10, 9]", weights={"w": (12, 8, 1, 1)}),
    "relu": Case(
        "c = Conv (x, w, b) y = Relu (c)", "float[1, 12, 8, 7]", weights={"w": (12, 8, 3, 3), "b": (12,)}
    ),
    "clip": Case(
        "c = Conv (x, w) y = Clip (c, lo, hi)",
        "float[1, 12, 8, 7]",
        weights={"w": (12, 8, 3, 3)},
        constants={"lo": f32(-0.4), "hi": f32(0.9)},
    ),
    "stride, uneven pads": Case(
        "y = Conv <strides = [2, 2], pads = [0, 1, 1, 0]> (x, w)",
        "float[1, 4, 5, 4]",
        weights={"w": (4, 8, 3, 3)},
    ),
    "same upper": Case(
        'y = Conv <strides = [2, 2], auto_pad = "SAME_UPPER"> (x, w)',
        "float[1, 4, 5, 5]",
        weights={"w": (4, 8, 3, 3)},
    ),
    "same lower": Case(
        'y = Conv <strides = [2, 2], auto_pad = "SAME_LOWER"> (x, w)',
        "float[1, 4, 5, 5]",
        weights={"w": (4, 8, 3, 3)},
    ),
    "dilated": Case(
        "y = Conv <dilations = [2, 3], pads = [2, 3, 2, 3]> (x, w)",
        "float[1, 4, 10, 9]",
        weights={"w": (4, 8, 3, 3)},
    ),
    "depthwise": Case(
        "y = Conv <group = 8, pads = [1, 1, 1, 1]> (x, w, b)", SAME, weights={"w": (8, 1, 3, 3), "b": (8,)}
    ),
    "depthwise, multiplier 2": Case(
        "y = Conv <group = 8> (x, w)", "float[1, 16, 8, 7]", weights={"w": (16, 1, 3, 3)}
    ),
    "grouped": Case(
        "y = Conv <group = 2, pads = [1, 1, 1, 1]> (x, w, b)",
        "float[1, 12, 10, 9]",
        weights={"w": (12, 4, 3, 3), "b": (12,)},
    ),
    "one axis": Case(
        "y = Conv <pads = [2, 2]> (x, w, b)",
        "float[1, 6, 20]",
        inputs="float[1, 8, 20] x",
        weights={"w": (6, 8, 5), "b": (6,)},
    ),
    "one axis, stride, depthwise": Case(
        "y = Conv <group = 8, strides = [2], pads = [1, 1]> (x, w)",
        "float[1, 8, 10]",
        inputs="float[1, 8, 20] x",
        weights={"w": (8, 1, 3)},
    ),
    "batch of 3": Case(
        "y = Conv (x, w)", "float[3, 4, 8, 7]", inputs="float[3, 8, 10, 9] x", weights={"w": (4, 8, 3, 3)}
    ),
    "transposed": Case(
        "y = ConvTranspose <strides = [2, 2]> (x, w, b)",
        "float[1, 5, 20, 18]",
        weights={"w": (8, 5, 2, 2), "b": (5,)},
    ),
    "transposed, pads": Case(
        "y = ConvTranspose <strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [1, 1]> (x, w)",
        "float[1, 5, 20, 18]",
        weights={"w": (8, 5, 3, 3)},
    ),
    "transposed, uneven pads": Case(
        "y = ConvTranspose <pads = [0, 1, 2, 0]> (x, w)", "float[1, 5, 10, 10]", weights={"w": (8, 5, 3, 3)}
    ),
}
LINEAR: dict[str, Case] = {
    "Gemm": Case(
        "y = Gemm <transB = 1> (x, w, b)",
        "float[4, 6]",
        inputs="float[4, 10] x",
        weights={"w": (6, 10), "b": (6,)},
    ),
    "Gemm, plain": Case(
        "y = Gemm (x, w, b)", "float[4, 6]", inputs="float[4, 10] x", weights={"w": (10, 6), "b": (6,)}
    ),
    "Gemm, one-row bias": Case(
        "y = Gemm (x, w, b)", "float[4, 6]", inputs="float[4, 10] x", weights={"w": (10, 6), "b": (1, 6)}
    ),
    "Gemm, alpha and beta": Case(
        "y = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (x, w, b)",
        "float[4, 6]",
        inputs="float[4, 10] x",
        weights={"w": (6, 10), "b": (6,)},
    ),
    "Gemm, relu": Case(
        "g = Gemm (x, w, b) y = Relu (g)",
        "float[4, 6]",
        inputs="float[4, 10] x",
        weights={"w": (10, 6), "b": (6,)},
    ),
    "MatMul, 2 axes": Case(
        "y = MatMul (x, w)", "float[5, 6]", inputs="float[5, 10] x", weights={"w": (10, 6)}
    ),
    "MatMul, 3 axes": Case(
        "y = MatMul (x, w)", "float[2, 5, 6]", inputs="float[2, 5, 10] x", weights={"w": (10, 6)}
    ),
    "MatMul, 4 axes": Case(
        "y = MatMul (x, w)", "float[1, 3, 5, 6]", inputs="float[1, 3, 5, 10] x", weights={"w": (10, 6)}
    ),
    "MatMul and Add": Case(
        "m = MatMul (x, w) y = Add (m, b)",
        "float[2, 5, 6]",
        inputs="float[2, 5, 10] x",
        weights={"w": (10, 6), "b": (6,)},
        steps=2,
    ),
}
PRODUCTS: dict[str, Case] = {
    "2 axes": Case("y = MatMul (x, z)", "float[5, 6]", inputs="float[5, 10] x, float[10, 6] z"),
    "3 axes": Case("y = MatMul (x, z)", "float[2, 5, 6]", inputs="float[2, 5, 10] x, float[2, 10, 6] z"),
    "4 axes": Case(
        "y = MatMul (x, z)", "float[1, 3, 5, 6]", inputs="float[1, 3, 5, 10] x, float[1, 3, 10, 6] z"
    ),
    "transposed keys": Case(
        "t = Transpose <perm = [0, 1, 3, 2]> (z) y = MatMul (x, t)",
        "float[1, 3, 5, 6]",
        inputs="float[1, 3, 5, 10] x, float[1, 3, 6, 10] z",
    ),
}
"""MatMuls of two activations, for targets with int8 kernels for them."""
TWO = "float[1, 8, 10, 9] x, float[1, 8, 10, 9] z"
ELEMENTWISE: dict[str, Case] = {
    "Add": Case("y = Add (x, z)", SAME, inputs=TWO),
    "Sub": Case("y = Sub (x, z)", SAME, inputs=TWO),
    "Mul": Case("y = Mul (x, z)", SAME, inputs=TWO),
    "Add, broadcast": Case("y = Add (x, z)", SAME, inputs="float[1, 8, 10, 9] x, float[1, 8, 1, 1] z"),
    "Mul, broadcast of a lower rank": Case(
        "y = Mul (x, z)", SAME, inputs="float[1, 8, 10, 9] x, float[10, 9] z"
    ),
    "Add, a constant": Case("y = Add (x, c)", SAME, weights={"c": (8, 1, 1)}),
    "Add, a negative number": Case("y = Add (x, c)", SAME, constants={"c": f32(-0.7)}),
    "Mul, a negative number": Case("y = Mul (x, c)", SAME, constants={"c": f32(-1.3)}),
    "Mul, a row": Case("y = Mul (x, c)", SAME, weights={"c": (9,)}),
    "Sub, from a number": Case("y = Sub (c, x)", SAME, constants={"c": f32(1)}),
    "Add and Relu": Case("a = Add (x, z) y = Relu (a)", SAME, inputs=TWO),
    "Add and ReLU6": Case(
        "a = Add (x, z) y = Clip (a, lo, hi)", SAME, inputs=TWO, constants={"lo": f32(0), "hi": f32(6)}
    ),
    "Relu": Case("y = Relu (x)", SAME),
    "Clip": Case("y = Clip (x, lo, hi)", SAME, constants={"lo": f32(-0.5), "hi": f32(1.5)}),
    "Clip, one bound": Case("y = Clip (x, , hi)", SAME, constants={"hi": f32(0.5)}),
    "LeakyRelu": Case("y = LeakyRelu <alpha = 0.2> (x)", SAME),
    "Sigmoid": Case("y = Sigmoid (x)", SAME),
    "Tanh": Case("y = Tanh (x)", SAME),
    "HardSigmoid": Case("y = HardSigmoid <alpha = 0.2, beta = 0.5> (x)", SAME, steps=2),
    "HardSwish": Case("y = HardSwish (x)", SAME, steps=2),
    "HardSwish, as a gate": Case(
        "s = HardSigmoid <alpha = 0.1666667, beta = 0.5> (x) y = Mul (x, s)", SAME, steps=2
    ),
    "HardSwish, as Div, Clip and Mul": Case(
        "a = Add (x, c3) b = Clip (a, c0, c6) m = Mul (x, b) y = Div (m, c6)",
        SAME,
        constants={"c3": f32(3), "c0": f32(0), "c6": f32(6)},
        normalized=True,
        steps=2,
    ),
    "SiLU": Case("s = Sigmoid (x) y = Mul (x, s)", SAME, steps=2),
    "BatchNormalization": Case(
        "c = Conv (x, w) r = Relu (c) y = BatchNormalization (r, s, b, m, v)",
        "float[1, 4, 10, 9]",
        weights={"w": (4, 8, 1, 1), "b": (4,), "m": (4,)},
        constants={"s": f32([1, -0.5, 2, 0.7]), "v": f32([1, 2, 0.5, 1])},
        steps=2,
    ),
    "Where": Case("p = Greater (x, z) y = Where (p, x, z)", SAME, inputs=TWO),
}
FLOATS: dict[str, Case] = {
    "Gemm, transA": Case(
        "y = Gemm <transA = 1> (x, w)", "float[4, 6]", inputs="float[10, 4] x", weights={"w": (10, 6)}
    ),
    "Pad, a value": Case(
        "y = Pad (x, p, v)",
        "float[1, 8, 12, 9]",
        constants={"p": ints(0, 0, 1, 0, 0, 0, 1, 0), "v": f32(0.5)},
    ),
    "Div": Case("r = Relu (z) o = Add (r, c) y = Div (x, o)", SAME, inputs=TWO, constants={"c": f32(1)}),
    "Max": Case("y = Max (x, z)", SAME, inputs=TWO),
    "Min": Case("y = Min (x, z)", SAME, inputs=TWO),
    "PRelu": Case("y = PRelu (x, a)", SAME, weights={"a": (8, 1, 1)}),
    "GELU, composed": Case(
        "d = Div (x, q) e = Erf (d) o = Add (e, c1) m = Mul (x, o) y = Mul (m, h)",
        SAME,
        constants={"q": f32(2**0.5), "c1": f32(1), "h": f32(0.5)},
    ),
    "Gelu": Case("y = Gelu (x)", SAME, opset=20),
    "Gelu, tanh": Case('y = Gelu <approximate = "tanh"> (x)', SAME, opset=20),
    "Softmax": Case("y = Softmax <axis = -1> (x)", "float[2, 5, 10]", inputs="float[2, 5, 10] x"),
    "Softmax, channels": Case("y = Softmax <axis = 1> (x)", SAME),
    "LogSoftmax": Case("y = LogSoftmax <axis = -1> (x)", "float[2, 5, 10]", inputs="float[2, 5, 10] x"),
    "LayerNormalization": Case(
        "y = LayerNormalization <axis = -1> (x, s, b)",
        "float[2, 5, 10]",
        inputs="float[2, 5, 10] x",
        weights={"s": (10,), "b": (10,)},
    ),
    "LayerNorm, composed": Case(
        "m = ReduceMean <axes = [-1]> (x) d = Sub (x, m) p = Pow (d, two) v = ReduceMean <axes = [-1]> (p) "
        "e = Add (v, eps) q = Sqrt (e) y = Div (d, q)",
        "float[2, 5, 10]",
        inputs="float[2, 5, 10] x",
        constants={"two": f32(2), "eps": f32(1e-5)},
    ),
    "Pow": Case("r = Abs (x) o = Add (r, c) y = Pow (o, p)", SAME, constants={"c": f32(0.1), "p": f32(1.7)}),
    "Sqrt": Case("r = Abs (x) y = Sqrt (r)", SAME),
    "Exp": Case("y = Exp (x)", SAME),
    "Erf": Case("y = Erf (x)", SAME),
    "Reciprocal": Case("r = Abs (x) o = Add (r, c) y = Reciprocal (o)", SAME, constants={"c": f32(0.5)}),
    "Softplus": Case("y = Softplus (x)", SAME),
    "Elu": Case("y = Elu (x)", SAME),
}
"""Operators without an int8 kernel in the delegate: float islands."""
