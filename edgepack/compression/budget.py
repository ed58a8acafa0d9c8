"""Predicts the packed size of a model in int8."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.compression.codebook import cluster
from edgepack.config.passes import Cluster
from edgepack.ir.files import save_model
from edgepack.ir.model import clone, new_initializer
from edgepack.ir.numerics import quantize
from edgepack.ir.scheme import Granularity, QuantScheme, QuantType
from edgepack.pack.epk import pack
from edgepack.quantization.groups import FusionGroup
from edgepack.quantization.weights.gptq import Matrix
from edgepack.quantization.weights.matrix import from_groups, has_rows, weight_of
from edgepack.quantization.weights.params import weight_params

INT8 = QuantScheme(QuantType.INT8, True, Granularity.PER_CHANNEL)
SCALE = "_scale_of_draft"


def packed_int8_bytes(
    model: ir.Model, groups: Sequence[FusionGroup], weights: Mapping[str, Matrix], clusters: Cluster | None
) -> int:
    """Bytes of the ``.epk`` of ``model`` with all weights int8, those in ``weights`` by group first replaced.

    With ``clusters`` the weights are clustered as that pass would. Weights are rounded to nearest; GPTQ
    changes the size by about a percent. Scales and zero points of activations are missing; they are small.
    """
    draft = clone(model)
    nodes = {n.name: n for n in draft.graph}
    for group in groups:
        node = nodes[group.name]
        table = node.op_type == "Gather" and bool(group.constants) and not group.inputs
        if group.weight is None and not table:
            continue
        matrix = weights.get(group.name)
        weight = weight_of(node) if matrix is None else from_groups(node, matrix)
        stored = _stored(node, weight, matrix, clusters)
        node.replace_input_with(0 if table else 1, new_initializer(draft.graph, f"{group.name}_q", stored))
        scale = weight_params(node, weight, INT8).scale
        new_initializer(draft.graph, f"{group.name}{SCALE}", scale)
    for group in (u for u in groups if u.table is not None):
        for look_up in (u for u in groups if u.constants == (group.table,) and u.op_type == "Gather"):
            nodes[look_up.name].replace_input_with(0, nodes[group.name].inputs[1])  # stored once
    for name, value in list(draft.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not name.endswith(SCALE):
            del draft.graph.initializers[name]
    with tempfile.TemporaryDirectory(prefix="edgepack-budget-") as folder:
        # Skip the checks: it has integers in place of floats and is not run.
        save_model(draft, Path(folder) / "draft.onnx", check=False)
        return pack(Path(folder) / "draft.onnx", Path(folder) / "draft.epk", check=False).packed_bytes


def _stored(
    node: ir.Node, weight: Matrix, matrix: Matrix | None, clusters: Cluster | None
) -> npt.NDArray[np.integer]:
    if matrix is not None and clusters is not None and has_rows(node):
        codes = cluster(matrix, None, 2**clusters.bits, clusters.outputs).codes
        return from_groups(node, codes.astype(np.int8))
    return quantize(weight, weight_params(node, weight, INT8))
