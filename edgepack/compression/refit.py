"""Refits the weights of a pruned model to the layer outputs of the original model.

With ``y`` the output of a layer in the original model and ``x`` the input of the same layer in the pruned
model, the new weight is ``argmin |y - V x|^2 + |(V - W) R|^2``, where ``W`` are the kept weights: a ridge
regression on second moments, streamed over the samples. Layers are fitted from first to last on the outputs
of the refitted layers before them, so that they compensate earlier errors (Y. He et al., "Channel Pruning for
Accelerating Very Deep Neural Networks", 2017; here for every layer that consumes pruned channels).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepack.calibration.run import stream_activations
from edgepack.compression.channels.atoms import Atoms
from edgepack.compression.operands import replace_operand
from edgepack.compression.sample_run import SampleRun
from edgepack.ir.model import constant, name_of, only_consumer
from edgepack.quantization.weights.matrix import from_groups, to_groups, weight_of
from edgepack.quantization.weights.moments import MAX_COLUMNS, Floats, weight_inputs

LEAST_RIDGE = 0.01
"""Ridge penalty relative to the mean square of the inputs. It is larger, inputs / rows, with few rows for
many inputs, because correlations estimated from few samples are unreliable."""


@dataclass(frozen=True, slots=True)
class Bias:
    """The bias of a layer: the node that adds it and the operand index."""

    node: ir.Node
    index: int


def bias_of(node: ir.Node) -> Bias | None:
    """Where the bias of a layer is, or can be added; ``None`` if it cannot."""
    if node.op_type in ("Conv", "Gemm"):
        content = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        fits = content is None or content.size == _outputs(node)
        plain = node.op_type == "Conv" or node.attributes.get_float("beta", 1.0) == 1.0
        return Bias(node, 2) if fits and plain else None
    adding = only_consumer(node.outputs[0]) if node.op_type == "MatMul" else None
    if adding is None or adding.op_type != "Add":
        return None
    index = 1 if adding.inputs[0] is node.outputs[0] else 0
    content = constant(adding.inputs[index])
    return (
        Bias(adding, index)
        if content is not None and content.shape[-1:] == (_outputs(node),) == (content.size,)
        else None
    )


def _outputs(node: ir.Node) -> int:
    groups, outputs, _ = to_groups(node, weight_of(node)).shape
    return int(groups * outputs)


@dataclass(slots=True, eq=False)
class _Sums:
    """Moments of inputs ``x`` [groups, K] and target outputs ``y`` [groups, M], per group."""

    xx: Floats
    yx: Floats
    x: Floats
    y: Floats
    count: int = 0

    def add(self, x: Floats, y: Floats) -> None:
        self.xx += np.matmul(x, x.transpose(0, 2, 1))
        self.yx += np.matmul(y, x.transpose(0, 2, 1))
        self.x += x.sum(2)
        self.y += y.sum(2)
        self.count += x.shape[2]


def refit(
    whole: ir.Model,
    pruned: ir.Model,
    cut: frozenset[str],
    kept: Mapping[str, Atoms],
    run: SampleRun,
) -> int:
    """Refit the weights of ``pruned`` in place; return the number of refitted layers.

    Args:
        whole: the original model.
        pruned: nodes have the names that they have in ``whole``.
        cut: names of the nodes that consume fewer channels.
        kept: by node with fewer outputs, the indices of the kept outputs.
        run: the samples that both run on, once for each depth of the graph.

    Raises:
        CalibrationError: a model fails on a sample.
    """
    originals, nodes = ({n.name: n for n in m.graph} for m in (whole, pruned))
    fitted = 0
    for names in _levels(pruned, cut):
        sums = {name: _empty(nodes[name]) for name in names}
        rngs = np.random.default_rng(run.seed), np.random.default_rng(run.seed)
        inputs = [[name_of(_input(m[name])) for name in names] for m in (originals, nodes)]
        streams = (
            stream_activations(model, run.samples, list(dict.fromkeys(wanted)), threads=run.threads)
            for model, wanted in zip((whole, pruned), inputs, strict=True)
        )
        for (_, before), (_, after) in zip(*streams, strict=True):
            for name, source, target in zip(names, *inputs, strict=True):
                x = weight_inputs(originals[name], before[source], rngs[0])
                x_left = weight_inputs(nodes[name], after[target], rngs[1])
                y = np.matmul(_matrix(originals[name]), x).reshape(-1, x.shape[2])
                y = y[kept[name]] if name in kept else y
                sums[name].add(x_left, y.reshape(len(x_left), -1, x.shape[2]))
            run.on_sample()
        for name in names:
            _fit(pruned.graph, nodes[name], sums[name])
        fitted += len(names)
    return fitted


def _input(node: ir.Node) -> ir.Value:
    assert node.inputs[0] is not None
    return node.inputs[0]


def _matrix(node: ir.Node) -> Floats:
    return to_groups(node, weight_of(node))


def _levels(model: ir.Model, cut: frozenset[str]) -> list[list[str]]:
    """Names of the nodes to fit: those that read fewer channels and all behind them. A level has what
    depends on lower ones alone."""
    depth: dict[ir.Value, int] = {}
    levels: list[list[str]] = []
    for node in model.graph:
        level = max((depth.get(v, 0) for v in node.inputs if v is not None), default=0)
        if (level or node.name in cut) and _can_be_fitted(node):
            level += 1
            while len(levels) < level:
                levels.append([])
            levels[level - 1].append(node.name or "")
        elif node.name in cut:
            level += 1  # what is behind it has changed all the same
        depth.update(dict.fromkeys(node.outputs, level))
    return [names for names in levels if names]


def _can_be_fitted(node: ir.Node) -> bool:
    if (
        node.op_type not in ("Conv", "Gemm", "MatMul")
        or len(node.inputs) < 2
        or constant(node.inputs[1]) is None
    ):
        return False
    if node.op_type == "MatMul" and weight_of(node).ndim != 2:
        return False
    plain = not node.attributes.get_int("transA", 0) and node.attributes.get_float("alpha", 1.0) == 1.0
    return plain and _matrix(node).shape[2] <= MAX_COLUMNS


def _empty(node: ir.Node) -> _Sums:
    groups, outputs, columns = _matrix(node).shape
    return _Sums(
        xx=np.zeros((groups, columns, columns), np.float32),
        yx=np.zeros((groups, outputs, columns), np.float32),
        x=np.zeros((groups, columns), np.float32),
        y=np.zeros((groups, outputs), np.float32),
    )


def _fit(graph: ir.Graph, node: ir.Node, sums: _Sums) -> None:
    """Write the weight and the bias that fit ``sums`` best into ``node``."""
    if not sums.count:
        return
    bias, before = bias_of(node), _matrix(node).astype(np.float64)
    xx, yx, x, y = (a.astype(np.float64) / sums.count for a in (sums.xx, sums.yx, sums.x, sums.y))
    if bias is not None:
        xx -= x[:, :, None] * x[:, None]
        yx -= y[:, :, None] * x[:, None]
    squares = np.diagonal(xx, axis1=1, axis2=2)
    ridge = (
        max(LEAST_RIDGE, xx.shape[1] / sums.count) * squares
        + LEAST_RIDGE * squares.mean(1, keepdims=True)
        + 1e-12
    )
    damped = xx + ridge[:, None] * np.eye(xx.shape[1])
    step = np.linalg.solve(damped, (yx - before @ xx).transpose(0, 2, 1)).transpose(0, 2, 1)
    after = before + step
    replace_operand(graph, node, 1, from_groups(node, after.astype(np.float32)), "fit")
    if bias is not None:
        shift = (y - np.einsum("gmk,gk->gm", after, x)).reshape(-1)
        content = constant(bias.node.inputs[bias.index]) if bias.index < len(bias.node.inputs) else None
        changed = shift if content is None else content + shift.reshape(content.shape)
        replace_operand(graph, bias.node, bias.index, changed.astype(np.float32), "fit")
