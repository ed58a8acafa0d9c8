"""Zeros that training makes: chosen anew on the way, until one choice is final."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from edgepack.config.training import Sparsify
from edgepack.training.coupled import Coupled
from edgepack.training.held import Parameters
from edgepack.training.masks import PATTERNS, Past, joined, patterned, unstructured, whole_channels
from edgepack.training.sparsify import is_last, wanted_exchange, wanted_sparsity

FADING = 1.0
"""What weights that are out and go on learning lose in a step, as a multiple of the learning rate. They come
back where gradients agree, not because an optimizer that takes steps of one size has moved them far."""


@dataclass(slots=True, eq=False)
class Zeros:
    """What is known of them between two steps."""

    settings: Sparsify
    given: Mapping[str, Tensor]
    """Masks of the zeros that the model came with."""
    coupled: Coupled | None = None
    """Whole channels, where these are what is taken out."""
    final: bool = False
    """Whether those that the settings ask for stay where they are; a model may have had others before."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of weights that masks remove and others beside them, summed since the last choice."""
    alive: Tensor | None = None
    """Which classes of channels are in, bool."""

    def choose(self, held: Parameters, optimizer: Any, step: int, progress: float) -> float:
        """Choose anew where it is time to; gives the share of zeros now."""
        sparsity = wanted_sparsity(self.settings, progress)
        last = is_last(self.settings, progress)
        due = not self.final if last else step % self.settings.every == 0
        if sparsity and due:
            before = dict(held.masks)
            held.masks = self._masks(held, sparsity, wanted_exchange(self.settings, progress), last=last)
            held.returning, self.final = not last, last
            if self._by_gradient:
                _begin_at_zero(held, optimizer, before)
                self.gradients = {}
        return sparsity

    def after_backward(self, held: Parameters) -> None:
        """Weights that come back by gradient alone do not learn while they are out."""
        if not (held.returning and self._by_gradient):
            return
        for key, mask in held.masks.items():
            gradient = held.tensors[key].grad
            if gradient is not None:
                self.gradients[key] = self.gradients.get(key, 0) + gradient
                gradient.mul_(mask)

    def after_step(self, held: Parameters, rate: float) -> None:
        """Weights that learn while they are out fade."""
        if held.returning and not self._by_gradient:
            held.fade(FADING * rate)

    def known(self) -> tuple[bool, dict[str, Tensor], Tensor | None]:
        """What a run that is taken up again must :meth:`know`."""
        return self.final, self.gradients, self.alive

    def know(self, told: tuple[bool, dict[str, Tensor], Tensor | None]) -> None:
        """Go on where another stopped."""
        self.final, self.gradients, self.alive = told

    @property
    def _by_gradient(self) -> bool:
        return self.settings.regrowth == "gradient"

    def _masks(self, held: Parameters, sparsity: float, exchanged: float, *, last: bool) -> dict[str, Tensor]:
        if self.coupled is not None:
            return self._channels(held, self.coupled, sparsity, exchanged, last=last)
        weights = {key: held.dense(key).detach() for key in held.weights() if key not in held.places}
        if self.settings.pattern not in PATTERNS:
            return unstructured(weights, sparsity, self._past(held, weights, exchanged, rows=False))
        rows = {key: held.rows(key, w) for key, w in weights.items()}
        past = self._past(held, weights, exchanged, rows=True)
        masks = patterned(rows, sparsity / self.settings.sparsity, self.settings.pattern, past)
        return {key: held.from_rows(key, mask) for key, mask in masks.items()}

    def _past(
        self, held: Parameters, weights: Mapping[str, Tensor], exchanged: float, *, rows: bool
    ) -> Past | None:
        """What was until now, in the order in which ``weights`` are compared. Gradients are those of trained
        tensors, whose groups make them alike: what the loss gains by steps of one size."""
        if not self._by_gradient:
            return None

        def in_order(parts: Mapping[str, Tensor], other: float) -> Tensor:
            found = {k: parts.get(k, torch.full_like(w, other)) for k, w in weights.items()}
            return joined({k: held.rows(k, part) for k, part in found.items()} if rows else found)

        known = exchanged if self.gradients else 0.0
        return Past(in_order(held.masks, 1.0) == 0, in_order(self.gradients, 0.0), known)

    def _channels(
        self, held: Parameters, coupled: Coupled, sparsity: float, exchanged: float, *, last: bool
    ) -> dict[str, Tensor]:
        alive = torch.ones(len(coupled.groups), dtype=torch.bool) if self.alive is None else self.alive
        past = None
        if self._by_gradient:
            past = Past(~alive, coupled.gradients(self.gradients), exchanged if self.gradients else 0.0)
        scores = coupled.scores({key: held.dense(key).detach() for key in held.weights()})
        multiple = (self.settings.multiple or 1) if last else 1
        self.alive = whole_channels(scores, coupled.groups, sparsity, multiple, past)
        masks = coupled.masks(self.alive.float(), held.trained, final=last)
        return {**self.given, **{k: m * self.given[k] if k in self.given else m for k, m in masks.items()}}


def _begin_at_zero(held: Parameters, optimizer: Any, before: Mapping[str, Tensor]) -> None:
    """What is out, or was until now, is zero, and so is what the optimizer knows of it."""
    with torch.no_grad():
        for key, mask in held.masks.items():
            stayed = mask * before[key] if key in before else mask
            tensor = held.tensors[key]
            tensor.mul_(stayed)
            for known in optimizer.state.get(tensor, {}).values():
                if isinstance(known, Tensor) and known.shape == tensor.shape:
                    known.mul_(stayed)
