"""Pruning during training: masks are updated at intervals until a final update."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from edgepack.config.training import Sparsify
from edgepack.training.coupled import Coupled
from edgepack.training.masks import PATTERNS, Past, joined, patterned, unstructured, whole_channels
from edgepack.training.parameters import Parameters
from edgepack.training.sparsify import is_last, wanted_exchange, wanted_sparsity

FADING = 1.0
"""Decay of masked weights in a step, as a multiple of the learning rate. They regrow where gradients agree,
not because Adam has moved them far by steps of one size."""


@dataclass(slots=True, eq=False)
class Zeros:
    """The pruning state between two steps."""

    settings: Sparsify
    given: Mapping[str, Tensor]
    """Masks of the zeros in the given model."""
    coupled: Coupled | None = None
    """Set if whole channels are pruned."""
    final: bool = False
    """Whether the final masks are chosen."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Gradients of all masked tensors, summed since the last update."""
    alive: Tensor | None = None
    """The classes of channels that remain, bool."""

    def choose(self, parameters: Parameters, optimizer: Any, step: int, progress: float) -> float:
        """Update the masks if an update is due; return the current sparsity."""
        sparsity = wanted_sparsity(self.settings, progress)
        last = is_last(self.settings, progress)
        due = not self.final if last else step % self.settings.every == 0
        if sparsity and due:
            before = dict(parameters.masks)
            parameters.masks = self._masks(
                parameters, sparsity, wanted_exchange(self.settings, progress), last=last
            )
            parameters.returning, self.final = not last, last
            if self._by_gradient:
                _begin_at_zero(parameters, optimizer, before)
                self.gradients = {}
        return sparsity

    def after_backward(self, parameters: Parameters) -> None:
        """With regrowth by gradient, clear the gradients of masked weights."""
        if not (parameters.returning and self._by_gradient):
            return
        for key, mask in parameters.masks.items():
            gradient = parameters.tensors[key].grad
            if gradient is not None:
                self.gradients[key] = self.gradients.get(key, 0) + gradient
                gradient.mul_(mask)

    def after_step(self, parameters: Parameters, rate: float) -> None:
        """With straight-through regrowth, decay masked weights."""
        if parameters.returning and not self._by_gradient:
            parameters.fade(FADING * rate)

    def known(self) -> tuple[bool, dict[str, Tensor], Tensor | None]:
        """The state for a checkpoint, see :meth:`know`."""
        return self.final, self.gradients, self.alive

    def know(self, state: tuple[bool, dict[str, Tensor], Tensor | None]) -> None:
        """Restore the state of a checkpoint."""
        self.final, self.gradients, self.alive = state

    @property
    def _by_gradient(self) -> bool:
        return self.settings.regrowth == "gradient"

    def _masks(
        self, parameters: Parameters, sparsity: float, exchanged: float, *, last: bool
    ) -> dict[str, Tensor]:
        if self.coupled is not None:
            return self._channels(parameters, self.coupled, sparsity, exchanged, last=last)
        weights = {
            key: parameters.dense(key).detach()
            for key in parameters.weights()
            if key not in parameters.places
        }
        if self.settings.pattern not in PATTERNS:
            return unstructured(weights, sparsity, self._past(parameters, weights, exchanged, rows=False))
        rows = {key: parameters.rows(key, w) for key, w in weights.items()}
        past = self._past(parameters, weights, exchanged, rows=True)
        masks = patterned(rows, sparsity / self.settings.sparsity, self.settings.pattern, past)
        return {key: parameters.from_rows(key, mask) for key, mask in masks.items()}

    def _past(
        self, parameters: Parameters, weights: Mapping[str, Tensor], exchanged: float, *, rows: bool
    ) -> Past | None:
        """The previous masks and gradients, in the order of ``weights``. Gradients are those of the trained
        tensors, whose units make them comparable between layers."""
        if not self._by_gradient:
            return None

        def in_order(parts: Mapping[str, Tensor], other: float) -> Tensor:
            found = {k: parts.get(k, torch.full_like(w, other)) for k, w in weights.items()}
            return joined({k: parameters.rows(k, part) for k, part in found.items()} if rows else found)

        known = exchanged if self.gradients else 0.0
        return Past(in_order(parameters.masks, 1.0) == 0, in_order(self.gradients, 0.0), known)

    def _channels(
        self, parameters: Parameters, coupled: Coupled, sparsity: float, exchanged: float, *, last: bool
    ) -> dict[str, Tensor]:
        alive = torch.ones(len(coupled.groups), dtype=torch.bool) if self.alive is None else self.alive
        past = None
        if self._by_gradient:
            past = Past(~alive, coupled.gradients(self.gradients), exchanged if self.gradients else 0.0)
        scores = coupled.scores({key: parameters.dense(key).detach() for key in parameters.weights()})
        multiple = (self.settings.multiple or 1) if last else 1
        self.alive = whole_channels(scores, coupled.groups, sparsity, multiple, past)
        masks = coupled.masks(self.alive.float(), parameters.trained, final=last)
        return {**self.given, **{k: m * self.given[k] if k in self.given else m for k, m in masks.items()}}


def _begin_at_zero(parameters: Parameters, optimizer: Any, before: Mapping[str, Tensor]) -> None:
    """Set masked and regrown weights to zero, and their optimizer state as well."""
    with torch.no_grad():
        for key, mask in parameters.masks.items():
            stayed = mask * before[key] if key in before else mask
            tensor = parameters.tensors[key]
            tensor.mul_(stayed)
            for known in optimizer.state.get(tensor, {}).values():
                if isinstance(known, Tensor) and known.shape == tensor.shape:
                    known.mul_(stayed)
