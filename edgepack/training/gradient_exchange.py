"""All-reduce of gradients between workers, optionally quantized to few bits.

Quantized, a step takes two rounds (as in Tang et al., 2021): each worker sends part k of its gradients to
worker k, which sums what it receives, quantizes the sum and sends it to all. All workers decode the same
bytes, so their weights stay bit-identical. In float, gloo's ring sends as many values as these two rounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgepack.config.training import Gradients
from edgepack.training.gradients import Coder, lay_out, noise_of
from edgepack.training.workers import ALONE, Workers

FLOAT_BYTES = 4


@dataclass(slots=True, eq=False)
class Exchange:
    """The all-reduce after the backward pass, with its quantization errors (error feedback)."""

    sizes: Sequence[int]
    settings: Gradients | None
    workers: Workers = ALONE
    seed: int = 0
    lost: list[Tensor] = field(default_factory=list)
    """Quantization error of each part that this worker sends, then of the sum that it sends to all."""
    sent_bytes: int = 0
    """Bytes that this worker sent."""
    float_bytes: int = 0
    """Bytes that float gradients would have taken."""
    coder: Coder | None = None

    def __post_init__(self) -> None:
        if self.settings is None:
            return
        count = self.workers.count
        self.coder = Coder(lay_out(self.sizes, self.settings.block, count), self.settings)
        own = 1 if count > 1 else 0
        self.lost = [torch.zeros(self.coder.layout.length) for _ in range(count + own)]

    def __call__(self, tensors: Sequence[Tensor], step: int) -> None:
        """Replace the gradients of ``tensors`` by their (quantized) sum over all workers."""
        if self.coder is None and self.workers.count == 1:
            return
        whole = torch.cat([_gradient(t).reshape(-1) for t in tensors])
        if self.workers.count > 1:
            self.float_bytes += _to_others(whole.numel() * FLOAT_BYTES, self.workers.count)
        if self.coder is None:
            self.workers.sum_floats(whole)
            self.sent_bytes = self.float_bytes
        else:
            whole = self._coded(whole, self.coder, step)
        for tensor, part in zip(tensors, whole.split(list(self.sizes)), strict=True):
            tensor.grad = part.reshape(tensor.shape)

    def _coded(self, whole: Tensor, coder: Coder, step: int) -> Tensor:
        layout, workers = coder.layout, self.workers
        noise = noise_of(self.seed, step, workers.rank)
        padded = torch.nn.functional.pad(whole, (0, layout.groups.numel() - layout.size))
        parts = padded.reshape(workers.count, layout.length)
        messages = [coder.send(k, part, self.lost[k], noise) for k, part in enumerate(parts)]
        if workers.count > 1:
            theirs = workers.to_each(messages)
            mine = torch.stack([coder.receive(workers.rank, m) for m in theirs]).sum(0)
            message = coder.send(workers.rank, mine, self.lost[-1], noise)
            messages = workers.to_all(message)
            self.sent_bytes += 2 * (workers.count - 1) * message.numel()
        decoded = torch.cat([coder.receive(k, m) for k, m in enumerate(messages)])
        return decoded[: layout.size]


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _to_others(size: int, count: int) -> int:
    """Bytes that each worker sends in a ring all-reduce of ``size`` bytes."""
    return 2 * (count - 1) * size // count
