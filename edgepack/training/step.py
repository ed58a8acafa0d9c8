"""One node of a graph, read once and ready to be run on torch tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Operator = Callable[..., Any]
"""``operator(step, *inputs)``: a tensor, or a tuple of one for each output; absent inputs are ``None``."""


@dataclass(frozen=True, slots=True, eq=False)
class Body:
    """A graph inside of a node: the branches of If, the bodies of Loop and Scan."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Tensor]
    steps: tuple["Step", ...]
    keys: Mapping[str, str]
    """By the name of a constant, the key that a parameter in its place goes by."""


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A node: what to run, on which values, with which attributes."""

    op_type: str
    name: str
    inputs: tuple[str, ...]
    """Names; an absent one is empty."""
    outputs: tuple[str, ...]
    opset: int
    attributes: Mapping[str, Any]
    """Plain Python values, tensors as torch has them."""
    bodies: Mapping[str, Body]

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute, or ``default``."""
        return self.attributes.get(name, default)


def integers(values: Tensor | None) -> list[int] | None:
    """A tensor of integers as a list."""
    return None if values is None else [int(v) for v in values.reshape(-1).tolist()]


def axes_of(step: Step, given: Tensor | None) -> list[int] | None:
    """Axes, an input in newer opsets and an attribute in older ones."""
    return step.get("axes") if given is None else integers(given)


def spread(values: Tensor, axis: int, ndim: int) -> Tensor:
    """A vector along ``axis``, shaped to broadcast against ``ndim`` dimensions; a scalar as it is."""
    if values.dim() == 0:
        return values
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def pick(x: Tensor, axis: int, indices: list[int] | range) -> Tensor:
    """Positions ``indices`` of ``x`` along ``axis``, in their order."""
    return x.index_select(axis, torch.as_tensor(list(indices), dtype=torch.long))
