"""Normalizations. BatchNormalization uses the frozen statistics of the model."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from edgepack.training.step import Operator, Step, spread


def batch_normalization(
    step: Step, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    """BatchNormalization in inference mode."""
    kept = [v.to(x.dtype) for v in (mean, variance, scale, bias)]
    return functional.batch_norm(x, *kept, False, 0.0, step.get("epsilon", 1e-5))


def instance_normalization(step: Step, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """InstanceNormalization over all spatial axes."""
    axes = tuple(range(2, x.dim()))
    centred = x - x.mean(axes, keepdim=True)
    deviation = (centred.square().mean(axes, keepdim=True) + step.get("epsilon", 1e-5)).sqrt()
    return centred / deviation * spread(scale, 1, x.dim()) + spread(bias, 1, x.dim())


def layer_normalization(
    step: Step, x: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor | tuple[Tensor, ...]:
    """LayerNormalization, with the optional outputs mean and inverse standard deviation."""
    axes = tuple(range(step.get("axis", -1) % x.dim(), x.dim()))
    mean = x.mean(axes, keepdim=True)
    inverse = ((x - mean).square().mean(axes, keepdim=True) + step.get("epsilon", 1e-5)).rsqrt()
    y = (x - mean) * inverse * scale
    y = y if bias is None else y + bias
    return y if len(step.outputs) == 1 else (y, mean, inverse)[: len(step.outputs)]


def rms_normalization(step: Step, x: Tensor, scale: Tensor) -> Tensor:
    """RMSNormalization."""
    axes = tuple(range(step.get("axis", -1) % x.dim(), x.dim()))
    return x * (x.square().mean(axes, keepdim=True) + step.get("epsilon", 1e-5)).rsqrt() * scale


def group_normalization(step: Step, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """GroupNormalization; scale and bias are by group up to opset 20, by channel from 21 on."""
    groups = step.get("num_groups")
    normal = functional.group_norm(x, groups, eps=step.get("epsilon", 1e-5))
    if scale.numel() != x.shape[1]:
        scale, bias = (v.repeat_interleave(x.shape[1] // groups) for v in (scale, bias))
    return normal * spread(scale, 1, x.dim()) + spread(bias, 1, x.dim())


def local_response(step: Step, x: Tensor) -> Tensor:
    """LRN."""
    size = step.get("size")
    before, behind = (size - 1) // 2, math.ceil((size - 1) / 2)
    squares = functional.pad(x.square().flatten(2), (0, 0, before, behind))
    total = squares.unfold(1, size, 1).sum(-1).reshape(x.shape)
    return x / (step.get("bias", 1.0) + step.get("alpha", 1e-4) / size * total) ** step.get("beta", 0.75)


def lp_normalization(step: Step, x: Tensor) -> Tensor:
    """LpNormalization along an axis; zeros stay zeros."""
    p, axis = step.get("p", 2), step.get("axis", -1)
    norm = x.abs().sum(axis, keepdim=True) if p == 1 else x.square().sum(axis, keepdim=True).sqrt()
    return torch.where(norm == 0, torch.zeros_like(x), x / torch.where(norm == 0, 1, norm))


def mean_variance(step: Step, x: Tensor) -> Tensor:
    """MeanVarianceNormalization."""
    axes = tuple(step.get("axes", [0, 2, 3]))
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True).sqrt() + 1e-9)


OPERATORS: dict[str, Operator] = {
    "BatchNormalization": batch_normalization,
    "GroupNormalization": group_normalization,
    "InstanceNormalization": instance_normalization,
    "LRN": local_response,
    "LayerNormalization": layer_normalization,
    "LpNormalization": lp_normalization,
    "MeanVarianceNormalization": mean_variance,
    "RMSNormalization": rms_normalization,
}
