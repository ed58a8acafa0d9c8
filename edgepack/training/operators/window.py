"""Padding rules and pooling."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgepack.training.step import Operator, Step

CONV: dict[int, Any] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
MAX_POOL: dict[int, Any] = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
AVERAGE_POOL: dict[int, Any] = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


def paddings(
    step: Step, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Padding at the begin and end of each spatial axis, from ``pads`` or ``auto_pad``."""
    rank = len(kernel)
    auto = step.get("auto_pad", "NOTSET")
    if auto == "VALID":
        return [0] * rank, [0] * rank
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True)
        ]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        return (less, more) if auto == "SAME_UPPER" else (more, less)
    pads = step.get("pads", [0] * (2 * rank))
    return list(pads[:rank]), list(pads[rank:])


def crop_pad(x: Tensor, begin: Sequence[int], end: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad the last axes; negative amounts crop."""
    if not any(begin) and not any(end):
        return x
    amounts: list[int] = []
    for b, e in zip(reversed(begin), reversed(end), strict=True):
        amounts += [b, e]
    return functional.pad(x, amounts, value=value)


class _Window:
    """The geometry of a pooling node on an input of given spatial ``sizes``."""

    def __init__(self, step: Step, sizes: Sequence[int]) -> None:
        self.kernel = list(step.get("kernel_shape"))
        rank = len(self.kernel)
        self.strides = list(step.get("strides", [1] * rank))
        self.dilations = list(step.get("dilations", [1] * rank))
        self.begin, self.end = paddings(step, sizes, self.kernel, self.strides, self.dilations)
        self.rest = []
        """Padding at the end of each axis with which the windows cover the input exactly."""
        same = step.get("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER")
        for size, k, s, d, b, e in zip(
            sizes, self.kernel, self.strides, self.dilations, self.begin, self.end, strict=True
        ):
            reach = (k - 1) * d + 1
            room = (size + b + e - reach) / s
            count = (math.ceil(room) if step.get("ceil_mode", 0) and not same else math.floor(room)) + 1
            if (count - 1) * s >= size + b:  # a window wholly in the padding does not count
                count -= 1
            self.rest.append((count - 1) * s + reach - size - b)

    def padded(self, x: Tensor, value: float) -> Tensor:
        return crop_pad(x, self.begin, self.rest, value)

    def sums(self, x: Tensor) -> Tensor:
        """Sums over the windows of an input that is padded already."""
        rank = len(self.kernel)
        if max(self.dilations) == 1:
            means: Tensor = AVERAGE_POOL[rank](x, self.kernel, self.strides)
            return means * math.prod(self.kernel)
        ones = torch.ones([1, 1, *self.kernel], dtype=x.dtype)
        flat = x.reshape(-1, 1, *x.shape[2:])
        total = CONV[rank](flat, ones, None, self.strides, 0, self.dilations)
        return total.reshape(*x.shape[:2], *total.shape[2:])


def max_pool(step: Step, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """MaxPool, with the optional output of indices."""
    window = _Window(step, x.shape[2:])
    rank = len(window.kernel)
    low = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    work = window.padded(x if x.is_floating_point() else x.double(), float(low))
    arguments = (window.kernel, window.strides, 0, window.dilations)
    if len(step.outputs) == 1:
        best: Tensor = MAX_POOL[rank](work, *arguments)
        return best.to(x.dtype)
    best, places = MAX_POOL[rank](work, *arguments, return_indices=True)
    return best.to(x.dtype), _places(step, places, work.shape[2:], x, window.begin)


def _places(step: Step, places: Tensor, padded: Sequence[int], x: Tensor, begin: list[int]) -> Tensor:
    """Indices into the padded plane as indices into ``x`` flattened."""
    coordinates: list[Tensor] = []
    for size in reversed(padded):
        coordinates.insert(0, places % size)
        places = places // size
    inner = [c - b for c, b in zip(coordinates, begin, strict=True)]
    sizes = list(x.shape[2:])
    if step.get("storage_order", 0):
        inner, sizes = inner[::-1], sizes[::-1]
    flat = torch.zeros_like(inner[0])
    for coordinate, size in zip(inner, sizes, strict=True):
        flat = flat * size + coordinate
    planes = torch.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2], *[1] * len(sizes))
    return flat + planes * math.prod(sizes)


def max_unpool(step: Step, x: Tensor, places: Tensor, shape: Tensor | None = None) -> Tensor:
    """MaxUnpool: write values to their indices, zero elsewhere."""
    kernel = step.get("kernel_shape")
    rank = len(kernel)
    strides = step.get("strides", [1] * rank)
    pads = step.get("pads", [0] * (2 * rank))
    sizes = [
        (size - 1) * s - pads[i] - pads[rank + i] + k
        for i, (size, s, k) in enumerate(zip(x.shape[2:], strides, kernel, strict=True))
    ]
    implied = [*x.shape[:2], *sizes]
    made = torch.zeros(math.prod(implied), dtype=x.dtype)
    made = made.scatter(0, places.reshape(-1), x.reshape(-1)).reshape(implied)
    if shape is None:
        return made
    wanted = [int(s) for s in shape.tolist()]
    return crop_pad(made, [0] * rank, [w - h for w, h in zip(wanted[2:], sizes, strict=True)])


def average_pool(step: Step, x: Tensor) -> Tensor:
    """AveragePool; padding counts only with ``count_include_pad``."""
    window = _Window(step, x.shape[2:])
    total = window.sums(window.padded(x, 0.0))
    ones = torch.ones([1, 1, *x.shape[2:]], dtype=x.dtype)
    if step.get("count_include_pad", 0):
        ones = crop_pad(ones, window.begin, window.end, 1.0)
        grown = [r - e for r, e in zip(window.rest, window.end, strict=True)]
        counted = window.sums(crop_pad(ones, [0] * len(grown), grown))
    else:
        counted = window.sums(window.padded(ones, 0.0))
    return total / counted


def lp_pool(step: Step, x: Tensor) -> Tensor:
    """LpPool: the p-norm of each window."""
    window, p = _Window(step, x.shape[2:]), step.get("p", 2)
    return window.sums(window.padded(x.abs() ** p, 0.0)) ** (1 / p)


def _spatial(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.dim()))


def global_average_pool(step: Step, x: Tensor) -> Tensor:
    """The mean of each channel."""
    return x.mean(_spatial(x), keepdim=True)


def global_max_pool(step: Step, x: Tensor) -> Tensor:
    """The maximum of each channel."""
    return x.amax(_spatial(x), keepdim=True)


def global_lp_pool(step: Step, x: Tensor) -> Tensor:
    """The p-norm of each channel."""
    p = step.get("p", 2)
    return (x.abs() ** p).sum(_spatial(x), keepdim=True) ** (1 / p)


OPERATORS: dict[str, Operator] = {
    "AveragePool": average_pool,
    "GlobalAveragePool": global_average_pool,
    "GlobalLpPool": global_lp_pool,
    "GlobalMaxPool": global_max_pool,
    "LpPool": lp_pool,
    "MaxPool": max_pool,
    "MaxUnpool": max_unpool,
}
