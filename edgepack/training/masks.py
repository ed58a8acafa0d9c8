"""Sparsity masks: pure functions of weights, gradients and the previous mask.

Two ways for pruned weights to regrow. Straight-through: masked weights still learn, and every update ranks
all weights again. By gradient (Evci et al., 2020, RigL): pruned weights stay at zero, but those with the
largest gradients replace the smallest remaining weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

PATTERNS = {"2:4": (2, 4), "4:8": (4, 8)}
"""N:M sparsity: N remaining weights of M consecutive inputs."""

LEAST_CHANNELS = 0.1
"""Smallest share of a group of channels that remains."""


@dataclass(frozen=True, slots=True, eq=False)
class Past:
    """The state before a mask update with regrowth by gradient. Tensors are ``[weights]``."""

    out: Tensor
    """Pruned weights, bool."""
    gradients: Tensor
    """Gradient of the loss with respect to each weight."""
    exchanged: float
    """Largest share of the remaining weights that regrown ones may replace."""
    firm: int = 0
    """Number of remaining weights that cannot be replaced."""

    def back(self, zeros: int) -> Tensor:
        """Regrown weights when ``zeros`` are pruned afterwards: those with the largest gradients, bool."""
        room = len(self.out) - zeros
        count = min(round(self.exchanged * room), int(self.out.sum()), max(room - self.firm, 0))
        return lowest(torch.where(self.out, -self.gradients.abs(), torch.inf), count)


def lowest(values: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` lowest of ``values`` [n], bool; the first of equal ones."""
    if not count:
        return torch.zeros_like(values, dtype=torch.bool)
    last = values.kthvalue(count).values
    below, level = values < last, values == last
    return below | (level & (level.cumsum(0) <= count - below.sum()))


def ranks(scores: Tensor, zeros: int, past: Past | None) -> tuple[Tensor, int]:
    """Scores to prune by and the number of zeros, which never falls with regrowth by gradient."""
    if past is None:
        return scores, zeros
    zeros = max(zeros, int(past.out.sum()))
    back = past.back(zeros)
    return scores.masked_fill(past.out, -torch.inf).masked_fill(back, torch.inf), zeros


def unstructured(
    weights: Mapping[str, Tensor], sparsity: float, past: Past | None = None
) -> dict[str, Tensor]:
    """Masks with a global share ``sparsity`` of zeros, those with the lowest scores."""
    scores = joined({key: lamp(w) for key, w in weights.items()})
    ranked, zeros = ranks(scores, round(sparsity * len(scores)), past)
    return apart((~lowest(ranked, zeros)).to(scores.dtype), weights)


def patterned(
    rows: Mapping[str, Tensor], share: float, pattern: str, past: Past | None = None
) -> dict[str, Tensor]:
    """N:M masks for weights as ``[outputs, inputs]``; a ``share`` of all groups of inputs has the pattern.

    In a group the lowest scores are pruned. Groups that lose least are pruned first, and groups that are
    pruned stay so with regrowth by gradient. Inputs that do not fill a group remain.
    """
    kept, of = PATTERNS[pattern]
    scores = {key: lamp(w) for key, w in rows.items()}
    # A group can regrow all of its pruned weights.
    zeros = 0 if past is None else int(past.out.sum())
    ranked = apart(ranks(joined(scores), zeros, past)[0], rows)
    lost, costs = {}, {}
    for key, score in scores.items():
        order = _groups(ranked[key], of).argsort(dim=2, descending=True, stable=True)
        lost[key] = order.argsort(dim=2, stable=True) >= kept
        costs[key] = (_groups(score, of) * lost[key]).sum(2)
    if past is not None:
        for key, out in apart(past.out, rows).items():
            costs[key][_groups(out, of).sum(2) == of - kept] = -1.0
    every = joined(costs)
    follow = apart(lowest(every, round(share * len(every))), costs)
    masks = {key: torch.ones_like(w) for key, w in rows.items()}
    for key, mask in masks.items():
        zero = (lost[key] & follow[key][:, :, None]).flatten(1)
        mask[:, : zero.shape[1]] = (~zero).to(mask.dtype)
    return masks


def whole_channels(
    scores: Tensor, groups: Tensor, sparsity: float, multiple: int = 1, past: Past | None = None
) -> Tensor:
    """Mask of the channel classes that remain [classes]: a share ``sparsity``, with the lowest ``scores``, is
    pruned.

    At least a tenth of each of the ``groups`` remains. With ``multiple`` the remaining number in each group
    is rounded to the nearest multiple.
    """
    parts = [groups == group for group in groups.unique()]
    least = [math.ceil(LEAST_CHANNELS * int(mine.sum())) for mine in parts]
    past = None if past is None else replace(past, firm=sum(least))
    ranked, zeros = ranks(scores, min(round(sparsity * len(scores)), len(scores) - sum(least)), past)
    firm = torch.zeros_like(scores, dtype=torch.bool)
    for mine, count in zip(parts, least, strict=True):
        firm |= _best(ranked, mine, count)
    alive = ~lowest(ranked.masked_fill(firm, torch.inf), zeros)
    if multiple == 1:
        return alive
    kept = torch.zeros_like(alive)
    for mine in parts:
        wanted = max(1, round(int(alive[mine].sum()) / multiple)) * multiple
        kept |= _best(ranked, mine, min(wanted, int(mine.sum())))
    return kept


def _best(scores: Tensor, mine: Tensor, count: int) -> Tensor:
    """The ``count`` highest of ``mine``."""
    found = torch.zeros_like(mine)
    found[mine] = lowest(-scores[mine], count)
    return found


def _groups(rows: Tensor, of: int) -> Tensor:
    """``[outputs, groups, of]``"""
    return rows[:, : rows.shape[1] // of * of].reshape(len(rows), -1, of)


def lamp(weight: Tensor) -> Tensor:
    """LAMP scores (Lee et al., 2021), ``w² / sum of the squares that are not smaller``: comparable between
    layers, so that no layer is emptied."""
    squares, order = weight.reshape(-1).double().square().sort(descending=True)
    scores = torch.empty_like(squares).scatter(0, order, squares / squares.cumsum(0).clamp(min=1e-30))
    shaped: Tensor = scores.reshape(weight.shape).to(weight.dtype)
    return shaped


def joined(parts: Mapping[str, Tensor]) -> Tensor:
    """All tensors flattened and concatenated."""
    return torch.cat([part.reshape(-1) for part in parts.values()])


def apart(row: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`joined`."""
    pieces = row.split([part.numel() for part in like.values()])
    return {key: piece.reshape(like[key].shape) for key, piece in zip(like, pieces, strict=True)}
