"""Several processes that train one model, each on its share of every step's samples.

They find each other by the environment variables that torch names: RANK, WORLD_SIZE, MASTER_ADDR and
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
    """Who else trains, and what is said between them. All must say the same things in the same order."""

    rank: int = 0
    count: int = 1
    local: int = 1
    """On this machine."""

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and reports."""
        return self.rank == 0

    def from_first(self, values: Sequence[float]) -> list[float]:
        """What the first worker gives: times and verdicts must be the same for all."""
        if self.count == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64)
        _said(distributed.broadcast, told, 0)
        return [float(value) for value in told]

    def require_same(self, digest: str, otherwise: str) -> None:
        """Compare a SHA-256 in hexadecimal between all.

        Raises:
            ConfigError: they differ; ``otherwise`` says what that means.
        """
        if self.count == 1:
            return
        mine = torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)
        all_of_them = [torch.empty_like(mine) for _ in range(self.count)]
        _said(distributed.all_gather, all_of_them, mine)
        other = [rank for rank, theirs in enumerate(all_of_them) if not torch.equal(theirs, all_of_them[0])]
        if other:
            raise ConfigError(f"tune: worker {other[0]} of {self.count} differs from worker 0: {otherwise}")

    def sum_floats(self, values: Tensor) -> None:
        """Replace ``values`` by the sum over all workers."""
        _said(distributed.all_reduce, values)

    def to_each(self, messages: Sequence[Tensor]) -> list[Tensor]:
        """Give one message, all of one length, to each worker; gives what each has for this one."""
        sent = torch.cat(list(messages))
        received = torch.empty_like(sent)
        _said(distributed.all_to_all_single, received, sent)
        return list(received.chunk(self.count))

    def to_all(self, message: Tensor) -> list[Tensor]:
        """Give one message to all; gives those of all, in their order."""
        received = [torch.empty_like(message) for _ in range(self.count)]
        _said(distributed.all_gather, received, message)
        return received


ALONE = Workers()


def _said(collective: Callable[..., object], *arguments: object) -> None:
    try:
        collective(*arguments)
    except RuntimeError as error:  # what gloo raises
        raise DeviceError(
            f"tune: another worker is gone: {error}; see its own message, and start all again: with "
            "--checkpoints they go on"
        ) from error


@contextmanager
def joined() -> Iterator[Workers]:
    """All workers that the environment tells of, connected over gloo; one alone where it tells of none.

    Raises:
        ConfigError: WORLD_SIZE is set, and the variables that go with it are not, or nobody answers.
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
        raise ConfigError(f"the {count} workers do not meet at {place}: {error}") from error
    try:
        yield Workers(distributed.get_rank(), count, _number("LOCAL_WORLD_SIZE", 1))
    finally:
        distributed.destroy_process_group()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise ConfigError(f"the environment variable {name} is {text!r}, not a number")
    return int(text)
