"""Which weights are zero while training goes on, and penalties that draw weights to zero."""

import torch
from torch import Tensor

from edgepack.config_tune import Sparsify, Tune
from edgepack.tune.held import Held

PATTERNS = {"2:4": (2, 4), "4:8": (4, 8)}


def wanted_sparsity(settings: Sparsify, progress: float) -> float:
    """The share of zeros after a share ``progress`` of the training.

    Dynamic: ``s (1 - (1 - t)³)`` between start and end (Zhu and Gupta, 2017).
    """
    if progress < settings.start:
        return 0.0
    if settings.when == "once" or progress >= settings.end:
        return settings.sparsity
    t = (progress - settings.start) / (settings.end - settings.start)
    return settings.sparsity * (1 - (1 - t) ** 3)


def choose_masks(held: Held, sparsity: float, pattern: str) -> dict[str, Tensor]:
    """Masks with a share ``sparsity`` of zeros over all weights together, or a pattern along their inputs.

    Unstructured: the lowest scores of all, ``w² / sum of the squares that are not smaller`` within a layer
    (Lee et al., 2021, LAMP), so that no layer is emptied.
    """
    weights = {key: held.dense(key).detach() for key in held.weights() if key not in held.places}
    if pattern in PATTERNS:
        rows = {key: _in_rows(held.rows(key, w), *PATTERNS[pattern]) for key, w in weights.items()}
        return {key: held.from_rows(key, mask) for key, mask in rows.items()}
    scores = {key: _score(w) for key, w in weights.items()}
    together = torch.cat([s.reshape(-1) for s in scores.values()])
    count = round(sparsity * together.numel())
    if not count:
        return {key: torch.ones_like(w) for key, w in weights.items()}
    threshold = together.kthvalue(count).values
    return {key: (s > threshold).to(s.dtype) for key, s in scores.items()}


def _score(weight: Tensor) -> Tensor:
    squares, order = weight.reshape(-1).double().square().sort(descending=True)
    scores = torch.empty_like(squares).scatter(0, order, squares / squares.cumsum(0).clamp(min=1e-30))
    shaped: Tensor = scores.reshape(weight.shape).to(weight.dtype)
    return shaped


def _in_rows(rows: Tensor, kept: int, of: int) -> Tensor:
    """The largest ``kept`` of every ``of`` in each row ``[outputs, inputs]``; a shorter rest stays."""
    whole = rows.shape[1] // of * of
    groups = rows[:, :whole].abs().reshape(len(rows), -1, of)
    ranks = groups.argsort(dim=2, descending=True, stable=True).argsort(dim=2, stable=True)
    mask = torch.ones_like(rows)
    mask[:, :whole] = (ranks < kept).to(mask.dtype).reshape(len(rows), whole)
    return mask


def penalty(held: Held, settings: Tune) -> Tensor | None:
    """L1, L2 and group lasso over all weights, each with its factor; ``None`` without any."""
    if not (settings.l1 or settings.l2 or settings.group_lasso):
        return None
    total = torch.zeros(())
    for key in held.weights():
        weight = held.value(key)
        if settings.l1:
            total = total + settings.l1 * weight.abs().sum()
        if settings.l2:
            total = total + settings.l2 / 2 * weight.square().sum()
        if settings.group_lasso:
            # The square root has no gradient at zero; a channel that is zero stays there.
            squares = held.rows(key, weight).square().sum(1)
            total = total + settings.group_lasso * (squares + 1e-12).sqrt().sum()
    return total
