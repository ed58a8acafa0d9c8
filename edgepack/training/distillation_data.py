"""Distillation data: inputs, teacher outputs and labels of the training samples, and the order of batches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgepack.calibration.run import stream_activations
from edgepack.config.training import Tune
from edgepack.data.samples import Samples
from edgepack.errors import ConfigError, ModelError
from edgepack.ir.arrays import Feeds
from edgepack.training.objective import Objective
from edgepack.training.store import Store
from edgepack.training.workers import ALONE, Workers


@dataclass(slots=True)
class DistillationData:
    """Samples with the teacher outputs, by index."""

    feeds: Store
    teacher_outputs: Store
    labels: list[int] | None
    power: dict[str, float]
    """Variance of each teacher output, by name."""
    trained: tuple[int, ...]
    judged: tuple[int, ...]
    together: bool = False
    """Whether samples can be stacked along the first axis."""
    shapes: list[tuple[tuple[int, ...], ...]] = field(default_factory=list)


def prepare_distillation(
    teacher: ir.Model,
    objective: Objective,
    samples: Samples,
    settings: Tune,
    *,
    threads: int,
    folder: Path,
) -> DistillationData:
    """Run the teacher once over all samples in onnxruntime.

    Each of ``samples`` is followed by the augmented copies that the settings ask for. Held-out samples are
    originals, and their augmented copies are not trained on.

    Raises:
        ConfigError: labels are required and are not class numbers.
        CalibrationError: the teacher fails on a sample.
    """
    folders = [folder / name for name in ("feeds", "teacher_outputs")]
    for path in folders:
        path.mkdir()
    feeds, teacher_outputs = Store(folders[0]), Store(folders[1])
    labels: list[int] = []
    sums: dict[str, list[float]] = {name: [0.0, 0.0, 0.0] for name in objective.teachers}
    outputs = stream_activations(teacher, samples, objective.teachers, threads=threads)
    for sample, (_, arrays) in zip(samples, outputs, strict=True):
        feeds.add(sample.feeds)
        teacher_outputs.add(arrays)
        for name, array in arrays.items():
            moments = (array.size, array.sum(dtype=np.float64), np.square(array, dtype=np.float64).sum())
            sums[name] = [a + float(b) for a, b in zip(sums[name], moments, strict=True)]
        if settings.labels > 0:
            if not isinstance(sample.label, int):
                raise ConfigError(
                    f"tune: labels: sample {sample.key} has the label {sample.label!r}, not a class number"
                )
            labels.append(sample.label)
    power = {name: square / count - (total / count) ** 2 for name, (count, total, square) in sums.items()}
    held_out, own = settings.held_out, settings.views + 1
    every = round(1 / held_out) if held_out else 0
    judged = tuple(range((every - 1) * own, len(feeds), every * own)) if every else ()
    trained = tuple(i for i in range(len(feeds)) if i // own * own not in set(judged))
    if not trained:
        raise ConfigError(f"tune: {len(feeds)} samples with held_out {held_out} leave none to train on")
    shapes = [tuple(a.shape for a in feeds[i].values()) for i in range(len(feeds))]
    return DistillationData(
        feeds, teacher_outputs, labels if settings.labels > 0 else None, power, trained, judged, shapes=shapes
    )


def can_be_stacked(run: Callable[[dict[str, Tensor]], Mapping[str, Tensor]], feeds: Sequence[Feeds]) -> bool:
    """Whether a batch of two samples gives the same values as two runs, whatever shapes the file declares.

    ``run`` raises a ModelError where shapes do not fit, as :func:`edgepack.training.graph.run_program` does.
    """
    if len(feeds) < 2 or any(
        a.shape != b.shape or not a.shape for a, b in zip(*(f.values() for f in feeds[:2]), strict=True)
    ):
        return False
    tensors = [{k: torch.from_numpy(v) for k, v in f.items()} for f in feeds[:2]]
    with torch.no_grad():
        alone = [run(t) for t in tensors]
        try:
            both = run({k: torch.cat([t[k] for t in tensors]) for k in tensors[0]})
        except ModelError:
            return False
    for name, value in both.items():
        first, second = (a[name] for a in alone)
        if first.dim() != second.dim() or first.shape[1:] != second.shape[1:]:
            return False
        wanted = torch.cat([first, second]) if first.dim() else first
        size = float(wanted.abs().max()) if wanted.numel() else 0.0
        if wanted.shape != value.shape or not torch.allclose(wanted, value, rtol=1e-2, atol=1e-2 * size):
            return False
    return True


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of one step."""

    stacks: list[list[int]]
    """Sample indices of this worker, in stacks; each stack is one forward pass."""
    size: int
    """Number of samples over all workers."""


def batches(
    distillation: DistillationData, batch: int, seed: int, epoch: int, workers: Workers = ALONE
) -> list[Batch]:
    """The steps of an epoch.

    The order depends on the seed and the epoch alone, so a resumed run gets the same batches.
    """
    order = np.random.default_rng((seed, epoch)).permutation(np.asarray(distillation.trained)).tolist()
    steps = [order[i : i + batch] for i in range(0, len(order), batch)]
    return [Batch(_stacks(distillation, step[workers.rank :: workers.count]), len(step)) for step in steps]


def _stacks(distillation: DistillationData, numbers: Sequence[int]) -> list[list[int]]:
    if not distillation.together:
        return [[n] for n in numbers]
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for n in numbers:
        groups.setdefault(distillation.shapes[n], []).append(n)
    return list(groups.values())


def labels_of(distillation: DistillationData, numbers: Sequence[int]) -> Tensor | None:
    """Class numbers of samples."""
    return None if distillation.labels is None else torch.tensor([distillation.labels[n] for n in numbers])
