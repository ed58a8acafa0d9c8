"""Removes channels from a model: slices initializers and updates shapes and channel counts.

Given (channel 1 of 2 is removed)::

    x -> Conv(w [2, 3, 1, 1], b [2]) -> h [n, 2, 8, 8] -> Reshape([n, 128]) -> Gemm(v [128, 5]) -> y

Result::

    x -> Conv(w [1, 3, 1, 1], b [1]) -> h [n, 1, 8, 8] -> Reshape([n, 64]) -> Gemm(v [64, 5]) -> y
"""

from collections import defaultdict

import numpy as np
import onnx_ir as ir

from edgepack.compression.channels.atoms import Atoms, Channels, Cut, Mask, Track
from edgepack.compression.channels.moves import slice_of
from edgepack.compression.channels.reshape import shape_entries
from edgepack.compression.operands import replace_operand
from edgepack.ir.model import clone, constant


def slim(model: ir.Model, channels: Channels, alive: Mask) -> ir.Model:
    """A copy of ``model`` with only the channels whose atoms are ``alive`` [atoms]. Atoms of one class must
    be alive together, and every value must keep at least one channel."""
    copied = clone(model)
    twins = dict(zip(model.graph, copied.graph, strict=True))
    cuts: dict[tuple[ir.Node, int], list[Cut]] = defaultdict(list)
    for cut in channels.cuts:
        if not alive[cut.atoms].all():
            cuts[cut.node, cut.index].append(cut)
    for (node, index), found in cuts.items():
        _take(copied.graph, twins[node], index, {c.axis: np.flatnonzero(alive[c.atoms]) for c in found})
    for node, twin in twins.items():
        track = channels.tracks.get(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
        if track is not None:
            _restate(copied.graph, channels, alive, node, twin)
        for value, other in zip(node.outputs, twin.outputs, strict=True):
            after = channels.tracks.get(value)
            if after is not None and other.shape is not None:
                sizes = list(other.shape)
                sizes[after.axis] = _count(after, alive)
                other.shape = ir.Shape(sizes)
    return copied


def _count(track: Track, alive: Mask) -> int:
    return int(alive[track.atoms].sum())


def _take(graph: ir.Graph, node: ir.Node, index: int, kept: dict[int, Atoms]) -> None:
    """Slice a constant operand; other consumers of the constant keep the old one."""
    old = node.inputs[index]
    content = constant(old)
    assert old is not None
    assert content is not None
    for axis, positions in kept.items():
        content = content.take(positions, axis)
    replace_operand(graph, node, index, np.ascontiguousarray(content), "slim")


def _restate(graph: ir.Graph, channels: Channels, alive: Mask, node: ir.Node, twin: ir.Node) -> None:
    """Write the new number of channels into a node that has it as an attribute or operand."""
    assert node.inputs[0] is not None
    before = channels.tracks[node.inputs[0]]
    after = channels.tracks.get(node.outputs[0])
    if alive[before.atoms].all():
        return
    match node.op_type:
        case "Conv" | "ConvTranspose" if (groups := node.attributes.get_int("group", 1)) > 1:
            left = _count(before, alive) * groups // len(before.atoms)
            twin.attributes["group"] = ir.AttrInt64("group", left)
        case "Reshape" if after is not None:
            _restate_shape(graph, twin, after, alive)
        case "Split":
            axis = node.attributes.get_int("axis", 0) % len(node.inputs[0].shape or ())
            if axis == before.axis:
                sizes = [_count(channels.tracks[v], alive) for v in node.outputs]
                twin.attributes.pop("num_outputs", None)
                replace_operand(graph, twin, 1, np.asarray(sizes, np.int64), "slim")
        case "Slice":
            _restate_slice(graph, node, twin, before, alive)
        case "Gather":
            axis = node.attributes.get_int("axis", 0) % len(node.inputs[0].shape or ())
            wanted = constant(node.inputs[1])
            if axis == before.axis and wanted is not None:
                renumbered = np.cumsum(alive[before.atoms]) - 1
                wanted = wanted % len(before.atoms)
                left_over = renumbered[wanted[alive[before.atoms][wanted]]]
                replace_operand(graph, twin, 1, left_over.astype(np.int64), "slim")
        case "Resize":
            sizes_of = constant(node.inputs[3]) if len(node.inputs) > 3 else None
            if sizes_of is not None and sizes_of.size and after is not None:
                axes = [a % len(node.inputs[0].shape or ()) for a in node.attributes.get_ints("axes", ())]
                at = axes.index(after.axis) if after.axis in axes else None if axes else after.axis
                if at is not None:
                    sizes_of = sizes_of.copy()
                    sizes_of[at] = _count(after, alive)
                    replace_operand(graph, twin, 3, sizes_of, "slim")


def _restate_shape(graph: ir.Graph, twin: ir.Node, after: Track, alive: Mask) -> None:
    entries = shape_entries(twin)
    assert entries is not None
    entry = entries[after.axis]
    if entry is None or entry <= 0:
        return  # -1 and 0 are computed from the input
    wanted = _count(after, alive)
    operand = constant(twin.inputs[1])
    if operand is not None:
        operand = operand.copy()
        operand[after.axis] = wanted
        replace_operand(graph, twin, 1, operand, "slim")
        return
    joined = twin.inputs[1].producer() if twin.inputs[1] is not None else None
    assert joined is not None
    start = 0
    for index, piece in enumerate(joined.inputs):
        part = constant(piece)
        length = 1 if part is None else part.size
        if part is not None and start <= after.axis < start + length:
            part = part.copy()
            part.reshape(-1)[after.axis - start] = wanted
            replace_operand(graph, joined, index, part, "slim")
            return
        start += length


def _restate_slice(graph: ir.Graph, node: ir.Node, twin: ir.Node, before: Track, alive: Mask) -> None:
    """Recompute the bounds of a Slice of channels from the remaining channels."""
    rank = len(node.inputs[0].shape or ()) if node.inputs[0] is not None else 0
    taken = slice_of(node, before.axis, rank)
    assert taken is not None
    if taken == slice(None):
        return
    first, last, _ = taken.indices(len(before.atoms))
    living = alive[before.atoms]
    bounds = int(living[:first].sum()), int(living[:last].sum())
    given = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    starts = constant(node.inputs[1])
    assert starts is not None
    axes = [int(a) % rank for a in given.reshape(-1)] if given is not None else list(range(starts.size))
    for index, bound in zip((1, 2), bounds, strict=True):
        operand = constant(node.inputs[index])
        assert operand is not None
        changed = operand.copy()
        changed[axes.index(before.axis)] = bound
        replace_operand(graph, twin, index, changed, "slim")
