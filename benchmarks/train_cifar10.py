"""Train the small residual network that benchmarks prune: CIFAR-10, 32 x 32 pictures of ten kinds.

    python benchmarks/train_cifar10.py cifar10.zip -o cifar10.onnx
    python benchmarks/train_cifar10.py cifar10.zip -o start.onnx --widths 16 32 48 64 --untrained

It needs ``torch``, ``onnx`` and ``pillow`` and takes about five minutes of one core. The archive holds
pictures as ``train/CLASS/NAME.jpg`` and ``test/CLASS/NAME.jpg``; classes are numbered in the order of
their names. The network takes one picture at a time, float32 ``[1, 3, 32, 32]``, red first, as
``(pixel - 125) / 63``. An untrained one has the statistics of some pictures in its normalization, so that
it still starts well after these are folded into its weights.
"""

import argparse
import logging
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from cifar10 import read, standardized
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (48, 96, 128, 192)
CLASSES = 10
EPOCHS = 10
BATCH = 64
PEAK_LEARNING_RATE = 0.15
STATISTICS = 500
"""Pictures that an untrained network is normalized by."""
SHIFT = 4
"""Pixels that a picture is moved by, at most, in training."""

log = logging.getLogger("train_cifar10")


class Block(nn.Module):
    """Two convolutions of 3 x 3 beside a shortcut, at half the resolution."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels_out, 3, 2, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels_out)
        self.second = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels_in, H, W]`` to ``[N, channels_out, H / 2, W / 2]``."""
        y = functional.relu(self.first_norm(self.first(x)))
        return functional.relu(self.second_norm(self.second(y)) + self.shortcut(x))


class Network(nn.Module):
    """A convolution, three blocks, a mean and a linear layer: 60 million multiplications per image."""

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(widths[0])
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in pairwise(widths)))
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures ``[N, 3, 32, 32]`` to scores ``[N, 10]``."""
        x = self.blocks(functional.relu(self.stem_norm(self.stem(x))))
        found: Tensor = self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return found


def part_of(archive: Path, part: str) -> tuple[Tensor, Tensor]:
    """Pictures ``[N, 3, 32, 32]`` as the network takes them and classes ``[N]`` of a part of the archive."""
    pictures, kinds = read(archive, part)
    return torch.from_numpy(standardized(pictures)), torch.from_numpy(kinds)


def varied(pictures: Tensor) -> Tensor:
    """Each picture mirrored or not, and moved by up to SHIFT pixels."""
    count, _, height, width = pictures.shape
    padded = functional.pad(pictures, (SHIFT,) * 4)
    rows, columns = torch.randint(0, 2 * SHIFT + 1, (2, count)).tolist()
    moved = torch.stack(
        [
            padded[i, :, r : r + height, c : c + width]
            for i, (r, c) in enumerate(zip(rows, columns, strict=True))
        ]
    )
    mirrored = torch.rand(count) < 0.5
    moved[mirrored] = moved[mirrored].flip(3)
    return moved


def train(network: Network, pictures: Tensor, kinds: Tensor) -> None:
    """SGD with momentum, one cycle of the learning rate."""
    steps = (len(pictures) + BATCH - 1) // BATCH
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, epochs=EPOCHS, steps_per_epoch=steps, pct_start=0.25
    )
    network.train()
    for epoch in range(EPOCHS):
        started, total = time.monotonic(), 0.0
        for rows in torch.randperm(len(pictures)).split(BATCH):
            x = varied(pictures[rows]).contiguous(memory_format=torch.channels_last)
            loss = functional.cross_entropy(network(x), kinds[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.item()
        log.info("epoch %d: loss %.3f, %.0f s", epoch + 1, total / steps, time.monotonic() - started)


def normalize(network: Network, pictures: Tensor) -> None:
    """Take the statistics of normalization from some of the pictures; weights stay as they are drawn."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()
    with torch.no_grad():
        network(pictures[torch.randperm(len(pictures))[:STATISTICS]])


def accuracy(network: Network, pictures: Tensor, kinds: Tensor) -> float:
    """Share of pictures that get their class."""
    network.eval()
    with torch.no_grad():
        found = torch.cat([network(x).argmax(1) for x in pictures.split(500)])
    return float((found == kinds).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="channels of stem and blocks")
    parser.add_argument("--without-every", type=int, metavar="N", help="leave out every N-th train picture")
    parser.add_argument("--untrained", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    network = Network(args.widths).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pictures, kinds = part_of(args.archive, "train")
    if args.without_every:
        kept = torch.arange(len(kinds)) % args.without_every != args.without_every - 1
        pictures, kinds = pictures[kept], kinds[kept]
    if args.untrained:
        normalize(network, pictures)
    else:
        train(network, pictures, kinds)
    log.info("accuracy on the test part: %.4f", accuracy(network, *part_of(args.archive, "test")))
    example = torch.zeros(1, 3, 32, 32)
    torch.onnx.export(
        network.to(memory_format=torch.contiguous_format).eval(),
        (example,),
        str(args.output),
        dynamo=False,
        opset_version=17,
        input_names=["image"],
        output_names=["scores"],
    )


if __name__ == "__main__":
    main()
