"""Data-parallel training: several processes share the samples of each step.

They connect through the environment variables of torch.distributed: RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT, and LOCAL_WORLD_SIZE for how many of them share a machine; ``torchrun`` sets them all.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from edgepack.errors import ConfigError, DeviceError

NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Workers:
    """The worker group and its collectives. All workers must call the same collectives in the same order."""

    rank: int = 0
    count: int = 1
    local: int = 1
    """Workers on this machine."""

    @property
    def first(self) -> bool:
        """Whether this worker writes files and reports."""
        return self.rank == 0

    def from_first(self, values: Sequence[float]) -> list[float]:
        """Broadcast ``values`` of rank 0: times and decisions must be the same on all."""
        if self.count == 1:
            return list(values)
        sent_values = torch.tensor(values, dtype=torch.float64)
        _run_collective(distributed.broadcast, sent_values, 0)
        return [float(value) for value in sent_values]

    def require_same(self, digest: str, otherwise: str) -> None:
        """Compare a hexadecimal SHA-256 between all workers.

        Raises:
            ConfigError: they differ; ``otherwise`` gives the reason.
        """
        if self.count == 1:
            return
        mine = torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)
        all_of_them = [torch.empty_like(mine) for _ in range(self.count)]
        _run_collective(distributed.all_gather, all_of_them, mine)
        other = [rank for rank, theirs in enumerate(all_of_them) if not torch.equal(theirs, all_of_them[0])]
        if other:
            raise ConfigError(f"tune: worker {other[0]} of {self.count} differs from worker 0: {otherwise}")

    def sum_floats(self, values: Tensor) -> None:
        """All-reduce: replace ``values`` by their sum over all workers."""
        _run_collective(distributed.all_reduce, values)

    def to_each(self, messages: Sequence[Tensor]) -> list[Tensor]:
        """All-to-all: send ``messages[k]``, all of one length, to worker k; return those for this worker."""
        sent = torch.cat(list(messages))
        received = torch.empty_like(sent)
        _run_collective(distributed.all_to_all_single, received, sent)
        return list(received.chunk(self.count))

    def to_all(self, message: Tensor) -> list[Tensor]:
        """All-gather: return the messages of all workers, by rank."""
        received = [torch.empty_like(message) for _ in range(self.count)]
        _run_collective(distributed.all_gather, received, message)
        return received


ALONE = Workers()


def _run_collective(collective: Callable[..., object], *arguments: object) -> None:
    try:
        collective(*arguments)
    except RuntimeError as error:  # what gloo raises
        raise DeviceError(
            f"tune: another worker is gone: {error}; see its own message, and start all again; with "
            "--checkpoints they resume"
        ) from error


@contextmanager
def joined() -> Iterator[Workers]:
    """Connect the workers of the environment over gloo; a single worker if it names none.

    Raises:
        ConfigError: WORLD_SIZE is set without the other variables, or the workers do not connect.
    """
    count = _number("WORLD_SIZE", 1)
    if count <= 1:
        yield ALONE
        return
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {count}, but {', '.join(missing)} is not set: start all workers with torchrun, "
            "or set the four variables for each"
        )
    try:
        distributed.init_process_group("gloo")
    except (ValueError, RuntimeError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(f"the {count} workers do not connect at {place}: {error}") from error
    try:
        yield Workers(distributed.get_rank(), count, _number("LOCAL_WORLD_SIZE", 1))
    finally:
        distributed.destroy_process_group()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise ConfigError(f"the environment variable {name} is {text!r}, not a number")
    return int(text)
