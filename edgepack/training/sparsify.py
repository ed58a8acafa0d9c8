"""Sparsity schedules of training, and sparsity-inducing penalties."""

import math

import torch
from torch import Tensor

from edgepack.config.training import Sparsify, Tune
from edgepack.training.parameters import Parameters


def wanted_sparsity(settings: Sparsify, progress: float) -> float:
    """The sparsity after a share ``progress`` of the training.

    Gradual: ``s (1 - (1 - t)³)`` between start and end (Zhu and Gupta, 2017).
    """
    if progress < settings.start:
        return 0.0
    if is_last(settings, progress):
        return settings.sparsity
    return settings.sparsity * (1 - (1 - _way(settings, progress)) ** 3)


def wanted_exchange(settings: Sparsify, progress: float) -> float:
    """The share of weights that an update may replace, with cosine decay (Evci et al., 2020)."""
    if is_last(settings, progress):
        return 0.0
    return settings.exchanged / 2 * (1 + math.cos(math.pi * _way(settings, progress)))


def is_last(settings: Sparsify, progress: float) -> bool:
    """Whether a mask update at ``progress`` is the final one."""
    return settings.when == "once" or progress >= settings.end


def _way(settings: Sparsify, progress: float) -> float:
    return (progress - settings.start) / (settings.end - settings.start)


def penalty(parameters: Parameters, settings: Tune) -> Tensor | None:
    """L1, L2 and group lasso penalties over all weights, times their factors; ``None`` without any."""
    if not (settings.l1 or settings.l2 or settings.group_lasso):
        return None
    total = torch.zeros(())
    for key in parameters.weights():
        weight = parameters.value(key)
        if settings.l1:
            total = total + settings.l1 * weight.abs().sum()
        if settings.l2:
            total = total + settings.l2 / 2 * weight.square().sum()
        if settings.group_lasso:
            # The square root has no gradient at zero; a zero channel stays zero.
            squares = parameters.rows(key, weight).square().sum(1)
            total = total + settings.group_lasso * (squares + 1e-12).sqrt().sum()
    return total
