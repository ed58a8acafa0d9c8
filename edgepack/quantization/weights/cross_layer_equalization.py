"""Cross-layer equalization: scales channels of a weight to similar ranges; the next layer undoes it.

Given::

    Conv(x, A, a) -> Relu -> Conv(B)

Result, for any positive ``s`` per channel between the two::

    Conv(x, A * s, a * s) -> Relu -> Conv(B / s)

The same function (Nagel et al., 2019, section 4.1). With one scale per weight tensor, channels of small range
have few steps; after equalization they have as many as the others. Relu, LeakyRelu and PRelu are positively
homogeneous, so factors pass them. A Clip is not, and pairs around one are not changed, see
docs/decisions/equalize.md. The paper equalizes all pairs alike; here a pair has the factors with the least
expected error, or none.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.calibration.run import stream_activations
from edgepack.data.samples import Samples
from edgepack.graph.rules.linear import bias_of, output_channels, scale_input, scale_output, set_linear
from edgepack.ir.model import clone, constant, constant_tensor, name_of, only_consumer
from edgepack.quantization.weights.codebook_scales import codebook_scales_of
from edgepack.quantization.weights.matrix import to_groups
from edgepack.quantization.weights.smoothquant import COMPENSATED_SHARE, LEVELS, WEIGHT_LIMIT

Doubles = npt.NDArray[np.float64]

MAX_FACTOR = 64.0
"""Largest factor of a channel in one step, and the inverse of the smallest."""
PER_OCTAVE = 8
"""Factors per octave; others are rounded to these."""
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
"""Candidate exponents of the factors: 1 gives both ranges of a channel their geometric mean."""
SWEEPS = 4
"""Iterations over all pairs: each pair changes the ranges of its neighbours."""
MAX_ERROR_SHARE = 0.98
"""Factors must leave at most this share of the expected error."""
HOMOGENEOUS = frozenset({"Relu", "LeakyRelu", "PRelu"})


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Two layers with at most an activation between them."""

    first: ir.Node
    second: ir.Node
    activation: str
    """The input of the second layer."""


@dataclass(frozen=True, slots=True, eq=False)
class ChannelStats:
    """Mean square and largest magnitude of each channel of a value."""

    mean_square: Doubles
    peak: Doubles


def equalize(model: ir.Model, samples: Samples, *, threads: int) -> tuple[ir.Model, int]:
    """A model that computes the same, and how many pairs of layers were equalized.

    Raises:
        CalibrationError: the model fails on a sample.
    """
    equal = clone(model)
    pairs = find_pairs(equal)
    if not pairs:
        return model, 0
    names = list(dict.fromkeys(n for p in pairs for n in (name_of_input(p.first), p.activation)))
    stats = _channel_stats(model, samples, names, threads)
    factors = choose_factors(pairs, stats)
    for pair, s in zip(pairs, factors, strict=True):
        if not (s == 1).all():
            _scale(equal.graph, pair, s)
    return equal, sum(not (s == 1).all() for s in factors)


def find_pairs(model: ir.Model) -> list[Pair]:
    """All pairs of ``model``, in topological order."""
    found = []
    for node in model.graph:
        if not _is_layer(node) or node.outputs[0].is_graph_output():
            continue
        value = node.outputs[0]
        after = only_consumer(value)
        if after is not None and _is_homogeneous(after) and after.inputs[0] is value:
            if after.outputs[0].is_graph_output():
                continue
            value = after.outputs[0]
            after = only_consumer(value)
        if after is not None and _is_layer(after) and after.inputs[0] is value:
            found.append(Pair(node, after, name_of(value)))
    return found


def name_of_input(node: ir.Node) -> str:
    """Name of the activation that a layer consumes."""
    assert node.inputs[0] is not None
    return name_of(node.inputs[0])


def _is_layer(node: ir.Node) -> bool:
    """Whether it is a Conv or Gemm with its own constant weight and bias, without codebook scales."""
    if node.op_type not in ("Conv", "Gemm") or node.attributes.get_int("transA", 0) != 0:
        return False
    own = [v for v in node.inputs[1:] if v is not None]
    array = constant(node.inputs[1])
    if array is None or array.dtype != np.float32 or codebook_scales_of(node) is not None:
        return False
    alone = all(constant(v) is not None and len(v.uses()) == 1 for v in own)
    return alone and not any(v.is_graph_output() for v in own)


def _is_homogeneous(activation: ir.Node) -> bool:
    """Whether ``f(s x) = s f(x)`` for positive ``s``."""
    return activation.op_type in HOMOGENEOUS and all(constant(v) is not None for v in activation.inputs[1:])


def _channel_stats(
    model: ir.Model, samples: Samples, names: list[str], threads: int
) -> dict[str, ChannelStats]:
    squares: dict[str, Doubles] = {}
    peaks: dict[str, Doubles] = {}
    count = 0
    for _, arrays in stream_activations(model, samples, names, threads=threads):
        count += 1
        for name, array in arrays.items():
            rows = np.moveaxis(array.astype(np.float64), 1, 0).reshape(array.shape[1], -1)
            squares[name] = squares.get(name, 0) + (rows**2).mean(1)
            peaks[name] = np.maximum(peaks.get(name, 0), np.abs(rows).max(1))
    return {name: ChannelStats(squares[name] / count, peaks[name]) for name in squares}


