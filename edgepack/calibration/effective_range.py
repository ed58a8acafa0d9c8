"""Effective range of an activation: a range need not cover values that all consumers map to the same.

``HardSwish`` maps all values below -3 to zero, so integers for -30 to -3 before it are wasted; half of the
activations of MobileNetV3 are consumed in this way. Where every consumer of a value is a function of one
variable, the error of a range is measured at the output of that function.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.ir.model import constant

Doubles = npt.NDArray[np.float64]
Function = Callable[[Doubles], Doubles]


def consumer_functions(value: ir.Value) -> tuple[Function, ...]:
    """The unary functions that consume ``value``; none where one consumer is not unary.

    Given: ``HardSwish(x)`` alone. Result: ``x * clip(x / 6 + 0.5, 0, 1)``.

    Given: ``s = Sigmoid(x)`` and ``Mul(x, s)``, and ``s`` has no other consumer. Result: ``x / (1 +
    exp(-x))``.
    """
    if value.is_graph_output():
        return ()
    found: list[Function] = []
    for node in dict.fromkeys(use.node for use in value.uses()):
        gate = _gate_of(node, value)
        if gate is not None and _feeds_only_gates(gate, value):
            continue  # counted with the gate
        function = _unary(node)
        if function is None:
            return ()
        found.append(_times_x(function) if _feeds_only_gates(node, value) else function)
    return tuple(found)


def _feeds_only_gates(node: ir.Node, value: ir.Value) -> bool:
    """Whether each consumer of ``node`` is a Mul of it with ``value``."""
    consumers = [use.node for use in node.outputs[0].uses()]
    return bool(consumers) and all(_gate_of(consumer, value) is node for consumer in consumers)


def _gate_of(node: ir.Node, value: ir.Value) -> ir.Node | None:
    """The node that computes ``g`` of ``Mul(value, g)``, where it is a unary function of ``value``."""
    if node.op_type != "Mul" or value not in node.inputs:
        return None
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    gate = other.producer() if other is not None and other is not value else None
    known = gate is not None and gate.op_type in UNARY and gate.inputs[0] is value
    return gate if known and not (other is not None and other.is_graph_output()) else None


def _times_x(function: Function) -> Function:
    return lambda x: x * function(x)


def _unary(node: ir.Node) -> Function | None:
    make = UNARY.get(node.op_type)
    return make(node) if make is not None and not node.domain else None


def _hard_sigmoid(node: ir.Node) -> Function:
    alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
    return lambda x: np.clip(alpha * x + beta, 0.0, 1.0)


def _leaky(node: ir.Node) -> Function:
    alpha = node.attributes.get_float("alpha", 0.01)
    return lambda x: np.where(x < 0, alpha * x, x)


def _elu(node: ir.Node) -> Function:
    alpha = node.attributes.get_float("alpha", 1.0)
    return lambda x: np.where(x < 0, alpha * np.expm1(np.minimum(x, 0.0)), x)


def _clip(node: ir.Node) -> Function | None:
    bounds: list[float | None] = []
    for place in (1, 2):
        given = node.inputs[place] if len(node.inputs) > place else None
        array = constant(given)
        if given is not None and array is None:
            return None  # computed at run time
        bounds.append(None if array is None else float(array))
    low, high = bounds
    return lambda x: np.clip(x, -np.inf if low is None else low, np.inf if high is None else high)


def _sigmoid(x: Doubles) -> Doubles:
    return np.asarray(0.5 * np.tanh(0.5 * x) + 0.5)


UNARY: dict[str, Callable[[ir.Node], Function | None]] = {
    "Relu": lambda node: lambda x: np.maximum(x, 0.0),
    "Clip": _clip,
    "LeakyRelu": _leaky,
    "Elu": _elu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda node: lambda x: x * np.clip(x / 6 + 0.5, 0.0, 1.0),
    "Sigmoid": lambda node: _sigmoid,
    "Tanh": lambda node: np.tanh,
}
"""Unary elementwise operators, as ONNX defines them."""
