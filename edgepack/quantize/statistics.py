"""What flows into each weight: second moments and means of its inputs, streamed over the samples."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.calibrate.run import stream_activations
from edgepack.data import Samples
from edgepack.quantize.units import Unit
from edgepack.quantize.weights import groups_of_weight, weight_of

Floats = npt.NDArray[np.float32]

POSITIONS = 96
"""Output positions of a convolution that are looked at, per sample: neighbours tell nearly the same."""
ROWS = 256
"""Rows of a matrix product that are looked at, per sample."""
MAX_COLUMNS = 4608
"""Weights with more inputs than this (per output) are rounded to nearest: K × K moments would fill memory."""
MAX_BYTES = 192 << 20
"""Of moments held at a time; more weights than fit are done in several passes over the samples."""


@dataclass(slots=True, eq=False)
class InputMoments:
    """Of the inputs of one weight, per group: ``second`` [groups, K, K] and ``mean`` [groups, K]."""

    second: Floats
    mean: Floats
    count: int = 0

    def add(self, rows: Floats) -> None:
        """Take in rows ``[groups, positions, K]``."""
        if len(rows) == 1:  # a plain product of a matrix with itself takes BLAS half the time
            self.second[0] += rows[0].T @ rows[0]
        else:
            self.second += np.matmul(rows.transpose(0, 2, 1), rows)
        self.mean += rows.sum(1)
        self.count += rows.shape[1]

    def finished(self) -> "InputMoments":
        """Averages instead of sums."""
        n = max(self.count, 1)
        return InputMoments(self.second / n, self.mean / n, self.count)


def stream_moments(
    model: ir.Model,
    units: Sequence[Unit],
    samples: Samples,
    *,
    threads: int,
    seed: int,
    on_sample: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Unit, InputMoments]]:
    """Moments of the inputs of each unit's weight, in batches of units that fit into memory together."""
    nodes = {n.name: n for n in model.graph}
    for batch in _batches(units, nodes):
        moments = {u.name: _empty(nodes[u.name]) for u in batch}
        rng = np.random.default_rng(seed)
        names = list(dict.fromkeys(u.inputs[0] for u in batch))
        for _, arrays in stream_activations(model, samples, names, threads=threads):
            for unit in batch:
                moments[unit.name].add(input_rows(nodes[unit.name], arrays[unit.inputs[0]], rng))
            on_sample()
        for unit in batch:
            yield unit, moments.pop(unit.name).finished()


def _batches(units: Sequence[Unit], nodes: dict[str | None, ir.Node]) -> list[list[Unit]]:
    batches: list[list[Unit]] = []
    room = 0
    for unit in units:
        groups, _, columns = groups_of_weight(nodes[unit.name]).shape
        need = groups * columns * columns * 4
        if columns > MAX_COLUMNS:
            continue
        if not batches or need > room:
            batches.append([])
            room = MAX_BYTES
        batches[-1].append(unit)
        room -= need
    return batches


def _empty(node: ir.Node) -> InputMoments:
    groups, _, columns = groups_of_weight(node).shape
    return InputMoments(
        np.zeros((groups, columns, columns), np.float32), np.zeros((groups, columns), np.float32)
    )


def input_rows(node: ir.Node, x: Floats, rng: np.random.Generator) -> Floats:
    """Rows ``[groups, positions, K]`` that the weight of ``node`` is multiplied with, a random part of them."""
    if node.op_type != "Conv":
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > ROWS:
            rows = rows[rng.choice(len(rows), ROWS, replace=False)]
        return np.asarray(rows[None], np.float32)
    return _patches(node, x, rng)


def _patches(node: ir.Node, x: Floats, rng: np.random.Generator) -> Floats:
    kernel = weight_of(node).shape[2:]
    rank, attributes = len(kernel), node.attributes
    strides = attributes.get_ints("strides", (1,) * rank)
    dilations = attributes.get_ints("dilations", (1,) * rank)
    group = attributes.get_int("group", 1)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    x = np.pad(x, ((0, 0), (0, 0), *_pads(node, x.shape[2:], spans, strides)))
    windows = np.lib.stride_tricks.sliding_window_view(x, spans, axis=tuple(range(2, 2 + rank)))
    windows = windows[(slice(None), slice(None), *(slice(None, None, s) for s in strides))]
    windows = windows[(..., *(slice(None, None, d) for d in dilations))]
    sizes = windows.shape[2 : 2 + rank]
    total = int(np.prod(sizes))
    picked = rng.choice(total, POSITIONS, replace=False) if total > POSITIONS else np.arange(total)
    rows = windows[(slice(None), slice(None), *np.unravel_index(picked, sizes))]  # [N, C, P, *kernel]
    n, channels, positions = rows.shape[:3]
    rows = rows.reshape(n, group, channels // group, positions, -1).transpose(1, 0, 3, 2, 4)
    return np.ascontiguousarray(rows.reshape(group, n * positions, -1), np.float32)


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
