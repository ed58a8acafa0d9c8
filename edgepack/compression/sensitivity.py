"""Sensitivity: measures how the change of one fusion group alone affects the outputs."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edgepack.calibration.run import stream_activations
from edgepack.data.samples import Samples
from edgepack.ir.arrays import Array
from edgepack.ir.model import clone, constant, name_of, new_initializer

PROBES = 32
"""Number of samples that the effect of a group is measured on."""

Outputs = list[list[Array]]
"""The float outputs of a model, by sample."""


def outputs_of(model: ir.Model, samples: Samples, threads: int) -> Outputs:
    """Outputs of ``model`` for the first of ``samples``.

    Raises:
        CalibrationError: the model fails on a sample.
    """
    names = [name_of(v) for v in model.graph.outputs]
    found = stream_activations(model, samples.spread(PROBES), names, threads=threads)
    return [[a for a in arrays.values() if a.dtype.kind == "f"] for _, arrays in found]


def noise(reference: Outputs, outputs: Outputs) -> float:
    """Power of the difference over that of the signal; outputs of different shapes are skipped."""
    signal = power = 0.0
    for before, after in zip(reference, outputs, strict=True):
        for a, b in zip(before, after, strict=True):
            if a.shape == b.shape:
                clean = np.isfinite(a) & np.isfinite(b)
                wide = np.where(clean, a, 0).astype(np.float64)
                signal += float((wide**2).sum())
                power += float(((wide - np.where(clean, b, 0)) ** 2).sum())
    return power / max(signal, 1e-30)


def noise_alone(
    model: ir.Model,
    changed: ir.Model,
    groups: Sequence[str],
    reference: Outputs,
    samples: Samples,
    threads: int,
) -> dict[str, float]:
    """Noise at the outputs of ``model`` if one group alone has its weight and bias from ``changed``.

    Raises:
        CalibrationError: the model fails on a sample.
    """
    nodes: Mapping[str | None, ir.Node] = {n.name: n for n in changed.graph}
    found = {}
    for name in groups:
        alone = clone(model)
        node = next(n for n in alone.graph if n.name == name)
        new = nodes[name].inputs
        node.resize_inputs(len(new))
        for index in range(1, len(new)):
            array = constant(new[index])
            if array is not None:
                node.replace_input_with(index, new_initializer(alone.graph, f"{name}_{index}", array))
        found[name] = noise(reference, outputs_of(alone, samples, threads))
    return found
