"""Activations, and the softmax family."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgepack.training.step import Operator, Step

SOFTMAX_ALONG_AXIS = 13
"""The first opset in which Softmax normalizes one axis; earlier ones flatten from the axis on."""


def relu(step: Step, x: Tensor) -> Tensor:
    """Relu."""
    return torch.relu(x)


def leaky_relu(step: Step, x: Tensor) -> Tensor:
    """LeakyRelu."""
    return functional.leaky_relu(x, step.get("alpha", 0.01))


def prelu(step: Step, x: Tensor, slope: Tensor) -> Tensor:
    """PRelu; before opset 7 a vector of slopes applies by channel."""
    if step.opset < 7 and slope.dim() == 1 and x.dim() > 2:
        slope = slope.reshape(-1, *[1] * (x.dim() - 2))
    return torch.where(x < 0, x * slope, x)


def thresholded_relu(step: Step, x: Tensor) -> Tensor:
    """ThresholdedRelu."""
    return torch.where(x > step.get("alpha", 1.0), x, torch.zeros_like(x))


def elu(step: Step, x: Tensor) -> Tensor:
    """Elu."""
    return functional.elu(x, step.get("alpha", 1.0))


def celu(step: Step, x: Tensor) -> Tensor:
    """Celu."""
    return functional.celu(x, step.get("alpha", 1.0))


def selu(step: Step, x: Tensor) -> Tensor:
    """Selu."""
    alpha, gamma = step.get("alpha", 1.67326319217681884765625), step.get("gamma", 1.05070102214813232421875)
    return gamma * functional.elu(x, alpha)


def gelu(step: Step, x: Tensor) -> Tensor:
    """Gelu."""
    return functional.gelu(x, approximate=step.get("approximate", "none"))


def swish(step: Step, x: Tensor) -> Tensor:
    """Swish."""
    return x * torch.sigmoid(step.get("alpha", 1.0) * x)


def hard_swish(step: Step, x: Tensor) -> Tensor:
    """HardSwish."""
    return functional.hardswish(x)


def hard_sigmoid(step: Step, x: Tensor) -> Tensor:
    """HardSigmoid."""
    return (x * step.get("alpha", 0.2) + step.get("beta", 0.5)).clamp(0, 1)


def sigmoid(step: Step, x: Tensor) -> Tensor:
    """Sigmoid."""
    return torch.sigmoid(x)


def tanh(step: Step, x: Tensor) -> Tensor:
    """Tanh."""
    return torch.tanh(x)


def softplus(step: Step, x: Tensor) -> Tensor:
    """Softplus, numerically stable."""
    return torch.logaddexp(x, torch.zeros_like(x))


def softsign(step: Step, x: Tensor) -> Tensor:
    """Softsign."""
    return functional.softsign(x)


def mish(step: Step, x: Tensor) -> Tensor:
    """Mish."""
    return functional.mish(x)


def shrink(step: Step, x: Tensor) -> Tensor:
    """Shrink."""
    limit, bias = step.get("lambd", 0.5), step.get("bias", 0.0)
    zero = torch.zeros_like(x)
    return torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, zero)).to(x.dtype)


def _along(step: Step, x: Tensor, function: Any) -> Tensor:
    if step.opset >= SOFTMAX_ALONG_AXIS:
        along: Tensor = function(x, step.get("axis", -1))
        return along
    axis = step.get("axis", 1) % max(x.dim(), 1)
    flat: Tensor = function(x.reshape(math.prod(x.shape[:axis]), -1), 1)
    return flat.reshape(x.shape)


def softmax(step: Step, x: Tensor) -> Tensor:
    """Softmax."""
    return _along(step, x, functional.softmax)


def log_softmax(step: Step, x: Tensor) -> Tensor:
    """LogSoftmax."""
    return _along(step, x, functional.log_softmax)


def _first_of_best(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)


def hardmax(step: Step, x: Tensor) -> Tensor:
    """Hardmax: one at the first maximum."""
    return _along(step, x, _first_of_best)


def dropout(step: Step, x: Tensor, *unused: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """Dropout in inference mode: the input, and a mask of ones."""
    return x if len(step.outputs) == 1 else (x, torch.ones(x.shape, dtype=torch.bool))


OPERATORS: dict[str, Operator] = {
    "Celu": celu,
    "Dropout": dropout,
    "Elu": elu,
    "Gelu": gelu,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
    "Hardmax": hardmax,
    "LeakyRelu": leaky_relu,
    "LogSoftmax": log_softmax,
    "Mish": mish,
    "PRelu": prelu,
    "Relu": relu,
    "Selu": selu,
    "Shrink": shrink,
    "Sigmoid": sigmoid,
    "Softmax": softmax,
    "Softplus": softplus,
    "Softsign": softsign,
    "Swish": swish,
    "Tanh": tanh,
    "ThresholdedRelu": thresholded_relu,
}
