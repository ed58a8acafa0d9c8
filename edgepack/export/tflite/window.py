"""Windows of convolutions and pools: strides, dilations and padding of ONNX for TFLite."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepack.errors import ExportError
from edgepack.export.tflite.flatbuffer import Quant
from edgepack.export.tflite.layout import Shape
from edgepack.export.tflite.lowering import Lowering
from edgepack.export.tflite.schema import Padding

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Window:
    """A window over height and width; for one spatial axis the height is 1."""

    size: Pair
    strides: Pair
    dilations: Pair
    before: Pair
    after: Pair
    """Padding before and after each axis, in entries."""
    inputs: Pair
    outputs: Pair

    @property
    def reach(self) -> Pair:
        """Entries that the window spans, including dilation."""
        reach = [(size - 1) * d + 1 for size, d in zip(self.size, self.dilations, strict=True)]
        return reach[0], reach[1]

    @property
    def needs_padding(self) -> bool:
        """Whether there is any padding."""
        return any(self.before) or any(self.after)

    @property
    def is_same(self) -> bool:
        """Whether the padding equals SAME of TFLite, at both ends of both axes."""
        for axis in (0, 1):
            length, stride = self.inputs[axis], self.strides[axis]
            total = max((-(-length // stride) - 1) * stride + self.reach[axis] - length, 0)
            if (self.before[axis], self.after[axis]) != (total // 2, total - total // 2):
                return False
        return True


def window(low: Lowering, node: ir.Node, size: tuple[int, ...]) -> Window:
    """The window of a convolution or pool with a kernel of ``size``; one axis becomes two.

    ``after`` is computed from the inferred size of the output: it includes the padding of ceil_mode, and no
    padding that no window reaches.
    """
    axes = len(size)
    value = node.inputs[0]
    lengths, outputs = low.shape(value)[2:], low.shape(node.outputs[0])[2:]
    strides = tuple(node.attributes.get_ints("strides", [1] * axes))
    dilations = tuple(node.attributes.get_ints("dilations", [1] * axes))
    pads = list(node.attributes.get_ints("pads", [0] * (2 * axes)))
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    if min(pads) < 0:
        raise ExportError(
            f"{node.op_type} {node.name!r}: negative padding is not supported in a .tflite; use a Slice"
        )
    before, after = [], []
    for axis in range(axes):
        reach = (size[axis] - 1) * dilations[axis] + 1
        needed = (outputs[axis] - 1) * strides[axis] + reach - lengths[axis]
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            total = max(needed, 0)
            start = total // 2 if auto == "SAME_UPPER" else total - total // 2
        else:
            start = 0 if auto == "VALID" else pads[axis]
        before.append(start)
        after.append(max(needed - start, 0))
    # SAME of TFLite also pads what no window reaches; count that as SAME where it changes nothing.
    filled = [
        _unreached(lengths[a], outputs[a], strides[a], (size[a] - 1) * dilations[a] + 1, before[a], after[a])
        for a in range(axes)
    ]
    return Window(
        *(
            _two(p, one)
            for p, one in (
                (size, 1),
                (strides, 1),
                (dilations, 1),
                (tuple(before), 0),
                (tuple(filled), 0),
                (lengths, 1),
                (outputs, 1),
            )
        )
    )


def _unreached(length: int, outputs: int, stride: int, reach: int, before: int, after: int) -> int:
    total = max((-(-length // stride) - 1) * stride + reach - length, 0)
    same = outputs == -(-length // stride) and before == total // 2
    return total - total // 2 if same else after


def _two(pair: tuple[int, ...], first: int) -> Pair:
    return (pair[0], pair[1]) if len(pair) == 2 else (first, pair[0])


def options(view: Window, padding: Padding) -> dict[str, float]:
    """Strides and padding as options of an operator."""
    return {"padding": padding, "stride_h": view.strides[0], "stride_w": view.strides[1]}


def padded(low: Lowering, tensor: int, view: Window, fill: float | None = None) -> tuple[int, Padding]:
    """An image tensor and the padding mode, padded by a separate operator where the padding is not SAME.

    ``fill``: the stored value of the padding; by default that of zero.
    """
    if not view.needs_padding:
        return tensor, Padding.VALID
    if view.is_same:
        return tensor, Padding.SAME
    return pad_image(low, tensor, view.before, view.after, fill), Padding.VALID


def pad_image(low: Lowering, tensor: int, before: Pair, after: Pair, fill: float | None = None) -> int:
    """``[N, H, W, C]`` with padded rows and columns."""
    key = ("pad", tensor, before, after, fill)
    if key not in low.done:
        source = low.graph.tensors[tensor]
        n, h, w, c = source.shape
        shape: Shape = (n, h + before[0] + after[0], w + before[1] + after[1], c)
        amounts = low.numbers(
            np.array([[0, 0], [before[0], after[0]], [before[1], after[1]], [0, 0]], np.int32)
        )
        kind = source.quant or source.dtype
        # PAD fills with zero, and XNNPACK delegates it, unlike PADV2.
        if fill is None or (isinstance(kind, Quant) and fill == int(kind.zero_point[0])):
            low.done[key] = low.emit("PAD", [tensor, amounts], shape, kind, source.name)
        else:
            value = low.constant(np.asarray(fill, source.dtype), "fill", source.quant)
            low.done[key] = low.emit("PADV2", [tensor, amounts, value], shape, kind, source.name)
    return low.done[key]


def repeat_border(low: Lowering, tensor: int, amounts: Sequence[Sequence[int]]) -> int:
    """Entries of the border repeated before and after each axis; XNNPACK delegates neither PADV2 nor
    MIRROR_PAD."""
    for axis, counts in enumerate(amounts):
        source = low.graph.tensors[tensor]
        shape, kind = source.shape, source.quant or source.dtype
        size = tuple(1 if i == axis else n for i, n in enumerate(shape))
        edges = []
        for count, start in zip(counts, (0, shape[axis] - 1), strict=True):
            begin = [start if i == axis else 0 for i in range(len(shape))]
            inputs = [tensor, low.numbers(begin), low.numbers(size)]
            edges.append([low.emit("SLICE", inputs, size, kind, source.name)] * count if count else [])
        if any(counts):
            target = tuple(n + sum(counts) if i == axis else n for i, n in enumerate(shape))
            parts = [*edges[0], tensor, *edges[1]]
            tensor = low.emit("CONCATENATION", parts, target, kind, source.name, axis=axis)
    return tensor
