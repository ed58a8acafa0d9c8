"""Arrays of many samples, in memory up to a limit and in files beyond it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgepack.ir.arrays import Array

MEMORY_BYTES = 1 << 30
"""Bytes that one store keeps in memory."""


@dataclass(slots=True)
class Store:
    """Arrays by name for each sample index; ``folder`` must exist as long as the store is used."""

    folder: Path
    memory_bytes: int = MEMORY_BYTES
    kept: list[dict[str, Array] | None] = field(default_factory=list)
    used: int = 0

    def add(self, arrays: Mapping[str, Array]) -> None:
        """Append the arrays of the next sample."""
        size = sum(a.nbytes for a in arrays.values())
        if self.used + size <= self.memory_bytes:
            self.used += size
            self.kept.append({name: np.array(a) for name, a in arrays.items()})
            return
        with (self.folder / f"{len(self.kept)}.npz").open("wb") as file:
            np.savez(file, allow_pickle=False, **dict(arrays))
        self.kept.append(None)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict[str, Array]:
        """The arrays of one sample."""
        stored = self.kept[index]
        if stored is not None:
            return stored
        with np.load(self.folder / f"{index}.npz") as file:
            return {name: file[name] for name in file.files}

    def stacked(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Samples ``indices`` concatenated along the first axis; images in channels-last layout, which torch
        runs faster."""
        rows = [self[i] for i in indices]
        return {name: _tensor(np.concatenate([r[name] for r in rows])) for name in rows[0]}


def _tensor(array: Array) -> Tensor:
    tensor = torch.from_numpy(array)
    if tensor.dim() == 4 and tensor.is_floating_point():
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor
