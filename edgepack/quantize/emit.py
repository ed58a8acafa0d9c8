"""Writing nodes into a graph: fresh names, stored constants that are shared, Q/DQ pairs."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.model import name_of, walk_nodes
from edgepack.scheme import QuantParams


@dataclass(slots=True)
class Emitter:
    """A graph under construction, the names taken in it, and what has been emitted once already."""

    graph: ir.Graph
    taken: set[str] = field(default_factory=set)
    emitted: dict[tuple[object, ...], ir.Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = {v.name for v in (*self.graph.inputs, *self.graph.initializers.values())}
        for node in walk_nodes(self.graph):
            names.add(node.name)
            names.update(v.name for v in (*node.inputs, *node.outputs) if v is not None)
        self.taken = {name for name in names if name}

    def fresh(self, base: str) -> str:
        """``base`` or the first ``base_N`` that nothing in the graph is called; taken from now on."""
        name, number = base, 0
        while name in self.taken:
            number += 1
            name = f"{base}_{number}"
        self.taken.add(name)
        return name

    def initializer(self, base: str, array: npt.NDArray[np.generic]) -> ir.Value:
        """A constant of the graph; equal arrays asked for under one base name are one constant."""
        raw = np.ascontiguousarray(array)
        digest = hashlib.sha256(raw.tobytes() if raw.ndim == 0 else raw.reshape(-1).view(np.uint8).data)
        key = ("initializer", base, raw.dtype.str, raw.shape, digest.digest())
        if key not in self.emitted:
            name = self.fresh(base)
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
            self.graph.register_initializer(value)
            self.emitted[key] = value
        return self.emitted[key]

    def params(self, base: str, params: QuantParams) -> tuple[ir.Value, ir.Value]:
        """Scale and zero point as constants."""
        return (
            self.initializer(f"{base}_scale", params.scale),
            self.initializer(f"{base}_zero_point", params.zero_point),
        )

    def node(
        self, op_type: str, inputs: list[ir.Value], base: str, *, outputs: int = 1, **attributes: int
    ) -> ir.Node:
        """A node, not yet in the graph, its outputs named ``base_op``."""
        node = ir.node(
            op_type,
            inputs,
            attributes=attributes,
            num_outputs=outputs,
            name=self.fresh(f"{base}_{op_type}"),
        )
        for index, value in enumerate(node.outputs):
            value.name = self.fresh(f"{base}_{op_type}_output{index or ''}")
        return node

    def dequantized(
        self, before: ir.Node, base: str, integers: npt.NDArray[np.integer], params: QuantParams
    ) -> ir.Value:
        """A stored constant behind its DequantizeLinear, put before ``before``."""
        stored = self.initializer(f"{base}_quantized", integers)
        key = ("dequantized", stored.name, params.axis, params.scale.tobytes(), params.zero_point.tobytes())
        if key not in self.emitted:
            node = self.restore(stored, params, base)
            node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, stored.shape
            self.graph.insert_before(before, node)
            self.emitted[key] = node.outputs[0]
        return self.emitted[key]

    def unfolded(
        self, before: ir.Node, base: str, integers: npt.NDArray[np.integer], params: QuantParams
    ) -> ir.Value:
        """A stored constant behind Cast and Mul, which the runtime folds to float when it loads the file.

        It does not fold a DequantizeLinear: that would run anew in every inference.
        """
        shape = [1] * integers.ndim
        if params.axis is not None:
            shape[params.axis] = -1
        stored = self.initializer(f"{base}_quantized", integers)
        scale = self.initializer(f"{base}_scale", params.scale.reshape(shape))
        key = ("unfolded", stored.name, scale.name)
        if key not in self.emitted:
            cast = self.node("Cast", [stored], base, to=int(ir.DataType.FLOAT))
            real = self.node("Mul", [cast.outputs[0], scale], base)
            for out in (cast.outputs[0], real.outputs[0]):
                out.dtype, out.shape = ir.DataType.FLOAT, stored.shape
            self.graph.insert_before(before, [cast, real])
            self.emitted[key] = real.outputs[0]
        return self.emitted[key]

    def restore(self, stored: ir.Value, params: QuantParams, base: str, axis: int | None = None) -> ir.Node:
        """A DequantizeLinear of ``stored``, not yet in the graph; ``axis`` where it is not the parameters' own."""
        scale, zero = self.params(base, params)
        if params.axis is None:
            return self.node("DequantizeLinear", [stored, scale, zero], base)
        return self.node(
            "DequantizeLinear", [stored, scale, zero], base, axis=params.axis if axis is None else axis
        )

    def pair(self, value: ir.Value, params: QuantParams, base: str) -> tuple[ir.Node, ir.Node]:
        """``value -> QuantizeLinear -> DequantizeLinear``, not yet in the graph."""
        scale, zero = self.params(base, params)
        store = self.node("QuantizeLinear", [value, scale, zero], base)
        restore = self.node("DequantizeLinear", [store.outputs[0], scale, zero], base)
        store.outputs[0].dtype, store.outputs[0].shape = ir.DataType[params.type.name], value.shape
        restore.outputs[0].dtype, restore.outputs[0].shape = ir.DataType.FLOAT, value.shape
        return store, restore

    def replace(self, node: ir.Node, made: list[ir.Node], output: ir.Value) -> None:
        """Put ``made`` in the place of ``node``, whose first output ``output`` becomes, name and all."""
        old = node.outputs[0]
        name = name_of(old)
        output.type, output.shape = old.type, old.shape
        self.graph.insert_before(node, made)
        ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        output.name = name
