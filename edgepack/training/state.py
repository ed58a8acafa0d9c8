"""The state of a training run."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from edgepack.ir.arrays import Array
from edgepack.training.gradient_exchange import Exchange
from edgepack.training.parameters import Parameters
from edgepack.training.zeros import Zeros


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the log."""

    step: int
    epoch: int
    loss: float
    parts: dict[str, float]
    learning_rate: float
    sparsity: float
    elapsed_s: float
    held_out: dict[str, float] | None = None
    """Loss and agreement on the held-out samples, after the last step of an epoch."""
    sent_bytes: int | None = None
    """Bytes of gradients that each worker has sent so far; ``None`` with one worker."""

    def to_json(self) -> str:
        """The entry as one line of JSON."""
        return json.dumps({k: v for k, v in asdict(self).items() if v is not None})


@dataclass(slots=True)
class State:
    """Everything that resuming a run requires."""

    parameters: Parameters
    optimizer: Any
    exchange: Exchange
    zeros: Zeros | None = None
    """Set if training prunes."""
    epoch: int = 0
    step: int = 0
    elapsed_s: float = 0.0
    best: tuple[float, int, dict[str, Array]] | None = None
    """Loss on held-out samples, step and weights."""
    log: list[Entry] = field(default_factory=list)
