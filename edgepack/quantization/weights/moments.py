"""Means and second moments of the inputs of each weight, streamed over the samples."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.calibration.run import stream_activations
from edgepack.data.samples import Samples
from edgepack.quantization.groups import FusionGroup
from edgepack.quantization.weights.matrix import to_groups, weight_of

Floats = npt.NDArray[np.float32]

POSITIONS = 96
"""Output positions of a convolution that are sampled per image: neighbours are strongly correlated."""
ROWS = 256
"""Rows of a matrix product that are sampled, per sample."""
BATCH_POSITIONS = 1024
"""Positions that are sampled in all images of a batch together, at least one in each."""
MAX_COLUMNS = 4608
"""Weights with a larger K (inputs per output) get means only: K × K moments would not fit in memory."""
MAX_BYTES = 256 << 20
"""Memory for moments; weights that do not fit together take several passes over the samples."""


@dataclass(slots=True, eq=False)
class InputMoments:
    """Moments of the inputs of one weight: ``mean`` [groups, K], ``second`` [groups, K, K] or ``None``.

    Where earlier layers are quantized already, ``intended`` [groups, K] is the mean of the float model's
    inputs in place of the actual inputs ``x``, and ``drift`` [groups, K, K] is ``E[(intended - x) xᵀ]``.

    Sums until :meth:`finish`. Inputs are buffered until there are K of them: then the matrix product costs
    more than reading and writing the sum, and the buffer takes no more memory than the sum.
    """

    mean: Floats
    second: Floats | None
    count: int = 0
    waiting: list[tuple[Floats, Floats | None]] = field(default_factory=list)
    intended: Floats | None = None
    drift: Floats | None = None
    low: list[Floats] = field(default_factory=list)
    """Minimum of each input [K] in each sample, for weights with one group."""
    high: list[Floats] = field(default_factory=list)

    def add(self, inputs: Floats, intended: Floats | None = None) -> None:
        """Add one sample's ``inputs`` [groups, K, positions], and the float model's inputs there."""
        if not inputs.size:
            return
        if len(inputs) == 1:
            self.low.append(inputs[0].min(axis=1))
            self.high.append(inputs[0].max(axis=1))
        self.mean += inputs.sum(2)
        self.count += inputs.shape[2]
        if intended is not None:
            self.intended = intended.sum(2) + (0 if self.intended is None else self.intended)
        if self.second is not None:
            self.waiting.append((inputs, None if intended is None else intended - inputs))
            if sum(x.shape[2] for x, _ in self.waiting) >= self.mean.shape[1]:
                self._multiply(self.second)

    def finish(self) -> None:
        """Divide sums by the count."""
        if self.second is not None:
            self._multiply(self.second)
            self.second /= max(self.count, 1)
        self.mean /= max(self.count, 1)
        if self.intended is not None:
            self.intended /= max(self.count, 1)
        if self.drift is not None:
            self.drift /= max(self.count, 1)

    def _multiply(self, second: Floats) -> None:
        if not self.waiting:
            return
        x = np.concatenate([inputs for inputs, _ in self.waiting], axis=2)
        drifts = [drift for _, drift in self.waiting if drift is not None]
        self.waiting.clear()
        if drifts:
            drift = np.matmul(np.concatenate(drifts, axis=2), x.transpose(0, 2, 1))
            self.drift = drift if self.drift is None else self.drift + drift
        # BLAS computes X Xᵀ (syrk) with half the work for a large matrix, in twice the time for many small
        # ones.
        second += x[0] @ x[0].T if len(x) == 1 else np.matmul(x, x.copy().transpose(0, 2, 1))


def stream_moments(
    model: ir.Model,
    groups: Sequence[FusionGroup],
    samples: Samples,
    *,
    with_second_moments: bool,
    threads: int,
    seed: int,
    on_sample: Callable[[], None] = lambda: None,
) -> Iterator[tuple[FusionGroup, InputMoments]]:
    """Moments of the inputs of each group's weight; only means without ``with_second_moments``.

    Groups that fit into memory together are measured in one pass over the samples.

    Raises:
        CalibrationError: the model fails on a sample.
    """
    nodes = {n.name: n for n in model.graph}
    for batch in batches_of(groups, nodes, with_second_moments):
        moments = {u.name: no_moments(nodes[u.name], with_second_moments) for u in batch}
        rng = np.random.default_rng(seed)
        names = list(dict.fromkeys(u.inputs[0] for u in batch))
        for _, arrays in stream_activations(model, samples, names, threads=threads):
            for group in batch:
                moments[group.name].add(weight_inputs(nodes[group.name], arrays[group.inputs[0]], rng))
            on_sample()
        for group in batch:
            finished = moments.pop(group.name)
            finished.finish()
            yield group, finished


def batches_of(
    groups: Sequence[FusionGroup], nodes: dict[str | None, ir.Node], with_second_moments: bool
) -> list[list[FusionGroup]]:
    """Groups in order, in batches whose moments fit in memory together."""
    batches: list[list[FusionGroup]] = []
    room = 0
    for group in groups:
        matrices, _, columns = to_groups(nodes[group.name], weight_of(nodes[group.name])).shape
        need = matrices * columns * 4
        if with_second_moments and columns <= MAX_COLUMNS:
            need = 2 * matrices * columns**2 * 4  # twice: buffered inputs take as much
        if not batches or need > room:
            batches.append([])
            room = MAX_BYTES
        batches[-1].append(group)
        room -= need
    return batches


def no_moments(node: ir.Node, with_second_moments: bool) -> InputMoments:
    """Empty moments for the weight of ``node``."""
    groups, _, columns = to_groups(node, weight_of(node)).shape
    wanted = with_second_moments and columns <= MAX_COLUMNS
    second = np.zeros((groups, columns, columns), np.float32) if wanted else None
    return InputMoments(np.zeros((groups, columns), np.float32), second)


def weight_inputs(node: ir.Node, x: npt.NDArray[np.floating], rng: np.random.Generator) -> Floats:
    """Inputs ``[groups, K, positions]`` of the weight, taken from ``x`` at random output positions."""
    if node.op_type == "Conv":
        return _patches(node, np.asarray(x, np.float32), rng)
    rows = x.reshape(-1, x.shape[-1])
    return np.asarray(rows[_pick(len(rows), ROWS, rng)].T[None], np.float32)


def _pick(total: int, most: int, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    return rng.choice(total, most, replace=False, shuffle=False) if total > most else np.arange(total)


def _patches(node: ir.Node, x: Floats, rng: np.random.Generator) -> Floats:
    kernel = weight_of(node).shape[2:]
    rank, attributes = len(kernel), node.attributes
    sizes = x.shape[2:]
    strides = attributes.get_ints("strides", (1,) * rank)
    dilations = attributes.get_ints("dilations", (1,) * rank)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = _pads(node, sizes, spans, strides)
    outputs = [
        max((n + a + b - span) // s + 1, 0)
        for n, (a, b), span, s in zip(sizes, pads, spans, strides, strict=True)
    ]
    images, channels = x.shape[:2]
    most = min(POSITIONS, max(BATCH_POSITIONS // max(images, 1), 1))
    picked = np.unravel_index(_pick(int(np.prod(outputs)), most, rng), outputs)
    taps = np.unravel_index(np.arange(int(np.prod(kernel))), kernel)
    # Input index of each kernel element at each position, [taps, positions]; in the padding inputs are zero.
    index = np.zeros((len(taps[0]), len(picked[0])), np.intp)
    inside = np.ones(index.shape, np.bool_)
    for axis in range(rank):
        at = taps[axis][:, None] * dilations[axis] + picked[axis] * strides[axis] - pads[axis][0]
        inside &= (at >= 0) & (at < sizes[axis])
        index = index * sizes[axis] + np.clip(at, 0, sizes[axis] - 1)
    patches = x.reshape(images, channels, -1).take(index.reshape(-1), axis=2)
    if not inside.all():
        patches *= inside.reshape(-1)
    group = attributes.get_int("group", 1)
    columns = patches.reshape(images, group, channels // group * len(index), -1).transpose(1, 2, 0, 3)
    return columns.reshape(group, columns.shape[1], -1)


def _pads(
    node: ir.Node, sizes: Sequence[int], spans: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(sizes, spans, strides, strict=True)]
        halves = [(t // 2, t - t // 2) for t in totals]
        return halves if auto == "SAME_UPPER" else [(b, a) for a, b in halves]
    rank = len(spans)
    pads = node.attributes.get_ints("pads", (0,) * 2 * rank) if auto == "NOTSET" else (0,) * 2 * rank
    return list(zip(pads[:rank], pads[rank:], strict=True))
