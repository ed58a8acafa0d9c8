"""Reductions, CumSum, ArgMax and TopK."""

from collections.abc import Callable

import torch
from torch import Tensor

from edgepack.training.step import Operator, Step, axes_of

Reduction = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _reduction(function: Reduction, elementwise: Callable[[Tensor], Tensor] | None = None) -> Operator:
    """``elementwise`` is the result of a reduction over no axis."""

    def operator(step: Step, x: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen = axes_of(step, axes)
        if not chosen:
            if step.get("noop_with_empty_axes", 0):
                return x if elementwise is None else elementwise(x)
            chosen = list(range(x.dim()))
        if not chosen:  # a scalar
            return function(x[None], (0,), False)
        return function(x, tuple(a % x.dim() for a in chosen), bool(step.get("keepdims", 1)))

    return operator


def _product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _end(kind: torch.dtype, highest: bool) -> float:
    """The largest or smallest number of a type."""
    if kind == torch.bool:
        return highest
    if kind.is_floating_point:
        return float("inf") if highest else float("-inf")
    limits = torch.iinfo(kind)
    return float(limits.max if highest else limits.min)


def _extreme(largest: bool) -> Reduction:
    def extreme(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
        if any(x.shape[a] == 0 for a in axes):
            kept = [1 if i in axes else s for i, s in enumerate(x.shape) if keep or i not in axes]
            return torch.full(kept, _end(x.dtype, not largest), dtype=x.dtype)
        return x.amax(axes, keep) if largest else x.amin(axes, keep)

    return extreme


def _sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(axes, keep, dtype=x.dtype)


def _mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.mean(axes, keep)


def _norm1(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.abs().sum(axes, keep, dtype=x.dtype)


def _norm2(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.linalg.vector_norm(x, 2, axes, keep)


def _sum_square(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.square().sum(axes, keep, dtype=x.dtype)


def _log_sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(axes, keep).log()


def _log_sum_exp(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.logsumexp(axes, keep)


def _argument(largest: bool) -> Operator:
    def operator(step: Step, x: Tensor) -> Tensor:
        axis, keep = step.get("axis", 0) % x.dim(), bool(step.get("keepdims", 1))
        find = torch.argmax if largest else torch.argmin
        if not step.get("select_last_index", 0):
            best = x.amax(axis, keepdim=True) if largest else x.amin(axis, keepdim=True)
            return (x == best).to(torch.uint8).argmax(axis, keepdim=keep)
        return x.shape[axis] - 1 - find(x.flip(axis), axis, keepdim=keep)

    return operator


def _running(function: Callable[[Tensor, int], Tensor], start: float) -> Operator:
    def operator(step: Step, x: Tensor, axis: Tensor) -> Tensor:
        along = int(axis) % x.dim()
        x = x.flip(along) if step.get("reverse", 0) else x
        total = function(x, along).to(x.dtype)
        if step.get("exclusive", 0):
            first = torch.full_like(total.narrow(along, 0, 1), start)
            total = torch.cat([first, total.narrow(along, 0, x.shape[along] - 1)], along)
        return total.flip(along) if step.get("reverse", 0) else total

    return operator


def top_k(step: Step, x: Tensor, count: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """TopK; of equal values the one that comes first."""
    k = step.get("k") if count is None else int(count.reshape(-1)[0])
    axis, largest = step.get("axis", -1), bool(step.get("largest", 1))
    order = torch.argsort(x, dim=axis, descending=largest, stable=True).narrow(axis, 0, k)
    return x.gather(axis, order), order


OPERATORS: dict[str, Operator] = {
    "ArgMax": _argument(True),
    "ArgMin": _argument(False),
    "CumProd": _running(torch.cumprod, 1.0),
    "CumSum": _running(torch.cumsum, 0.0),
    "ReduceL1": _reduction(_norm1, torch.abs),
    "ReduceL2": _reduction(_norm2, torch.abs),
    "ReduceLogSum": _reduction(_log_sum, torch.log),
    "ReduceLogSumExp": _reduction(_log_sum_exp),
    "ReduceMax": _reduction(_extreme(True)),
    "ReduceMean": _reduction(_mean),
    "ReduceMin": _reduction(_extreme(False)),
    "ReduceProd": _reduction(_product),
    "ReduceSum": _reduction(_sum),
    "ReduceSumSquare": _reduction(_sum_square, torch.square),
    "TopK": top_k,
}
