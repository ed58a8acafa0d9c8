"""Windows over images: strides, dilations and padding of ONNX as TFLite has them."""

from dataclasses import dataclass

import onnx_ir as ir

from edgepack.errors import ExportError
from edgepack.export.tflite.layout import Shape
from edgepack.export.tflite.lowering import Lowering, Quant
from edgepack.export.tflite.schema import Padding

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Window:
    """A window on height and width (one axis: height 1)."""

    size: Pair
    strides: Pair
    dilations: Pair
    before: Pair
    after: Pair
    """Padding before and behind each axis, in entries."""
    inputs: Pair
    outputs: Pair

    @property
    def reach(self) -> Pair:
        """Entries that the window covers, dilation included."""
        reach = [(size - 1) * d + 1 for size, d in zip(self.size, self.dilations, strict=True)]
        return reach[0], reach[1]

    @property
    def needs_padding(self) -> bool:
        """Whether there is any padding."""
        return any(self.before) or any(self.after)

    @property
    def is_same(self) -> bool:
        """Whether the padding is what SAME of TFLite means, at both ends of both axes."""
        for axis in (0, 1):
            length, stride = self.inputs[axis], self.strides[axis]
            total = max((-(-length // stride) - 1) * stride + self.reach[axis] - length, 0)
            if (self.before[axis], self.after[axis]) != (total // 2, total - total // 2):
                return False
        return True


def window(low: Lowering, node: ir.Node, size: tuple[int, ...]) -> Window:
    """The window of a convolution or pool with a kernel of ``size``; one axis becomes two.

    ``after`` is what the output, whose size shape inference knows, needs: ceil_mode reads beyond the padding,
    and what no window reaches is not padded.
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
            f"{node.op_type} {node.name!r}: negative padding has no form in a .tflite; use a Slice"
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
    # SAME of TFLite also pads what no window reaches; say so where it is all the same.
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
    """An image tensor as the operator wants it, padded by an operator of its own where SAME is not meant.

    ``fill``: the stored value to pad with; without, zero (its zero point for int8).
    """
    if not view.needs_padding:
        return tensor, Padding.VALID
    if view.is_same:
        return tensor, Padding.SAME
    return pad_image(low, tensor, view.before, view.after, fill), Padding.VALID


def pad_image(low: Lowering, tensor: int, before: Pair, after: Pair, fill: float | None = None) -> int:
    """``[N, H, W, C]`` with rows and columns around it."""
    key = ("pad", tensor, before, after, fill)
    if key not in low.done:
        source = low.graph.tensors[tensor]
        n, h, w, c = source.shape
        shape: Shape = (n, h + before[0] + after[0], w + before[1] + after[1], c)
        amounts = low.numbers([[0, 0], [before[0], after[0]], [before[1], after[1]], [0, 0]])
        kind = source.quant or source.dtype
        # PAD fills with zero, and stays with the delegate, which has no PADV2.
        if fill is None or (isinstance(kind, Quant) and fill == int(kind.zero_point[0])):
            low.done[key] = low.emit("PAD", [tensor, amounts], shape, kind, source.name)
        else:
            value = low.constant(source.dtype.type(fill), "fill", source.quant)
            low.done[key] = low.emit("PADV2", [tensor, amounts, value], shape, kind, source.name)
    return low.done[key]
