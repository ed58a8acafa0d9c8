"""Shapes, types and layout."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgepack.training.operators.window import crop_pad
from edgepack.training.step import Operator, Step, axes_of, integers, pick

TYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
"""torch types by ONNX data type."""
PAD_MODES = {"edge": "edge", "reflect": "reflect", "wrap": "wrap"}


def identity(step: Step, x: Tensor) -> Tensor:
    """Identity."""
    return x


def reshape(step: Step, x: Tensor, shape: Tensor | None = None) -> Tensor:
    """Reshape; a zero keeps the size, unless ``allowzero``."""
    wanted = list(step.get("shape")) if shape is None else [int(s) for s in shape.tolist()]
    if not step.get("allowzero", 0):
        wanted = [x.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    return x.reshape(wanted)


def flatten(step: Step, x: Tensor) -> Tensor:
    """Flatten to a matrix."""
    axis = step.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def transpose(step: Step, x: Tensor) -> Tensor:
    """Transpose; without ``perm`` all axes are reversed."""
    return x.permute(step.get("perm", list(reversed(range(x.dim())))))


def squeeze(step: Step, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Squeeze."""
    chosen = axes_of(step, axes)
    return x.squeeze() if chosen is None else x.squeeze(tuple(a % x.dim() for a in chosen))


