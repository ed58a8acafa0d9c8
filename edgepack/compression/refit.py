"""The weights that are left are fitted anew, so that their outputs come near those of the whole model.

With ``y`` what a layer of the whole model puts out and ``x`` what the same layer of the slim model gets, its
new weight is ``argmin |y - V x|^2 + |(V - W) R|^2``, where ``W`` are the weights that it kept: one ridge
regression on second moments, streamed over the samples. Layers are fitted from the first to the last, each
on what those before it give now, so that it makes up for their errors as well (Y. He et al., "Channel Pruning
for Accelerating Very Deep Neural Networks", 2017, layer by layer; here every layer behind a cut).
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
"""How much weights hold to what they were, beside the mean square of their inputs. With few rows for many
inputs it is more, inputs over rows: what few samples say of how inputs go together is not to be trusted."""


@dataclass(frozen=True, slots=True)
class Bias:
    """The constant that is added to what a node multiplies, and the operand that holds it."""

    node: ir.Node
    index: int


def bias_of(node: ir.Node) -> Bias | None:
    """Where the mean of a weight's loss can go; one that has none gets it."""
    if node.op_type in ("Conv", "Gemm"):
        held = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        fits = held is None or held.size == _outputs(node)
        plain = node.op_type == "Conv" or node.attributes.get_float("beta", 1.0) == 1.0
        return Bias(node, 2) if fits and plain else None
    adding = only_consumer(node.outputs[0]) if node.op_type == "MatMul" else None
    if adding is None or adding.op_type != "Add":
        return None
    index = 1 if adding.inputs[0] is node.outputs[0] else 0
    held = constant(adding.inputs[index])
    return (
        Bias(adding, index)
        if held is not None and held.shape[-1:] == (_outputs(node),) == (held.size,)
        else None
    )


def _outputs(node: ir.Node) -> int:
    groups, outputs, _ = to_groups(node, weight_of(node)).shape
    return int(groups * outputs)


@dataclass(slots=True, eq=False)
class _Sums:
    """Of inputs ``x`` [groups, K] and wanted outputs ``y`` [groups, M], per group."""

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
    """Fit the weights of ``pruned``, which is changed; gives the number of those fitted.

    Args:
        whole: the model that it came from.
        pruned: nodes have the names that they have in ``whole``.
        cut: names of the nodes that read fewer channels.
        kept: of nodes that have fewer outputs, the positions of those left.
        run: what both run on, once for each depth of the graph.

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
        held = constant(bias.node.inputs[bias.index]) if bias.index < len(bias.node.inputs) else None
        changed = shift if held is None else held + shift.reshape(held.shape)
        replace_operand(graph, bias.node, bias.index, changed.astype(np.float32), "fit")
