"""Rewriting rules of :mod:`edgepack.graph.normalize`: each matches one node and simplifies the graph.

A rule is a function ``rule(main, node)``: pattern, check, rewrite, in this order. It returns ``DONE`` if it
has rewritten, ``None`` if the pattern does not match, and a reason (a sentence) if the pattern matches but
must not be rewritten. ``main`` is the model's main graph, where new constants are added; ``node`` may be in a
subgraph.

A rule never changes a constant: it adds a new one, so that other consumers of a shared weight keep theirs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from edgepack.ir.arrays import Array
from edgepack.ir.model import constant

DONE: Final = ""
"""Returned after a rewrite; any other string is the reason against one."""

Outcome = str | None


@dataclass(frozen=True, slots=True)
class Rule:
    """A rewrite, with the operators at which its pattern ends."""

    name: str
    ops: frozenset[str]
    apply: Callable[[ir.Graph, ir.Node], Outcome]


def is_op(node: ir.Node | None, *ops: str) -> bool:
    """Whether ``node`` is one of these standard ONNX operators."""
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in ops


def producer(value: ir.Value | None, *ops: str) -> ir.Node | None:
    """The node that computes ``value`` if it is one of ``ops``."""
    node = None if value is None else value.producer()
    return node if is_op(node, *ops) else None


def same_number(value: ir.Value | None, expected: float) -> bool:
    """Whether ``value`` is a constant of one element, equal to ``expected`` within float32 noise."""
    array = constant(value)
    return (
        array is not None and array.size == 1 and bool(np.isclose(array.item(), expected, rtol=1e-6, atol=0))
    )


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute, or its default."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def ints_attribute(node: ir.Node, name: str) -> list[int]:
    """An attribute that is a list of integers; empty when absent."""
    attribute = node.attributes.get(name)
    return [] if attribute is None else list(attribute.as_ints())


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape if all of it is known."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(d) for d in value.shape)  # type: ignore[arg-type]  # is_static


def bypass(old: ir.Value, new: ir.Value) -> bool:
    """Replace ``old`` by ``new`` everywhere; a graph output keeps its name. False if that is impossible.

    It is impossible when ``old`` is a graph output and ``new`` must keep its own name (an input, another
    output, a constant) or is in another graph.
    """
    if old.is_graph_output():
        own = new.producer() is None or new.is_graph_output() or new.graph is not old.graph
        if own:
            return False
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = f"{name}_before", name
        new.type, new.shape = old.type or new.type, old.shape or new.shape  # as the model states them
    else:
        old.replace_all_uses_with(new)
    if new.shape is None and old.shape is not None:
        new.shape = old.shape.copy()
    if new.type is None:
        new.type = old.type
    return True


def remove(node: ir.Node) -> None:
    """Take a node without users out of its graph."""
    assert isinstance(node.graph, ir.Graph)
    node.graph.remove(node, safe=True)


def substitute(node: ir.Node, op_type: str, inputs: list[ir.Value | None], **attributes: object) -> ir.Node:
    """Replace ``node`` by a new node of one output, with the same value name, type, shape and consumers."""
    old = node.outputs[0]
    new = ir.node(op_type, inputs, attributes=attributes, name=node.name, num_outputs=1)  # type: ignore[arg-type]
    out = new.outputs[0]
    out.name, out.type, out.shape = old.name, old.type, None if old.shape is None else old.shape.copy()
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, new)
    old.replace_all_uses_with(out, replace_graph_outputs=True)
    old.name = f"{old.name}_before"
    remove(node)
    return new


def float_array(value: ir.Value | None) -> Array | None:
    """A constant of a floating type, as float64."""
    array = constant(value)
    if array is None or not np.issubdtype(array.dtype, np.floating):
        return None
    return array.astype(np.float64)
