"""Input moments of each weight with earlier layers quantized, and the difference from the float model.

Two layer-by-layer frontiers move through the graph: one of the float model, and one whose earlier layers have
their stored weights. A layer is then rounded for the inputs that it will have in the quantized model (Frantar
et al., 2023, GPTQ), and towards the outputs of the float model (Li et al., 2025, GPTAQ, asymmetric
calibration).
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.calibration.frontier import Change, Frontier, stages
from edgepack.data.samples import Samples
from edgepack.quantization.groups import FusionGroup
from edgepack.quantization.weights.moments import InputMoments, batches_of, no_moments, weight_inputs

Floats = npt.NDArray[np.float32]

LEAST_DAMPING = 0.1
"""Least damping of the least squares that compensate for drift, as a share of the mean diagonal."""
DAMPING_PER_INPUT = 1.0
"""The same, times inputs per sampled position: with few positions most of the measured drift is noise."""


def stream_sequential(
    model: ir.Model,
    groups: Sequence[FusionGroup],
    samples: Samples,
    change: Change,
    *,
    threads: int,
    seed: int,
    on_sample: Callable[[], None] = lambda: None,
) -> Iterator[tuple[FusionGroup, InputMoments]]:
    """Moments of the inputs of each group's weight, in topological order.

    ``change`` puts the stored weights of all groups yielded so far into a graph; it is called after the
    caller has rounded them. ``model`` must support a frontier.

    Raises:
        CalibrationError: the model fails on a sample.
    """
    nodes = {n.name: n for n in model.graph}
    by_name = {u.name: u for u in groups}
    order = stages({u.name: nodes[u.name] for u in groups}, model.graph)
    wanted = [u.inputs[0] for u in groups]
    reported = 0
    with tempfile.TemporaryDirectory(prefix="edgepack-round-") as folder:
        places = [Path(folder) / name for name in ("float", "stored")]
        for place in places:
            place.mkdir()
        intended, actual = (Frontier(model, samples, wanted, place, threads) for place in places)
        for number, stage in enumerate(order):
            names = list(dict.fromkeys(by_name[name].inputs[0] for name in stage))
            intended.advance(names)
            actual.advance(names, change)
            for batch in batches_of([by_name[name] for name in stage], nodes, with_second_moments=True):
                yield from _measure(batch, nodes, intended, actual, first=number == 0, seed=seed + number)
            while reported < len(samples) * (number + 1) // len(order):
                on_sample()
                reported += 1


def _measure(
    batch: Sequence[FusionGroup],
    nodes: dict[str | None, ir.Node],
    intended: Frontier,
    actual: Frontier,
    *,
    first: bool,
    seed: int,
) -> Iterator[tuple[FusionGroup, InputMoments]]:
    """Moments of the groups in ``batch``; before the ``first`` stage nothing is quantized: no drift."""
    for group in batch:
        node, name = nodes[group.name], group.inputs[0]
        moments = no_moments(node, with_second_moments=True)
        # The same positions for both.
        picks = [np.random.default_rng(seed) for _ in range(2)]
        for sample in range(len(actual.values)):
            inputs = weight_inputs(node, _floats(actual.value(sample, name)), picks[0])
            meant = None if first else weight_inputs(node, _floats(intended.value(sample, name)), picks[1])
            moments.add(inputs, meant)
        moments.finish()
        yield group, moments


def _floats(array: npt.NDArray[np.generic]) -> Floats:
    return np.asarray(array, np.float32)


def intended_weight(weight: Floats, moments: InputMoments) -> Floats:
    """The weight [groups, outputs, K] that reproduces the float model's outputs from actual inputs.

    Damped least squares ``W + W D (S + λ)⁻¹`` with the second moments ``S`` of actual inputs and their drift
    ``D``; the fewer positions were sampled, the larger λ. Zeros stay zero.
    """
    if moments.drift is None or moments.second is None:
        return weight
    columns = weight.shape[2]
    mean = np.einsum("gii->g", moments.second) / columns
    damping = max(LEAST_DAMPING, DAMPING_PER_INPUT * columns / max(moments.count, 1))
    damped = moments.second.copy()
    diagonal = np.einsum("gii->gi", damped)  # a view
    diagonal += np.where(mean > 0, damping * mean, 1.0)[:, None]
    lost = np.matmul(weight, moments.drift)
    found = np.linalg.solve(damped, lost.transpose(0, 2, 1)).transpose(0, 2, 1)
    return np.where(weight == 0, np.float32(0), weight + found)
