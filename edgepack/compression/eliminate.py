"""The pruning order of channels and the error of the layers that consume them.

A consumer is a matrix ``W`` [M, K] on inputs with second moments ``H`` [K, K]. Removing the columns ``B`` of
a channel costs ``tr(W_B (H^-1)_BB^-1 W_B^T)`` of the energy of its outputs if the other columns are updated
optimally; the next channel is then chosen with the updated weights (OBS: Hassibi and Stork, 1993; structures:
E. Kurtic et al., "ZipLM", 2023). A class of channels with several consumers costs the sum of their relative
errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]

DAMPING = 0.01
"""Damping, relative to the mean of the diagonal."""
STEPS = 64
"""Largest number of rounds; each round removes several channels."""


@dataclass(slots=True, eq=False)
class Consumer:
    """One matrix that consumes a group's channels: ``weight`` [M, K], ``second`` [K, K] (centered if its bias
    compensates the mean) and ``owner`` [K], the class of each input, or -1."""

    weight: Floats
    second: Floats
    owner: Indices

    @property
    def energy(self) -> float:
        """Energy of all outputs."""
        return float(np.einsum("mk,kl,ml->", self.weight, self.second, self.weight, optimize=True))


def order_of(costs: Floats) -> tuple[Indices, Floats]:
    """Classes in pruning order, and the loss after 0, 1, 2, ... of them are removed."""
    order = np.argsort(costs, kind="stable")
    return order, np.concatenate([[0.0], np.cumsum(costs[order])]).astype(np.float32)


def salience_of(consumers: Sequence[Consumer], count: int) -> Floats:
    """For each class its share of the output energy of its consumers, without updates of other weights."""
    costs = np.zeros(count)
    for consumer in consumers:
        own = (consumer.weight**2).sum(0) * np.diagonal(consumer.second)
        mine = consumer.owner >= 0
        np.add.at(costs, consumer.owner[mine], own[mine] / max(consumer.energy, 1e-12))
    return costs.astype(np.float32)


def eliminate(consumers: Sequence[Consumer], count: int) -> tuple[Indices, Floats]:
    """As :func:`order_of`, with an OBS update of the remaining weights after each removal."""
    states = [_State(consumer, count) for consumer in consumers]
    left = np.ones(count, np.bool_)
    order: list[int] = []
    losses = [0.0]
    at_once = max(count // STEPS, 1)
    while left.any():
        costs = np.sum([state.costs() for state in states], axis=0)
        costs[~left] = np.inf
        gone = np.argsort(costs, kind="stable")[: min(at_once, int(left.sum()))]
        for one in gone.tolist():
            losses.append(losses[-1] + max(float(costs[one]), 0.0))
            order.append(one)
            left[one] = False
        for state in states:
            state.remove(gone)
    return np.asarray(order, np.intp), np.asarray(losses, np.float32)


class _State:
    """A consumer during pruning: its remaining weight and the inverse of its moments."""

    def __init__(self, consumer: Consumer, count: int) -> None:
        self.energy = max(consumer.energy, 1e-12)
        self.weight = consumer.weight.astype(np.float64)
        damped = consumer.second.astype(np.float64)
        damped[np.diag_indices_from(damped)] += DAMPING * max(float(np.trace(damped)) / len(damped), 1e-12)
        self.inverse = np.linalg.inv(damped)
        self.columns = [np.flatnonzero(consumer.owner == one) for one in range(count)]
        self.left = {one for one in range(count) if len(self.columns[one])}
        self.count = count

    def costs(self) -> npt.NDArray[np.float64]:
        """Cost of each remaining class, relative to the energy of all outputs."""
        found = np.zeros(self.count)
        for size in {len(self.columns[one]) for one in self.left}:
            ones = [one for one in sorted(self.left) if len(self.columns[one]) == size]
            at = np.stack([self.columns[one] for one in ones])
            blocks = self.inverse[at[:, :, None], at[:, None, :]]
            weights = self.weight[:, at].transpose(1, 0, 2)
            gram = np.matmul(weights.transpose(0, 2, 1), weights)
            found[ones] = np.trace(np.linalg.solve(blocks, gram), axis1=1, axis2=2) / self.energy
        return found

    def remove(self, classes: Indices) -> None:
        """Remove ``classes`` and update the remaining weights."""
        gone = [one for one in classes.tolist() if one in self.left]
        if not gone:
            return
        at = np.concatenate([self.columns[one] for one in gone])
        block = np.linalg.solve(self.inverse[np.ix_(at, at)], self.inverse[at])
        self.weight -= self.weight[:, at] @ block
        self.inverse -= self.inverse[:, at] @ block
        self.weight[:, at] = 0
        self.inverse[at] = 0
        self.inverse[:, at] = 0
        self.left -= set(gone)
