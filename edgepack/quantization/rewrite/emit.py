"""Adds nodes to a graph: fresh names, shared initializers, Q/DQ pairs.

Names end in ``_q`` (quantized), ``_s`` (scale) and ``_dq`` (dequantized). They are short: in a small model
names are a good part of the file.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.ir.model import name_of, walk_nodes
from edgepack.ir.numerics import quantize
from edgepack.ir.scheme import QuantParams

TO_FLOAT = ir.AttrInt64("to", int(ir.DataType.FLOAT))


@dataclass(slots=True)
class Emitter:
    """A graph under construction, the names taken in it, and the values emitted so far, for reuse."""

    graph: ir.Graph
    taken: set[str] = field(default_factory=set)
    emitted: dict[tuple[object, ...], ir.Value] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()
    """Initializers with several consumers."""

    def __post_init__(self) -> None:
        graphs = (self.graph, *self.graph.subgraphs())
        self.shared = frozenset(n for n, v in self.graph.initializers.items() if len(v.uses()) > 1)
        names = {v.name for g in graphs for v in (*g.inputs, *g.initializers.values())}
        for node in walk_nodes(self.graph):
            names.add(node.name)
            names.update(v.name for v in (*node.inputs, *node.outputs) if v is not None)
        self.taken = {name for name in names if name}

    def fresh(self, base: str) -> str:
        """``base`` or the first unused ``base_N``; taken from now on."""
        name, number = base, 0
        while name in self.taken:
            number += 1
            name = f"{base}_{number}"
        self.taken.add(name)
        return name

    def initializer(self, base: str, array: npt.NDArray[np.generic]) -> ir.Value:
        """An initializer of the graph; equal arrays share one, named after the first."""
        raw = np.ascontiguousarray(array)
        digest = hashlib.sha256(raw.tobytes() if raw.ndim == 0 else raw.reshape(-1).view(np.uint8).data)
        key = ("initializer", raw.dtype.str, array.shape, digest.digest())
        if key not in self.emitted:
            name = self.fresh(base)
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
            self.graph.register_initializer(value)
            self.emitted[key] = value
        return self.emitted[key]

    def scale(self, base: str, params: QuantParams) -> ir.Value:
        """The scale as an initializer."""
        return self.initializer(f"{base}_s", params.scale)

    def zero_point(self, params: QuantParams) -> ir.Value:
        """The zero point as an initializer; models have few different ones."""
        shared = f"{params.type}_{int(params.zero_point.reshape(-1)[0])}"
        return self.initializer(f"zero_{shared}", params.zero_point)

    def bound(self, real: float, params: QuantParams) -> ir.Value | None:
        """A quantized bound as an initializer; ``None`` where it is infinite."""
        if np.isinf(real):
            return None
        stored = quantize(np.asarray(real, np.float32), params)
        return self.initializer(f"bound_{params.type}_{int(stored)}", stored)

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        output: str,
        *,
        outputs: int = 1,
        domain: str = "",
        attributes: Sequence[ir.Attr] = (),
    ) -> ir.Node:
        """A node, not yet in the graph. Its first output gets a fresh name based on ``output``.

        The node has no name. The runtime infers types and shapes of the emitted values.
        """
        node = ir.Node(domain, op_type, inputs, attributes, num_outputs=outputs, name="")
        for index, value in enumerate(node.outputs):
            value.name = self.fresh(f"{output}{index or ''}")
        return node

    def dequantized(
        self,
        before: ir.Node,
        base: str,
        integers: npt.NDArray[np.integer],
        params: QuantParams,
        *,
        state_zero: bool = False,
    ) -> ir.Value:
        """A quantized initializer and its DequantizeLinear, inserted before ``before``."""
        stored = self.initializer(f"{base}_q", integers)
        numbers = (params.scale.tobytes(), params.zero_point.tobytes())
        key = ("dequantized", stored.name, params.axis, *numbers, state_zero)
        if key not in self.emitted:
            node = self.restore(stored, params, base, state_zero=state_zero)
            self.graph.insert_before(before, node)
            self.emitted[key] = node.outputs[0]
        return self.emitted[key]

    def unfolded(
        self, before: ir.Node, base: str, integers: npt.NDArray[np.integer], scale: npt.NDArray[np.float32]
    ) -> ir.Value:
        """``Mul(Cast(initializer), scale)``, which the runtime folds to float when it loads the file.

        It does not fold a DequantizeLinear, which would run in every inference.
        """
        stored = self.initializer(f"{base}_q", integers)
        factor = self.initializer(f"{base}_s", scale)
        key = ("unfolded", stored.name, factor.name)
        if key not in self.emitted:
            cast = self.node("Cast", [stored], f"{base}_i", attributes=[TO_FLOAT])
            real = self.node("Mul", [cast.outputs[0], factor], f"{base}_dq")
            self.graph.insert_before(before, [cast, real])
            self.emitted[key] = real.outputs[0]
        return self.emitted[key]

    def restore(
        self,
        stored: ir.Value,
        params: QuantParams,
        base: str,
        *,
        axis: int | None = None,
        state_zero: bool = False,
    ) -> ir.Node:
        """A DequantizeLinear of ``stored``, not yet in the graph; ``axis`` replaces that of ``params``.

        A zero point of zero, the default of the operator, is left out unless ``state_zero``.
        """
        inputs = [stored, self.scale(base, params)]
        if state_zero or params.zero_point.any():
            inputs.append(self.zero_point(params))
        axis = params.axis if axis is None else axis
        # One is the default of the operator.
        along = [ir.AttrInt64("axis", axis)] if params.axis is not None and axis not in (None, 1) else []
        return self.node("DequantizeLinear", inputs, f"{base}_dq", attributes=along)

    def pair(self, value: ir.Value, params: QuantParams, base: str) -> tuple[ir.Node, ir.Node]:
        """``value -> QuantizeLinear -> DequantizeLinear``, not yet in the graph.

        Both have a zero point, even of zero: without, the runtime keeps pairs around operators that move
        data.
        """
        scale, zero = self.scale(base, params), self.zero_point(params)
        store = self.node("QuantizeLinear", [value, scale, zero], f"{base}_q")
        return store, self.node("DequantizeLinear", [store.outputs[0], scale, zero], f"{base}_dq")

    def replace(self, node: ir.Node, made: list[ir.Node], output: ir.Value) -> None:
        """Replace ``node`` by ``made``; ``output`` takes the name and the uses of its first output."""
        old = node.outputs[0]
        name = name_of(old)
        output.type, output.shape = old.type, old.shape
        self.graph.insert_before(node, made)
        ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        output.name = name