def choose_factors(pairs: list[Pair], stats: Mapping[str, ChannelStats]) -> list[Doubles]:
    """Factors [channels] of each pair; ones where they would not reduce the expected error."""
    weights = {n.name: _weight(n) for p in pairs for n in (p.first, p.second)}
    energy = {name: s.mean_square.copy() for name, s in stats.items()}
    peaks = {name: s.peak.copy() for name, s in stats.items()}
    total = [np.ones(len(peaks[p.activation])) for p in pairs]
    for _ in range(SWEEPS):
        for number, pair in enumerate(pairs):
            a, b = weights[pair.first.name], weights[pair.second.name]
            into = energy[name_of_input(pair.first)]
            between, peak = energy[pair.activation], peaks[pair.activation]
            best, least = None, MAX_ERROR_SHARE * _expected(pair, a, b, into, between, peak)
            for s in _candidates(pair, a, b):
                x, y = _scaled(pair, a, b, s)
                error = _expected(pair, x, y, into, between * s**2, peak * s)
                if error < least:
                    best, least = s, error
            if best is not None:
                weights[pair.first.name], weights[pair.second.name] = _scaled(pair, a, b, best)
                total[number] = total[number] * best
                energy[pair.activation] = between * best**2
                peaks[pair.activation] = peak * best
    return total


def _candidates(pair: Pair, a: Doubles, b: Doubles) -> Iterable[Doubles]:
    out, into = np.abs(_by_output(pair.first, a)).max(1), np.abs(_by_input(pair.second, b)).max(1)
    alive = (out > 0) & (into > 0)
    if not alive.any():
        return
    ratio = np.where(alive, into / into.max() / np.where(alive, out / out.max(), 1), 1.0)
    for strength in STRENGTHS:
        factors = np.clip(ratio ** (strength / 2), 1 / MAX_FACTOR, MAX_FACTOR)
        # Rounded to steps, so that float noise in the statistics does not change the model.
        yield np.where(alive, 2.0 ** (np.rint(np.log2(factors) * PER_OCTAVE) / PER_OCTAVE), 1.0)


def _expected(pair: Pair, a: Doubles, b: Doubles, into: Doubles, energy: Doubles, peak: Doubles) -> float:
    """Mean squared error summed over the second layer's outputs, from rounding both weights and its input.

    ``into`` and ``energy`` are the mean squares of the inputs of the first and second layer, by channel.
    """
    carried = (_by_input(pair.second, b) ** 2).sum(1)
    from_first = _step(a) ** 2 * float((_energy(pair.first, a, into) * carried).sum())
    from_second = _step(b) ** 2 * float(_energy(pair.second, b, energy).sum())
    between = (float(peak.max()) / LEVELS) ** 2 * float(carried.sum())
    return COMPENSATED_SHARE * (from_first + from_second) + between


def _step(weight: Doubles) -> float:
    return float(np.abs(weight).max()) / WEIGHT_LIMIT


def _energy(node: ir.Node, weight: Doubles, by_channel: Doubles) -> Doubles:
    """For each output, the sum of the mean squares of its inputs."""
    groups, outputs, columns = to_groups(node, weight).shape
    taps = groups * columns // len(by_channel)
    return np.repeat(by_channel.reshape(groups, -1).sum(1) * taps, outputs)


def _by_output(node: ir.Node, weight: Doubles) -> Doubles:
    grouped = to_groups(node, weight)
    return grouped.reshape(-1, grouped.shape[2])


def _by_input(node: ir.Node, weight: Doubles) -> Doubles:
    """The weight as [input channels, weights of the channel]."""
    grouped = to_groups(node, weight)
    groups, outputs, columns = grouped.shape
    taps = int(np.prod(weight.shape[2:])) if node.op_type == "Conv" else 1
    apart = grouped.reshape(groups, outputs, columns // taps, taps).transpose(0, 2, 1, 3)
    return apart.reshape(groups * columns // taps, outputs * taps)


def _weight(node: ir.Node) -> Doubles:
    array = constant(node.inputs[1])
    assert array is not None
    return np.asarray(array, np.float64)


def _scaled(pair: Pair, a: Doubles, b: Doubles, s: Doubles) -> tuple[Doubles, Doubles]:
    by_output, by_input = scale_output(pair.first, s), scale_input(pair.second, 1 / s)
    assert by_output is not None
    assert by_input is not None
    return by_output(a), by_input(b)


def _scale(graph: ir.Graph, pair: Pair, s: Doubles) -> None:
    for node, change, scale in (
        (pair.first, scale_output(pair.first, s), s),
        (pair.second, scale_input(pair.second, 1 / s), None),
    ):
        weight = constant_tensor(node.inputs[1])
        assert weight is not None
        bias = bias_of(node, output_channels(node, weight)[2])
        assert bias is not None
        set_linear(graph, node, weight, change, bias, scale, None)
