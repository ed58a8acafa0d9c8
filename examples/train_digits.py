"""Train the keyword spotter in ``calibration_data/``: which digit was said in one second of sound.

    python examples/train_digits.py features.npz --output calibration_data

It needs ``torch`` and ``onnx`` and takes about seven minutes on one core. ``features.npz`` holds

- ``logmel``, floats ``[N, 1, 40, 97]``: for each recording a log-mel spectrogram, 40 bands (axis 2) by 97
  frames (axis 3), with one shift and one scale for the whole set that give it mean 0 and standard deviation
  1. One second of mono sound at 8 kHz in windows of 256 samples, every 80 samples, has 97 frames; shorter
  recordings are padded with silence at the end. The front end on the device must be the one used here.
- ``label``, integers ``[N]``: the digit.

The samples are split by label into training, calibration and evaluation; the splits are disjoint. The
same seed, torch version and machine give the same network.
"""

import argparse
import copy
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

CALIBRATION_PER_CLASS = 10
EVALUATION_PER_CLASS = 30
STEPS_PER_UNIT = 64
"""Features are rounded to multiples of 1/64, so that float32 arrays compress to about a byte a value."""
PEAK_LEARNING_RATE = 4e-3
BATCH = 64

log = logging.getLogger("train_digits")


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the samples: ``logmel`` float32 ``[N, 1, 40, 97]``, ``label`` int64 ``[N]``."""

    logmel: npt.NDArray[np.float32]
    label: npt.NDArray[np.int64]

    def take(self, rows: npt.NDArray[np.int64]) -> "Part":
        """The samples with the numbers ``rows``, in that order."""
        return Part(self.logmel[rows], self.label[rows])


class Block(nn.Module):
    """A depthwise-separable convolution, BatchNorm after each half; a residual add where shapes allow."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = stride == 1 and channels_in == channels_out
        self.depthwise = nn.Conv2d(
            channels_in, channels_in, 3, stride, padding=1, groups=channels_in, bias=False
        )
        self.depthwise_norm = nn.BatchNorm2d(channels_in)
        self.pointwise = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.pointwise_norm = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels_in, H, W]`` to ``[N, channels_out, H / stride, W / stride]``."""
        y = torch.relu(self.depthwise_norm(self.depthwise(x)))
        y = self.pointwise_norm(self.pointwise(y))
        return torch.relu(x + y if self.residual else y)


class DigitNet(nn.Module):
    """A DS-CNN with residual adds.

    After Zhang et al., "Hello Edge: Keyword Spotting on Microcontrollers", 2017.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 64, (4, 10), stride=2, padding=(1, 4), bias=False)
        self.stem_norm = nn.BatchNorm2d(64)
        self.blocks = nn.Sequential(
            Block(64, 64), Block(64, 128, stride=2), *(Block(128, 128) for _ in range(4)), Block(128, 192)
        )
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(192, 10)

    def forward(self, logmel: Tensor) -> Tensor:
        """Log-mels ``[N, 1, 40, 97]`` to logits ``[N, 10]``."""
        x = torch.relu(self.stem_norm(self.stem(logmel)))
        x = self.blocks(x)
        x = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        logits: Tensor = self.classifier(self.dropout(x))
        return logits


def read_features(path: Path) -> Part:
    """The samples in ``path``, rounded; a ValueError if the arrays are not as described above."""
    with np.load(path, allow_pickle=False) as arrays:
        logmel, label = arrays["logmel"].astype(np.float32), arrays["label"].astype(np.int64)
    if logmel.shape != (len(label), 1, 40, 97):
        raise ValueError(f"{path}: logmel is {logmel.shape}, expected {(len(label), 1, 40, 97)}")
    return Part(np.round(logmel * STEPS_PER_UNIT) / np.float32(STEPS_PER_UNIT), label)


def split(samples: Part, rng: np.random.Generator) -> tuple[Part, Part, Part]:
    """Training, calibration, evaluation: disjoint, shuffled, the last two with each digit equally often."""
    training, calibration, evaluation = [], [], []
    for digit in np.unique(samples.label):
        rows = rng.permutation(np.flatnonzero(samples.label == digit))
        held_out = CALIBRATION_PER_CLASS + EVALUATION_PER_CLASS
        calibration.append(rows[:CALIBRATION_PER_CLASS])
        evaluation.append(rows[CALIBRATION_PER_CLASS:held_out])
        training.append(rows[held_out:])
    first, second, third = (
        samples.take(rng.permutation(np.concatenate(part))) for part in (training, calibration, evaluation)
    )
    return first, second, third


