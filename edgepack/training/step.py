"""One node of a compiled graph, ready to run on torch tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Operator = Callable[..., Any]
"""``operator(step, *inputs)`` returns a tensor, or a tuple with one for each output; absent optional inputs
are ``None``."""


@dataclass(frozen=True, slots=True, eq=False)
class Body:
    """A subgraph of a node: a branch of If, the body of Loop or Scan."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Tensor]
    steps: tuple["Step", ...]
    keys: Mapping[str, str]
    """Parameter keys by the name of the constant that they replace."""


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A node: its operator, inputs, outputs and attributes."""

    op_type: str
    name: str
    inputs: tuple[str, ...]
    """Input names; empty for an absent optional input."""
    outputs: tuple[str, ...]
    opset: int
    attributes: Mapping[str, Any]
    """Python values; tensors are torch tensors."""
    bodies: Mapping[str, Body]

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute, or ``default``."""
        return self.attributes.get(name, default)


def integers(values: Tensor | None) -> list[int] | None:
    """An integer tensor as a list."""
    return None if values is None else [int(v) for v in values.reshape(-1).tolist()]


def axes_of(step: Step, given: Tensor | None) -> list[int] | None:
    """Axes: an input in newer opsets, an attribute in older ones."""
    return step.get("axes") if given is None else integers(given)


def spread(values: Tensor, axis: int, ndim: int) -> Tensor:
    """A vector along ``axis``, shaped to broadcast against ``ndim`` dimensions; a scalar is unchanged."""
    if values.dim() == 0:
        return values
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def pick(x: Tensor, axis: int, indices: list[int] | range) -> Tensor:
    """Select ``indices`` of ``x`` along ``axis``, in that order."""
    return x.index_select(axis, torch.as_tensor(list(indices), dtype=torch.long))
