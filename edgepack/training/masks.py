"""Which weights are in and which are out: pure functions of weights, of gradients and of what was before.

Two ways for weights that are out to come back. Straight through, they go on learning as if they were in, and
every choice compares all weights anew. By gradient (Evci et al., 2020, RigL), what is out stays out, but for
those whose gradients are largest: they come in for the least of those that are in.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

PATTERNS = {"2:4": (2, 4), "4:8": (4, 8)}
"""How many are in, of how many inputs in a row."""

LEAST_CHANNELS = 0.1
"""Share of each group of channels that stays."""


@dataclass(frozen=True, slots=True, eq=False)
class Past:
    """What was before a choice, where weights come back by gradient. Tensors are ``[weights]``."""

    out: Tensor
    """bool"""
    gradients: Tensor
    """How much the loss would change with each."""
    exchanged: float
    """Share of those that are in afterwards that others make room for, at most."""
    firm: int = 0
    """How many have no need to make room."""

    def back(self, zeros: int) -> Tensor:
        """Those that come back where ``zeros`` are out afterwards: the largest gradients, bool."""
        room = len(self.out) - zeros
        count = min(round(self.exchanged * room), int(self.out.sum()), max(room - self.firm, 0))
        return lowest(torch.where(self.out, -self.gradients.abs(), torch.inf), count)


def lowest(values: Tensor, count: int) -> Tensor:
    """Where the ``count`` lowest of ``values`` [n] are, bool; of equal ones the first."""
    if not count:
        return torch.zeros_like(values, dtype=torch.bool)
    last = values.kthvalue(count).values
    below, level = values < last, values == last
    return below | (level & (level.cumsum(0) <= count - below.sum()))


def ranks(scores: Tensor, zeros: int, past: Past | None) -> tuple[Tensor, int]:
    """Scores by which the lowest are out, and how many: no fewer than were, where those do not learn."""
    if past is None:
        return scores, zeros
    zeros = max(zeros, int(past.out.sum()))
    back = past.back(zeros)
    return scores.masked_fill(past.out, -torch.inf).masked_fill(back, torch.inf), zeros


def unstructured(
    weights: Mapping[str, Tensor], sparsity: float, past: Past | None = None
) -> dict[str, Tensor]:
    """Masks with a share ``sparsity`` of zeros over all weights together: the lowest scores are out."""
    scores = joined({key: lamp(w) for key, w in weights.items()})
    ranked, zeros = ranks(scores, round(sparsity * len(scores)), past)
    return apart((~lowest(ranked, zeros)).to(scores.dtype), weights)


def patterned(
    rows: Mapping[str, Tensor], share: float, pattern: str, past: Past | None = None
) -> dict[str, Tensor]:
    """Masks for weights as ``[outputs, inputs]``: a ``share`` of all groups of inputs follows the pattern.

    In these the lowest scores are out. Groups that lose least by it are the first to follow; groups whose
    weights do not learn any more go on to. Inputs that fill no group stay.
    """
    kept, of = PATTERNS[pattern]
    scores = {key: lamp(w) for key, w in rows.items()}
    # A group has room for as many that come back as are out of it, so that all of them are in.
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
    """Which classes of channels [classes] are in: the lowest ``scores`` are out, a share ``sparsity`` of all.

    Of each of the ``groups`` a tenth stays, at least. With a ``multiple`` as many stay of each as is the
    nearest multiple of it.
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
    """``w² / sum of the squares that are not smaller``: what weights of different layers are compared by, so
    that no layer is emptied (Lee et al., 2021, LAMP)."""
    squares, order = weight.reshape(-1).double().square().sort(descending=True)
    scores = torch.empty_like(squares).scatter(0, order, squares / squares.cumsum(0).clamp(min=1e-30))
    shaped: Tensor = scores.reshape(weight.shape).to(weight.dtype)
    return shaped


def joined(parts: Mapping[str, Tensor]) -> Tensor:
    """All in one row, in their order."""
    return torch.cat([part.reshape(-1) for part in parts.values()])


def apart(row: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`joined`."""
    pieces = row.split([part.numel() for part in like.values()])
    return {key: piece.reshape(like[key].shape) for key, piece in zip(like, pieces, strict=True)}