def augment(logmel: Tensor, generator: torch.Generator) -> Tensor:
    """A batch shifted by up to 12 frames and 2 bands, made louder or softer, with noise added."""
    silence = logmel.amin()

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand((len(logmel), 1, 1, 1), generator=generator)

    moved = torch.full_like(logmel, float(silence))
    frames = torch.randint(-12, 13, (len(logmel),), generator=generator).tolist()
    bands = torch.randint(-2, 3, (len(logmel),), generator=generator).tolist()
    for row, (frame, band) in enumerate(zip(frames, bands, strict=True)):
        into_t, from_t = slice(max(frame, 0), 97 + min(frame, 0)), slice(max(-frame, 0), 97 - max(frame, 0))
        into_f, from_f = slice(max(band, 0), 40 + min(band, 0)), slice(max(-band, 0), 40 - max(band, 0))
        moved[row, :, into_f, into_t] = logmel[row, :, from_f, from_t]
    noise = torch.randn(moved.shape, generator=generator) * uniform(0.0, 0.15)
    return torch.clamp_min(moved + uniform(-0.2, 0.2) + noise, float(silence))


def train(part: Part, epochs: int, seed: int) -> DigitNet:
    """A network trained on ``part``; the weights are a moving average over the last epochs."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = DigitNet()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(network)
    logmel, label = torch.from_numpy(part.logmel), torch.from_numpy(part.label)
    batches = len(label) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, epochs * batches)
    for epoch in range(epochs):
        started, total = time.monotonic(), 0.0
        order = torch.randperm(len(label), generator=generator)
        for rows in order[: batches * BATCH].view(batches, BATCH):
            x = augment(logmel[rows], generator).to(memory_format=torch.channels_last)
            loss = nn.functional.cross_entropy(network(x), label[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            update_average(average, network)
            total += loss.item()
        log.info("epoch %2d: loss %.4f, %.1f s", epoch + 1, total / batches, time.monotonic() - started)
    average.eval()
    return average


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, keep: float = 0.98) -> None:
    """Move the weights and statistics of ``average`` a step of ``1 - keep`` towards those of ``network``."""
    for slow, fast in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
        if slow.is_floating_point():
            slow.lerp_(fast, 1 - keep)
        else:
            slow.copy_(fast)


@torch.no_grad()
def accuracy(network: nn.Module, part: Part) -> float:
    """The share of samples whose digit the network names."""
    logits = network(torch.from_numpy(part.logmel))
    return float((logits.argmax(1).numpy() == part.label).mean())


def export(network: nn.Module, path: Path) -> None:
    """Write the network as ONNX, opset 17, any batch size, BatchNorm as nodes of their own."""
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    torch.onnx.export(
        network,
        (torch.zeros(1, 1, 40, 97),),
        path,
        input_names=["logmel"],
        output_names=["logits"],
        opset_version=17,
        dynamic_axes={"logmel": {0: "batch"}, "logits": {0: "batch"}},
        dynamo=False,
        # In its own evaluation mode the exporter would merge BatchNorm into the convolutions.
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
    )


def main() -> None:
    """Read features, train, and write the model and its sample data."""
    parser = argparse.ArgumentParser(description="Train the spoken-digit example of edgepack.")
    parser.add_argument("features", type=Path, help="an .npz with logmel [N, 1, 40, 97] and label [N]")
    parser.add_argument("--output", type=Path, default=Path("calibration_data"), help="folder to write to")
    parser.add_argument("--epochs", type=int, default=26)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)

    training, calibration, evaluation = split(
        read_features(arguments.features), np.random.default_rng(arguments.seed)
    )
    network = train(training, arguments.epochs, arguments.seed)
    log.info("accuracy: training %.4f", accuracy(network, training))
    log.info("accuracy: calibration %.4f", accuracy(network, calibration))
    log.info("accuracy: evaluation %.4f", accuracy(network, evaluation))

    arguments.output.mkdir(parents=True, exist_ok=True)
    export(network, arguments.output / "digits.onnx")
    np.savez_compressed(arguments.output / "calibration.npz", logmel=calibration.logmel)
    np.savez_compressed(arguments.output / "evaluation.npz", logmel=evaluation.logmel, label=evaluation.label)


if __name__ == "__main__":
    main()
