"""Gather, scatter and selection."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from edgepack.training.step import Operator, Step

REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _positive(indices: Tensor, size: int) -> Tensor:
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


def gather(step: Step, x: Tensor, indices: Tensor) -> Tensor:
    """Gather along an axis."""
    axis = step.get("axis", 0) % x.dim()
    places = _positive(indices, x.shape[axis])
    if axis == 0 and x.dim() == 2 and x.is_floating_point() and places.dim():
        return functional.embedding(places, x)
    picked = x.index_select(axis, places.reshape(-1))
    return picked.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def gather_elements(step: Step, x: Tensor, indices: Tensor) -> Tensor:
    """GatherElements."""
    axis = step.get("axis", 0)
    return x.gather(axis, _positive(indices, x.shape[axis]))


def _flat_places(indices: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Index tuples into the first axes as indices into those axes flattened."""
    flat = torch.zeros(indices.shape[:-1], dtype=torch.long)
    for position, size in enumerate(shape):
        flat = flat * size + _positive(indices[..., position], size)
    return flat


def gather_nd(step: Step, x: Tensor, indices: Tensor) -> Tensor:
    """GatherND."""
    batch, depth = step.get("batch_dims", 0), indices.shape[-1]
    shape = tuple(x.shape[batch : batch + depth])
    rows, rest = math.prod(x.shape[:batch]), x.shape[batch + depth :]
    places = _flat_places(indices, shape)
    flat = places.reshape(rows, -1) + torch.arange(rows)[:, None] * math.prod(shape)
    picked = x.reshape(rows * math.prod(shape), *rest)[flat.reshape(-1)]
    return picked.reshape(*indices.shape[:-1], *rest)


def scatter_elements(step: Step, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """ScatterElements, and the older Scatter."""
    axis, how = step.get("axis", 0), step.get("reduction", "none")
    places = _positive(indices, x.shape[axis])
    if how == "none":
        return x.scatter(axis, places, updates)
    return x.scatter_reduce(axis, places, updates, REDUCTIONS[how])


def scatter_nd(step: Step, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """ScatterND."""
    depth, how = indices.shape[-1], step.get("reduction", "none")
    places = _flat_places(indices, tuple(x.shape[:depth])).reshape(-1)
    rest = x.shape[depth:]
    flat = x.reshape(math.prod(x.shape[:depth]), -1)
    rows = updates.reshape(-1, math.prod(rest))
    if how == "none":
        written = flat.index_put((places,), rows)
    else:
        written = flat.scatter_reduce(0, places[:, None].expand_as(rows), rows, REDUCTIONS[how])
    return written.reshape(x.shape)


def tensor_scatter(step: Step, past: Tensor, update: Tensor, first: Tensor | None = None) -> Tensor:
    """TensorScatter: write a window of a cache."""
    axis, batch = step.get("axis", -2) % past.dim(), past.shape[0]
    start = torch.zeros(batch, dtype=torch.long) if first is None else first.long()
    places = start[:, None] + torch.arange(update.shape[axis])
    if step.get("mode", "linear") == "circular":
        places = places % past.shape[axis]
    shape = [batch if i == 0 else update.shape[axis] if i == axis else 1 for i in range(past.dim())]
    return past.scatter(axis, places.reshape(shape).expand_as(update), update)


def one_hot(step: Step, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    """OneHot; ``values`` are (off, on)."""
    count, axis = int(depth.reshape(-1)[0]), step.get("axis", -1)
    axis = axis % (indices.dim() + 1)
    places = indices.long().unsqueeze(axis)
    places = torch.where(places < 0, places + count, places)
    classes = torch.arange(count).reshape([-1 if i == axis else 1 for i in range(indices.dim() + 1)])
    return torch.where(places == classes, values[1], values[0])


def compress(step: Step, x: Tensor, condition: Tensor) -> Tensor:
    """Compress: keep the elements where the condition is true."""
    axis = step.get("axis")
    if axis is None:
        x, axis = x.reshape(-1), 0
    return x.index_select(axis, condition[: x.shape[axis]].nonzero().reshape(-1))


def non_zero(step: Step, x: Tensor) -> Tensor:
    """NonZero."""
    return x.nonzero().t()


def reverse_sequence(step: Step, x: Tensor, lengths: Tensor) -> Tensor:
    """ReverseSequence: reverse the first ``lengths`` positions of each sample."""
    time, batch = step.get("time_axis", 0), step.get("batch_axis", 1)
    positions, length = torch.arange(x.shape[time])[:, None], lengths.long()[None]
    places = torch.where(positions < length, length - 1 - positions, positions)
    places = places if time < batch else places.t()
    shape = [s if i in (time, batch) else 1 for i, s in enumerate(x.shape)]
    return x.gather(time, places.reshape(shape).expand_as(x))


OPERATORS: dict[str, Operator] = {
    "Compress": compress,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "NonZero": non_zero,
    "OneHot": one_hot,
    "ReverseSequence": reverse_sequence,
    "Scatter": scatter_elements,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
    "TensorScatter": tensor_scatter,
}
