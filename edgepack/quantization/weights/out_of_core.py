"""Out-of-core rounding for large models: to nearest, one weight at a time, integers in files."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.ir.numerics import quantize
from edgepack.quantization.plan.types import QuantPlan
from edgepack.quantization.weights.matrix import weight_of
from edgepack.quantization.weights.rounding import Rounder


def round_to_files(model: ir.Model, plan: QuantPlan, folder: Path) -> Rounder:
    """Round every weight of ``plan`` to nearest and keep the integers in ``folder``, memory-mapped.

    The kernel drops mapped pages when memory is short, so the quantized weights may exceed it. Second moments
    of inputs would take more memory than the weights and are not measured.
    """
    nodes = {n.name: n for n in model.graph}
    rounded: dict[tuple[str, bytes], npt.NDArray[np.integer]] = {}
    for number, group in enumerate(plan.groups):
        if group.weight is not None:
            integers = quantize(weight_of(nodes[group.group.name]), group.weight)
            np.save(path := folder / f"weight_{number}.npy", integers)
            rounded[group.group.name, group.weight.scale.tobytes()] = np.load(path, mmap_mode="r")
    return Rounder(model, {}, rounded)