def unsqueeze(step: Step, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Unsqueeze; axes are those of the result."""
    chosen = axes_of(step, axes) or []
    for axis in sorted(a % (x.dim() + len(chosen)) for a in chosen):
        x = x.unsqueeze(axis)
    return x


def concat(step: Step, *tensors: Tensor) -> Tensor:
    """Concat; the axis defaults to 1, as in opset 1."""
    return torch.cat(tensors, step.get("axis", 1))


def split(step: Step, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    """Split into given or nearly equal sizes."""
    axis = step.get("axis", 0)
    parts = step.get("split") if sizes is None else integers(sizes)
    if parts is None:
        size = -(-x.shape[axis] // len(step.outputs))
        parts = [min(size, x.shape[axis] - i * size) for i in range(len(step.outputs))]
    return tuple(torch.split(x, list(parts), axis))


def slice_(
    step: Step,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """Slice; attributes before opset 10."""
    first = list(step.get("starts")) if starts is None else integers(starts) or []
    last = list(step.get("ends")) if ends is None else integers(ends) or []
    along = axes_of(step, axes) or list(range(len(first)))
    strides = integers(steps) or [1] * len(first)
    for begin, end, axis, stride in zip(first, last, along, strides, strict=True):
        places = range(*slice(begin, end, stride).indices(x.shape[axis]))
        if stride == 1:
            x = x.narrow(axis, min(places.start, x.shape[axis]), len(places))
        else:
            x = pick(x, axis, places)
    return x


def expand(step: Step, x: Tensor, shape: Tensor) -> Tensor:
    """Expand, with bidirectional broadcasting."""
    return x.expand(torch.broadcast_shapes(x.shape, tuple(shape.tolist())))


def tile(step: Step, x: Tensor, repeats: Tensor) -> Tensor:
    """Tile."""
    return x.repeat(integers(repeats))


def shape_of(step: Step, x: Tensor) -> Tensor:
    """Shape, or a slice of it."""
    return torch.tensor(list(x.shape)[slice(step.get("start", 0), step.get("end"))], dtype=torch.int64)


def size_of(step: Step, x: Tensor) -> Tensor:
    """Size: the number of elements."""
    return torch.tensor(x.numel())


def cast(step: Step, x: Tensor) -> Tensor:
    """Cast."""
    return x.to(TYPES[step.get("to")])


def cast_like(step: Step, x: Tensor, like: Tensor) -> Tensor:
    """CastLike."""
    return x.to(like.dtype)


def range_(step: Step, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """Range."""
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def constant_of_shape(step: Step, shape: Tensor) -> Tensor:
    """ConstantOfShape."""
    value = step.get("value")
    value = torch.zeros(1) if value is None else value
    return torch.full(shape.tolist(), value.item(), dtype=value.dtype)


def eye_like(step: Step, x: Tensor) -> Tensor:
    """EyeLike."""
    kind = TYPES[step.get("dtype")] if step.get("dtype") is not None else x.dtype
    rows, columns = torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])
    return (columns - rows == step.get("k", 0)).to(kind)


def trilu(step: Step, x: Tensor, k: Tensor | None = None) -> Tensor:
    """Trilu: the upper or lower triangle."""
    return (torch.triu if step.get("upper", 1) else torch.tril)(x, 0 if k is None else int(k))


def pad(
    step: Step, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    """Pad; negative amounts crop. Attributes before opset 11."""
    amounts = list(step.get("pads", step.get("paddings"))) if pads is None else integers(pads) or []
    half = len(amounts) // 2
    chosen = list(range(half)) if axes is None else [a % x.dim() for a in integers(axes) or []]
    begin, end = [0] * x.dim(), [0] * x.dim()
    for axis, before, behind in zip(chosen, amounts[:half], amounts[half:], strict=True):
        begin[axis], end[axis] = before, behind
    mode = step.get("mode", "constant")
    if mode == "constant":
        fill = step.get("value", 0.0) if value is None else value.item()
        return crop_pad(x, begin, end, fill)
    for axis, (before, behind) in enumerate(zip(begin, end, strict=True)):
        if before or behind:
            kept = np.arange(x.shape[axis])[max(-before, 0) : x.shape[axis] + min(behind, 0)]
            grown: Any = np.pad(kept, (max(before, 0), max(behind, 0)), mode=PAD_MODES[mode])  # type: ignore[call-overload]
            x = pick(x, axis, grown.tolist())
    return x


def center_crop_pad(step: Step, x: Tensor, shape: Tensor) -> Tensor:
    """CenterCropPad."""
    wanted = integers(shape) or []
    axes = [a % x.dim() for a in step.get("axes", range(x.dim()))]
    begin, end = [0] * x.dim(), [0] * x.dim()
    for axis, size in zip(axes, wanted, strict=True):
        more = size - x.shape[axis]
        begin[axis] = more // 2 if more >= 0 else -(-more // 2)
        end[axis] = more - begin[axis]
    return crop_pad(x, begin, end)


def depth_to_space(step: Step, x: Tensor) -> Tensor:
    """DepthToSpace."""
    block = step.get("blocksize")
    n, channels, height, width = x.shape
    left = channels // block**2
    if step.get("mode", "DCR") == "DCR":
        parts = x.reshape(n, block, block, left, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(n, left, block, block, height, width).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(n, left, height * block, width * block)


def space_to_depth(step: Step, x: Tensor) -> Tensor:
    """SpaceToDepth."""
    block = step.get("blocksize")
    n, channels, height, width = x.shape
    parts = x.reshape(n, channels, height // block, block, width // block, block)
    order = (0, 3, 5, 1, 2, 4) if step.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    parts = parts.permute(order)
    return parts.reshape(n, channels * block**2, height // block, width // block)


OPERATORS: dict[str, Operator] = {
    "Cast": cast,
    "CastLike": cast_like,
    "CenterCropPad": center_crop_pad,
    "Concat": concat,
    "ConstantOfShape": constant_of_shape,
    "DepthToSpace": depth_to_space,
    "Expand": expand,
    "EyeLike": eye_like,
    "Flatten": flatten,
    "Identity": identity,
    "Pad": pad,
    "Range": range_,
    "Reshape": reshape,
    "Shape": shape_of,
    "Size": size_of,
    "Slice": slice_,
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Squeeze": squeeze,
    "Tile": tile,
    "Transpose": transpose,
    "Trilu": trilu,
    "Unsqueeze": unsqueeze,
}
