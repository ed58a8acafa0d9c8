"""QuantizeLinear and DequantizeLinear: rounding is straight-through, saturated values get no gradient."""

from typing import Any

import torch
from torch import Tensor

from edgepack.training.operators.shapes import TYPES
from edgepack.training.step import Operator, Step, spread

RANGES: dict[torch.dtype, tuple[int, int]] = {
    torch.int8: (-128, 127),
    torch.uint8: (0, 255),
    torch.int16: (-32768, 32767),
    torch.int32: (-(2**31), 2**31 - 1),
}
"""The range of an integer type."""


def round_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient is that of the identity (Bengio et al., 2013)."""
    return x + (x.round() - x).detach()


class _Quantize(torch.autograd.Function):  # type: ignore[misc]
    """``clamp(round(x / scale) + zero)``; saves one array for the gradient, where torch would save five."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int) -> Tensor:
        made = (x / scale).round_()
        if zero is not None:
            made += zero
        inside = (made >= low) & (made <= high)
        ctx.save_for_backward(inside, scale)
        return made.clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        inside, scale = ctx.saved_tensors
        return gradients[0] * inside / scale, None, None, None, None


def _shaped(step: Step, values: Tensor, like: Tensor) -> Tensor:
    """Scales or zero points (per tensor, channel or block), shaped to broadcast against ``like``."""
    axis = step.get("axis", 1)
    block = step.get("block_size", 0)
    if block:
        return values.repeat_interleave(block, axis).narrow(axis, 0, like.shape[axis])
    return spread(values.reshape(()) if values.numel() == 1 else values, axis, like.dim())


def quantize_linear(step: Step, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """QuantizeLinear. The integers are float32, so that they have gradients."""
    kind = zero.dtype if zero is not None else TYPES.get(step.get("output_dtype", 0), torch.uint8)
    low, high = RANGES[kind]
    shift, along = None if zero is None else _shaped(step, zero, x).float(), _shaped(step, scale, x)
    if not scale.requires_grad:
        made: Tensor = _Quantize.apply(x.float(), along, shift, low, high)
        return made
    return (round_through(x.float() / along) + (0 if shift is None else shift)).clamp(low, high)


def dequantize_linear(step: Step, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """DequantizeLinear."""
    centred = x.float() if zero is None or not zero.any() else x.float() - _shaped(step, zero, x).float()
    return centred * _shaped(step, scale, x)


def dynamic_quantize_linear(step: Step, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DynamicQuantizeLinear to uint8 with the range of ``x``."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = ((high - low) / 255).detach()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = (-low / scale).round().clamp(0, 255).detach()
    return (round_through(x / scale) + zero).clamp(0, 255), scale, zero.to(torch.uint8)


def _centred(x: Tensor, zero: Tensor | None, axis: int) -> Tensor:
    return x.float() if zero is None else x.float() - spread(zero.float().squeeze(), axis, x.dim())


def matmul_integer(
    step: Step, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    """MatMulInteger, in float32: exact up to 2^24."""
    return torch.matmul(_centred(a, a_zero, -2), _centred(b, b_zero, -1))


OPERATORS: dict[str, Operator] = {
    "DequantizeLinear": dequantize_linear,
    "DynamicQuantizeLinear": dynamic_quantize_linear,
    "MatMulInteger": matmul_integer,
    "QuantizeLinear": quantize_linear,
}
