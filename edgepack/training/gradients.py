"""Gradient quantization: codes a float vector as bytes and carries the error to the next step.

A group of values (a tensor, or a block of one) has one scale, ``s = max|g| / (2^(bits - 1) - 1)``, and codes
``q = floor(g / s + u)``. With u uniform in [0, 1) this stochastic rounding is unbiased, ``E[s q] = g``
(Alistarh et al., 2017); with u = 1/2 it rounds to nearest. Error feedback adds what one step lost to the
gradient of the next, so that the sum over steps is right to one rounding (Seide et al., 2014).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgepack.config.training import Gradients

SCALE_BYTES = 4
NIBBLE_ZERO = 8
"""Offset of 4-bit codes; two share a byte."""


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A vector divided into equal parts, and the index of the scale of each value in a part."""

    size: int
    """Number of values; the rest is padding."""
    groups: Tensor
    """Index of the scale within its part, int64 ``[parts, length]``."""
    scales: int
    """In each part."""

    @property
    def length(self) -> int:
        """Values in a part."""
        return int(self.groups.shape[1])


def lay_out(sizes: Sequence[int], block: int | None, parts: int) -> Layout:
    """Concatenate tensors of ``sizes`` and divide them into ``parts`` equal parts; a group of values with one
    scale spans neither two tensors nor two parts.

    ``block`` is the largest group; ``None`` gives one group for each tensor.
    """
    total = sum(sizes)
    length = -(-total // parts)
    length += length % 2  # 4-bit codes are packed in pairs
    starts = np.concatenate([[0], np.cumsum(sizes)])[:-1]
    cuts = {int(s) for s in starts} | set(range(0, parts * length, length))
    for start, size in zip(starts.tolist(), sizes, strict=True):
        cuts |= set(range(start, start + size, block)) if block else set()
    marks = torch.zeros(parts * length, dtype=torch.int64)
    marks[sorted(cuts)] = 1
    groups = marks.reshape(parts, length).cumsum(1) - 1
    return Layout(total, groups, int(groups.max()) + 1)


def to_bytes(values: Tensor, groups: Tensor, scales: int, settings: Gradients, noise: Tensor) -> Tensor:
    """Floats ``[length]`` as uint8: the scales of all groups, then the codes. ``noise`` is u for each value.

    A group with a non-finite value gets the scale NaN, so it decodes to NaN.
    """
    limit = float(2 ** (settings.bits - 1) - 1)
    peaks = torch.zeros(scales).scatter_reduce(0, groups, values.abs(), "amax", include_self=True)
    scale = torch.where(peaks.isfinite(), peaks / limit, torch.full_like(peaks, torch.nan))
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (values / divisor[groups] + noise).nan_to_num(0).floor().clamp(-limit, limit).to(torch.int8)
    if settings.bits == 4:
        pairs = (codes + NIBBLE_ZERO).view(torch.uint8).reshape(-1, 2)
        stored = pairs[:, 0] | (pairs[:, 1] << 4)
    else:
        stored = codes.view(torch.uint8)
    return torch.cat([scale.view(torch.uint8), stored])


def from_bytes(message: Tensor, groups: Tensor, scales: int, settings: Gradients) -> Tensor:
    """Decode what :func:`to_bytes` wrote."""
    head = scales * SCALE_BYTES
    scale = message[:head].clone().view(torch.float32)
    stored = message[head:]
    if settings.bits == 4:
        pairs = torch.stack([stored & 15, stored >> 4], 1).reshape(-1)
        codes = pairs.to(torch.float32) - NIBBLE_ZERO
    else:
        codes = stored.view(torch.int8).to(torch.float32)
    return codes * scale[groups]


@dataclass(frozen=True, slots=True)
class Coder:
    """Quantizes vectors of one length with the random numbers of one step."""

    layout: Layout
    settings: Gradients

    def send(self, part: int, values: Tensor, lost: Tensor, noise: torch.Generator) -> Tensor:
        """A part as bytes. Adds ``lost`` first, then stores the new quantization error in ``lost``."""
        wanted = values + lost if self.settings.error_feedback else values
        shape = wanted.shape
        if self.settings.rounding == "stochastic":
            added = torch.rand(shape, generator=noise)
        else:
            added = torch.full(shape, 0.5)
        message = to_bytes(wanted, self.layout.groups[part], self.layout.scales, self.settings, added)
        if self.settings.error_feedback:
            lost.copy_(wanted - self.receive(part, message))
        return message

    def receive(self, part: int, message: Tensor) -> Tensor:
        """The floats of a part."""
        return from_bytes(message, self.layout.groups[part], self.layout.scales, self.settings)


def noise_of(seed: int, step: int, worker: int) -> torch.Generator:
    """The random generator of a step: reproducible in a resumed run, different for each worker."""
    number = np.random.SeedSequence((seed, step, worker)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(number >> np.uint64(1)))
