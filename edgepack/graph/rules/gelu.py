"""Recognize the tanh approximation of GELU, which exporters write as nine operators.

onnxruntime fuses the decomposed erf GELU itself, but not the tanh approximation of GPT-2 and of all JAX
models. Exporters write it in many ways, so the rule compares polynomials, not operators: the input of the
Tanh must be the known polynomial of ``x``, and the output the known polynomial of ``x`` and the result of the
Tanh.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.graph.rules.rule import DONE, Outcome, Rule, is_op, producer, substitute
from edgepack.ir.model import constant

Coefficients = npt.NDArray[np.float64]
"""Of a polynomial, the constant coefficient first."""

OPSET = 20
"""The first opset with Gelu."""
INNER = np.asarray([0.0, (2 / np.pi) ** 0.5, 0.0, 0.044715 * (2 / np.pi) ** 0.5])
"""``sqrt(2/pi) (x + 0.044715 x^3)``, after Hendrycks and Gimpel (2016)."""
MOST_DEGREES = 3
DEPTH = 8
"""Most operators between ``x`` and the Tanh, and between the Tanh and the result."""
RTOL = 1e-4


def gelu_tanh(main: ir.Graph, node: ir.Node) -> Outcome:
    """Replace the decomposed tanh approximation of GELU by one Gelu (opset 20).

    Given::  y = 0.5 * x * (1 + Tanh(sqrt(2/pi) * (x + 0.044715 * x^3)))      in any order
    Result:: y = Gelu<approximate="tanh">(x)
    """
    x = gelu_input(node)
    if x is None:
        return None
    substitute(node, "Gelu", [x], approximate="tanh")
    return DONE


def gelu_input(node: ir.Node) -> ir.Value | None:
    """``x`` if ``node`` is the last multiplication of ``gelu(x)``."""
    if not is_op(node, "Mul"):
        return None
    tanh = next((v for v in _before(node.outputs[0], DEPTH // 2) if producer(v, "Tanh") is not None), None)
    made = None if tanh is None else producer(tanh, "Tanh")
    inner = None if made is None else made.inputs[0]
    if tanh is None or inner is None:
        return None
    for x in _before(inner, DEPTH):
        if x is not inner and _is(polynomial(inner, {x: np.asarray([0.0, 1.0])}), INNER):
            after = (
                (polynomial(node.outputs[0], {x: np.asarray([0.0, 1.0]), tanh: np.asarray([t])}), t)
                for t in (-1.0, 0.0, 1.0)
            )
            if all(_is(found, np.asarray([0.0, (1 + t) / 2])) for found, t in after):
                return x
    return None


def _before(value: ir.Value, depth: int) -> Iterator[ir.Value]:
    """The values that polynomial operators compute ``value`` from, nearest first, without constants."""
    seen: dict[ir.Value, None] = {value: None}
    layer = [value]
    for _ in range(depth):
        made = [v.producer() for v in layer]
        layer = [
            v
            for node in made
            if node is not None and is_op(node, "Add", "Sub", "Mul", "Div", "Pow")
            for v in node.inputs
            if v is not None and v not in seen and constant(v) is None
        ]
        seen.update(dict.fromkeys(layer))
    return iter(seen)


def polynomial(
    value: ir.Value | None, known: Mapping[ir.Value, Coefficients], depth: int = DEPTH
) -> Coefficients | None:
    """``value`` as a polynomial of the variables in ``known``; ``None`` if it is none."""
    if value is None:
        return None
    if value in known:
        return known[value]
    array = constant(value)
    if array is not None:
        number = array.size == 1 and np.issubdtype(array.dtype, np.floating)
        return np.asarray([float(array.item())]) if number else None
    node = value.producer()
    if depth == 0 or node is None or not is_op(node, "Add", "Sub", "Mul", "Div", "Pow"):
        return None
    left, right = (polynomial(v, known, depth - 1) for v in node.inputs)
    if left is None or right is None:
        return None
    found = _combined(node.op_type, left, right)
    return None if found is None or len(found) > MOST_DEGREES + 1 else found


def _combined(op_type: str, left: Coefficients, right: Coefficients) -> Coefficients | None:
    if op_type == "Mul":
        return np.convolve(left, right)
    if op_type == "Div":
        return left / right[0] if len(right) == 1 and right[0] else None
    if op_type == "Pow":
        power = right[0] if len(right) == 1 else 0.0
        if power not in (1.0, 2.0, 3.0):
            return None
        result = left
        for _ in range(int(power) - 1):
            result = np.convolve(result, left)
        return result
    size = max(len(left), len(right))
    left, right = (np.pad(p, (0, size - len(p))) for p in (left, right))
    return left + right if op_type == "Add" else left - right


def _is(found: Coefficients | None, expected: Coefficients) -> bool:
    if found is None:
        return False
    size = max(len(found), len(expected))
    found, expected = (np.pad(p, (0, size - len(p))) for p in (found, expected))
    return bool(np.allclose(found, expected, rtol=RTOL, atol=1e-7))


GELU: tuple[Rule, ...] = (Rule("gelu_tanh", frozenset({"Mul"}), gelu_tanh),)
