"""The state of a conversion: the tensors of the file that hold each value of the graph, and their layout.

A value may be in the file several times: as int8 and as float32, in several orders of axes (:mod:`.layout`).
Each is a :class:`View`. :meth:`Lowering.read` gives a tensor in the type and order that an operator needs,
and writes the missing QUANTIZE, DEQUANTIZE, TRANSPOSE or RESHAPE, each once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgepack.export.tflite.flatbuffer import Graph, Operator, Options, Quant, Tensor
from edgepack.export.tflite.layout import (
    Order,
    Shape,
    arranged,
    channels_last,
    merged_permutation,
    native,
    permutation,
    same_data,
)
from edgepack.export.tflite.schema import OPS, Activation
from edgepack.export.tflite.tasks import (
    FLOAT,
    SCHEME,
    UNBOUNDED,
    Bounds,
    Output,
    Task,
    View,
    dtype_of,
    quant,
    quant_of,
    stored_as,
)
from edgepack.ir.arrays import Array
from edgepack.ir.model import constant, name_of
from edgepack.ir.numerics import choose_params

INT8 = np.dtype(np.int8)
QMIN, QMAX = -128, 127
FUSED: Mapping[Bounds, Activation] = {
    UNBOUNDED: Activation.NONE,
    (0.0, np.inf): Activation.RELU,
    (-1.0, 1.0): Activation.RELU_N1_TO_1,
    (0.0, 6.0): Activation.RELU6,
}
PRODUCT_RATIO = (2.0**-8, 2.0**7)
"""Bounds of input scale over output scale of a MUL; XNNPACK accepts twice this range."""
_DEDUPLICATED_BYTES = 4096


@dataclass(slots=True)
class Lowering:
    """The graph so far, and the tensors of each value."""

    params: Mapping[str, Quant]
    """Planned parameters by value name."""
    graph: Graph = field(default_factory=Graph)
    views: dict[tuple[str, bool], list[View]] = field(default_factory=dict)
    """By value name and whether the tensor is int8."""
    done: dict[tuple[object, ...], int] = field(default_factory=dict)
    origins: dict[int, int] = field(default_factory=dict)
    """The input of each RESHAPE, so that a RESHAPE of its output starts there."""
    islands: dict[str, str] = field(default_factory=dict)
    """Nodes that compute in float though their plan is int8, with the reason."""
    tasks: Mapping[str, "Task"] = field(default_factory=dict)
    """All groups by name."""
    joined: set[str] = field(default_factory=set)
    """Groups whose operator writes the output of the next group."""
    skipped: set[str] = field(default_factory=set)
    """Groups that were written together with an earlier one."""

    # --- look-ups ----------------------------------------------------------------------------------------

    def shape(self, value: ir.Value | None) -> Shape:
        """The ONNX shape of a value."""
        assert value is not None
        array = constant(value)
        if array is not None:
            return tuple(array.shape)
        assert value.shape is not None
        return tuple(int(d) for d in value.shape)  # type: ignore[arg-type]

    def is_integer(self, value: ir.Value | None) -> bool:
        """Whether an int8 tensor of the value exists."""
        return value is not None and (name_of(value), True) in self.views

    def orders(self, value: ir.Value | None) -> list[Order]:
        """Orders in which the value is in the file; empty for constants, which are written in any order."""
        if value is None or constant(value) is not None:
            return []
        name = name_of(value)
        return [v.order for integer in (True, False) for v in self.views.get((name, integer), ())]

    def quant(self, tensor: int) -> Quant:
        """Parameters of an int8 tensor."""
        found = self.graph.tensors[tensor].quant
        assert found is not None
        return found

    def planned(self, value: ir.Value) -> Quant:
        """Parameters of a value in the plan."""
        return self.params[name_of(value)]

    # --- operators ---------------------------------------------------------------------------------------

    def emit(
        self,
        op: str,
        inputs: Sequence[int],
        shape: Shape,
        kind: "Quant | np.dtype[np.generic]",
        name: str,
        **options: float,
    ) -> int:
        """Write an operator with one output; ``kind`` is the output's type, a Quant means int8."""
        (output,) = self.emit_many(op, inputs, [shape], kind, [name], **options)
        return output

    def emit_many(
        self,
        op: str,
        inputs: Sequence[int],
        shapes: Sequence[Shape],
        kind: "Quant | np.dtype[np.generic]",
        names: Sequence[str],
        **options: float,
    ) -> list[int]:
        """Write an operator with several outputs of one type."""
        found = kind if isinstance(kind, Quant) else None
        dtype = INT8 if isinstance(kind, Quant) else kind
        outputs = [
            self.graph.add(Tensor(name, shape, dtype, found))
            for name, shape in zip(names, shapes, strict=True)
        ]
        integer = any(self.graph.tensors[i].quant is not None for i in inputs if i >= 0)
        version = OPS[op].integer_version if integer else OPS[op].version
        self.graph.operators.append(Operator(op, tuple(inputs), tuple(outputs), version, options))
        return outputs

    def constant(self, array: Array, name: str, kind: Quant | None = None) -> int:
        """A constant tensor; small ones with equal content are shared."""
        array = np.asarray(array)
        if array.nbytes > _DEDUPLICATED_BYTES:
            return self.graph.add(Tensor(name, tuple(array.shape), array.dtype, kind, array))
        scales = () if kind is None else (kind.scale.tobytes(), kind.zero_point.tobytes(), kind.axis)
        key = ("constant", array.tobytes(), array.shape, array.dtype.str, *scales)
        if key not in self.done:
            self.done[key] = self.graph.add(Tensor(name, tuple(array.shape), array.dtype, kind, array))
        return self.done[key]

    def numbers(self, numbers: Sequence[int] | Array) -> int:
        """An int32 constant, for shapes, axes and sizes."""
        return self.constant(np.asarray(numbers, np.int32), "numbers")

    def reshape(self, tensor: int, shape: Shape) -> int:
        """The same bytes in another shape."""
        tensor = self.origins.get(tensor, tensor)
        source = self.graph.tensors[tensor]
        if source.shape == shape:
            return tensor
        if source.data is not None:
            return self.constant(source.data.reshape(shape), source.name, source.quant)
        key = ("reshape", tensor, shape)
        if key not in self.done:
            kind = source.quant or source.dtype
            self.done[key] = self.emit("RESHAPE", [tensor, self.numbers(shape)], shape, kind, source.name)
            self.origins[self.done[key]] = tensor
        return self.done[key]

    def requantize(self, tensor: int, kind: Quant) -> int:
        """An int8 tensor with other parameters: a MUL by one, which rounds as ONNX does.

        QUANTIZE from int8 to int8 has an 8-bit multiplier in XNNPACK, and is off by one in 5% of cases; MUL
        has a float multiplier and costs the same.
        """
        before = self.quant(tensor)
        if before.same(kind):
            return tensor
        key = ("requantize", tensor, kind.scale.tobytes(), kind.zero_point.tobytes())
        if key not in self.done:
            source = self.graph.tensors[tensor]
            inputs, op = [tensor], "QUANTIZE"
            if PRODUCT_RATIO[0] < before.scale[0] / kind.scale[0] < PRODUCT_RATIO[1]:
                one = self.constant(
                    np.full((1,) * len(source.shape), QMAX, np.int8), "one", quant(1 / QMAX, 0)
                )
                inputs, op = [tensor, one], "MUL"
            self.done[key] = self.emit(op, inputs, source.shape, kind, f"{source.name}_r")
        return self.done[key]

    def clamp(self, tensor: int, bounds: Bounds) -> int:
        """An operator for an activation that is neither fused nor a saturation."""
        source = self.graph.tensors[tensor]
        if bounds == UNBOUNDED:
            return tensor
        kind = source.quant or source.dtype
        fused = FUSED.get(bounds)
        if source.quant is None and fused is not None:
            return self.emit(fused.name, [tensor], source.shape, kind, source.name)
        for op, bound in (("MAXIMUM", bounds[0]), ("MINIMUM", bounds[1])):
            if not np.isfinite(bound):
                continue
            limit = np.full((1,) * len(source.shape), bound, np.float32)
            stored = limit if source.quant is None else stored_as(limit, source.quant)
            if source.quant is not None and int(stored.flat[0]) == (QMIN if op == "MAXIMUM" else QMAX):
                continue
            right = self.constant(stored, "bound", source.quant)
            tensor = self.emit(op, [tensor, right], source.shape, kind, source.name)
        return tensor

    # --- values ------------------------------------------------------------------------------------------

    def put(self, value: ir.Value, tensor: int, order: Order) -> None:
        """Record that ``tensor`` holds ``value``, stored in ``order``."""
        integer = self.graph.tensors[tensor].quant is not None
        views = self.views.setdefault((name_of(value), integer), [])
        if not any(same_data(self.shape(value), v.order, order) for v in views):
            views.append(View(tensor, order))

    def read(self, value: ir.Value | None, order: Order, *, integer: bool) -> int:
        """A tensor with the shape of ``value`` in ``order``, int8 or the type of the ONNX graph.

        An ``order`` with more axes than the value adds leading axes of size 1.
        """
        assert value is not None
        extra = len(order) - len(self.shape(value))
        shape = (1,) * extra + self.shape(value)
        own = tuple(axis - extra for axis in order if axis >= extra)
        array = constant(value)
        if array is not None:
            return self._constant_operand(value, array.reshape(shape), order, integer=integer)
        return self.reshape(self._view(value, own, integer=integer).tensor, arranged(shape, order))

    def read_image(self, value: ir.Value | None, *, integer: bool) -> int:
        """A value of three or four axes as ``[N, H, W, C]``, H being 1 for three."""
        assert value is not None
        tensor = self.read(value, channels_last(len(self.shape(value))), integer=integer)
        shape = self.graph.tensors[tensor].shape
        return tensor if len(shape) == 4 else self.reshape(tensor, (shape[0], 1, *shape[1:]))

    def image_shape(self, value: ir.Value) -> Shape:
        """The shape of a value of three or four axes as ``[N, H, W, C]``."""
        shape = arranged(self.shape(value), channels_last(len(self.shape(value))))
        return shape if len(shape) == 4 else (shape[0], 1, *shape[1:])

    def write(
        self,
        task: Task,
        op: str,
        inputs: Sequence[int],
        output: Output,
        *,
        fuses: bool = False,
        options: Options | None = None,
    ) -> None:
        """Write the operator that computes the group's output; ``fuses``: it can fuse an activation."""
        value, bounds = task.output, task.bounds
        stored = arranged(self.shape(value), output.order) if output.shape is None else output.shape
        if fuses and bounds in FUSED:
            options, bounds = {**(options or {}), "fused_activation_function": FUSED[bounds]}, UNBOUNDED
        result: Quant | np.dtype[np.generic] = dtype_of(value)
        if task.integer:
            result = output.kind or self.planned(value)
        tensor = self.clamp(self.emit(op, inputs, stored, result, name_of(value), **(options or {})), bounds)
        if task.integer:
            tensor = self.requantize(tensor, self.planned(value))
        self.put(value, tensor, output.order)

    def _view(self, value: ir.Value, order: Order, *, integer: bool) -> View:
        """A view in ``order``, written where it is missing."""
        name, shape = name_of(value), self.shape(value)
        views = self.views.get((name, integer), [])
        for view in views:
            if same_data(shape, view.order, order):
                return view
        if not views:
            self._convert(value, order, integer=integer)
            return self._view(value, order, integer=integer)
        self.put(value, self._transpose(views[0], shape, order), order)
        return self._view(value, order, integer=integer)

    def _convert(self, value: ir.Value, order: Order, *, integer: bool) -> None:
        """Quantize or dequantize; a TRANSPOSE besides is done in int8, which is fewer bytes."""
        name, shape = name_of(value), self.shape(value)
        others = self.views.get((name, not integer), [])
        assert others, f"{name!r} is read before it is written"
        if not integer:
            view = self._view(value, order, integer=True)
            source = self.graph.tensors[view.tensor]
            tensor = self.emit("DEQUANTIZE", [view.tensor], source.shape, FLOAT, name)
        else:
            view = next((v for v in others if same_data(shape, v.order, order)), others[0])
            source = self.graph.tensors[view.tensor]
            tensor = self.emit("QUANTIZE", [view.tensor], source.shape, self.params[name], name)
        self.put(value, tensor, view.order)

    def _transpose(self, view: View, shape: Shape, order: Order) -> int:
        source = self.graph.tensors[view.tensor]
        sizes, perm = arranged(shape, view.order), permutation(view.order, order)
        if source.shape != sizes or len(sizes) > 5:
            sizes, perm = merged_permutation(shape, view.order, order)
        start = self.reshape(view.tensor, sizes)
        target = tuple(sizes[p] for p in perm)
        kind = source.quant or source.dtype
        return self.emit("TRANSPOSE", [start, self.numbers(perm)], target, kind, source.name)

    def _constant_operand(self, value: ir.Value, array: Array, order: Order, *, integer: bool) -> int:
        key = ("operand", name_of(value), order, integer)
        if key not in self.done:
            stored, kind = np.ascontiguousarray(array.transpose(order)), None
            if integer:
                kind = quant_of(choose_params(float(array.min()), float(array.max()), SCHEME))
                stored = stored_as(stored, kind)
            self.done[key] = self.constant(stored, name_of(value), kind)
        return self.done[key]

    # --- orders ------------------------------------------------------------------------------------------

    def common_order(self, values: Sequence[ir.Value | None], rank: int) -> Order:
        """The order in which the fewest elements of ``values`` need a TRANSPOSE.

        Values with fewer axes than ``rank`` are broadcast and do not count.
        """
        full = [v for v in values if v is not None and constant(v) is None and len(self.shape(v)) == rank]
        candidates = list(dict.fromkeys(order for v in full for order in self.orders(v)))
        if not candidates:
            return native(rank)

        def moved(order: Order) -> int:
            total = 0
            for value in full:
                shape = self.shape(value)
                if not any(same_data(shape, order, other) for other in self.orders(value)):
                    total += int(np.prod(shape))
            return total

        return min(candidates, key=moved)
