"""Shared code of weight passes: selecting weights, measuring their inputs, writing new weights."""

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edgepack.errors import ConfigError, did_you_mean
from edgepack.ir.model import constant, name_of, new_initializer
from edgepack.quantization.groups import FusionGroup, Role
from edgepack.quantization.weights.gptq import Matrix
from edgepack.quantization.weights.matrix import from_groups, has_rows, to_groups, weight_of
from edgepack.quantization.weights.moments import InputMoments


def matrix_of(node: ir.Node) -> Matrix:
    """The weight of ``node`` as [groups, outputs, K]."""
    return to_groups(node, weight_of(node))


def weighted_groups(
    name: str,
    groups: Sequence[FusionGroup],
    nodes: Mapping[str | None, ir.Node],
    keep: Sequence[str],
    keep_types: Sequence[str],
) -> list[FusionGroup]:
    """Fusion groups whose weights the pass ``name`` may change: matrix products and convolutions not in
    ``keep``.

    A weight that is tied to an embedding table is skipped: if it changed, the file would need two copies.

    Raises:
        ConfigError: a name or type in ``keep`` matches no node, or nothing is left.
    """
    names = [u.name for u in groups]
    for pattern in keep:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"{name}: keep: no node is named {pattern!r}, {did_you_mean(pattern, names)}")
    require_types(name, keep_types, {u.op_type for u in groups})
    found = [
        u
        for u in groups
        if u.role is Role.HEAVY
        and u.weight is not None
        and u.table is None
        and u.inputs
        and has_rows(nodes[u.name])
        and u.op_type not in keep_types
        and not any(fnmatch.fnmatch(u.name, pattern) for pattern in keep)
    ]
    if not found:
        raise ConfigError(f"{name}: the model has no weights for it, or all are kept")
    return found


def require_types(name: str, keep_types: Iterable[str], known: Collection[str]) -> None:
    """Check the operator types that the pass ``name`` should keep.

    Raises:
        ConfigError: no node has the type; names the most similar one.
    """
    for op_type in keep_types:
        if op_type not in known:
            raise ConfigError(
                f"{name}: keep_types: the model has no {op_type!r}, {did_you_mean(op_type, known)}"
            )


def write_weight(
    graph: ir.Graph, node: ir.Node, before: Matrix, after: Matrix, moments: InputMoments, suffix: str
) -> ir.Value:
    """Replace the weight of ``node``, and correct its bias by the change of the mean output."""
    old = node.inputs[1]
    assert old is not None
    content = from_groups(node, after).astype(np.float32)
    new = new_initializer(graph, f"{name_of(old)}_{suffix}", content)
    node.replace_input_with(1, new)
    shift = np.einsum("gok,gk->go", after - before, moments.mean).reshape(-1)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    bias_array = constant(bias)
    if bias is not None and bias_array is not None and bias_array.size == shift.size:
        corrected = (bias_array.reshape(-1) - shift).reshape(bias_array.shape).astype(np.float32)
        node.replace_input_with(2, new_initializer(graph, f"{name_of(bias)}_{suffix}", corrected))
    elif bias is None and node.op_type == "Conv":
        node.resize_inputs(3)
        made = new_initializer(graph, f"{name_of(old)}_bias", -shift.astype(np.float32))
        node.replace_input_with(2, made)
    for value in (old, bias):
        if value is not None and not value.uses() and name_of(value) in graph.initializers:
            del graph.initializers[name_of(value)]
    return new
