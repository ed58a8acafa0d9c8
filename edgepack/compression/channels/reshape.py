"""Channel rules of Reshape and similar operators."""

from collections.abc import Hashable, Sequence

import numpy as np
import onnx_ir as ir

from edgepack.compression.channels.atoms import Atoms, Channels, Track, label, numbers, tracked
from edgepack.ir.model import constant, only_consumer


def shape_entries(node: ir.Node) -> list[int | None] | None:
    """The target shape of a Reshape; computed entries are ``None``; ``None`` as a whole if the rank is
    unknown."""
    value = node.inputs[1]
    content = constant(value)
    if content is not None:
        return [int(n) for n in content]
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "Concat":
        return None
    entries: list[int | None] = []
    for piece in producer.inputs:
        part = constant(piece)
        if part is not None:
            entries += [int(n) for n in part.reshape(-1)]
        elif piece is not None and piece.shape is not None and piece.shape == ir.Shape([1]):
            entries.append(None)
        else:
            return None
    return entries


def _dims(value: ir.Value) -> list[Hashable]:
    """Sizes: numbers, names of symbolic dimensions, and a unique object for each unknown one."""
    assert value.shape is not None
    return [d if isinstance(d, int) else (d.value or object()) for d in value.shape]


def _asked_for(value: ir.Value) -> int | None:
    """The size of the last axis that the only consumer, a MatMul, needs."""
    consumer = only_consumer(value)
    matrix = constant(consumer.inputs[1]) if consumer is not None and consumer.op_type == "MatMul" else None
    return matrix.shape[0] if matrix is not None and matrix.ndim == 2 else None


def reshape(found: Channels, node: ir.Node) -> None:
    """Track channels through a Reshape, Flatten, Squeeze or Unsqueeze; pin those that it mixes."""
    if (known := tracked(found, node)) is None:
        return
    x, track, _ = known
    output = node.outputs[0]
    entries = shape_entries(node) if node.op_type == "Reshape" else []
    if output.shape is None or entries is None or node.attributes.get_int("allowzero", 0) > 0:
        found.pin(x, f"{label(node)} gives it an unknown shape")
        return
    before, after = _dims(x), _dims(output)
    for place, entry in enumerate(entries):
        if entry == 0 and place < len(before):
            after[place] = before[place]
    if after and not isinstance(after[-1], int) and (needed := _asked_for(output)) is not None:
        after[-1] = needed
    moved = _place_of(found, node, track, before, after)
    if moved is None:
        found.pin(x, f"{label(node)} mixes its channels with other axes")
        return
    axis, atoms = moved
    if entries and not _can_be_restated(node, entries, track.axis, axis):
        found.pin(x, f"{label(node)} gives it a shape that is computed")
        return
    found.track(output, axis, atoms)


def _can_be_restated(node: ir.Node, entries: list[int | None], before: int, after: int) -> bool:
    """Whether the target shape of a Reshape that moves channels to another axis can be updated."""
    if before < len(entries) and entries[before] == 0 and after != before:
        return False
    if entries[after] in (-1, 0):
        return True
    shape = node.inputs[1]
    own = shape is not None and (constant(shape) is not None or len(shape.uses()) == 1)
    return own and entries[after] is not None


def _place_of(
    found: Channels, node: ir.Node, track: Track, before: list[Hashable], after: list[Hashable]
) -> tuple[int, Atoms] | None:
    """The channel axis and atoms of the result; ``None`` if they cannot be determined."""
    for sources, results in segments(before, after):
        if track.axis not in sources:
            continue
        if len(sources) == 1 == len(results):
            return results[0], track.atoms
        sizes = [d for d in (before[a] for a in sources) if isinstance(d, int)]
        parts = [d for d in (after[a] for a in results) if isinstance(d, int)]
        if len(sources) == 1 and len(parts) == len(results):
            chosen = _part(node, results, parts)
            table = np.moveaxis(track.atoms.reshape(parts), chosen, 0)
            return results[chosen], found.tie_rows(table.reshape(parts[chosen], -1))
        if len(results) == 1 and len(sizes) == len(sources):
            own = [1] * len(sizes)
            own[sources.index(track.axis)] = len(track.atoms)
            return results[0], np.broadcast_to(track.atoms.reshape(own), sizes).ravel()
    return None


def segments(before: Sequence[Hashable], after: Sequence[Hashable]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes before and after a Reshape that hold the same elements, matched from both ends.

    In row-major order two runs of axes hold the same elements if their sizes have equal products and so have
    all axes before (or after) them. Axes of size 1 are skipped, and so is a middle that cannot be matched.
    """
    left = [a for a, d in enumerate(before) if d != 1]
    right = [a for a, d in enumerate(after) if d != 1]
    front, i, j = _walk(before, after, left, right)
    back, _, _ = _walk(before, after, left[i:][::-1], right[j:][::-1])
    return front + [(sources[::-1], results[::-1]) for sources, results in back]


def _walk(
    before: Sequence[Hashable], after: Sequence[Hashable], left: list[int], right: list[int]
) -> tuple[list[tuple[list[int], list[int]]], int, int]:
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        first, second, m, n = before[left[i]], after[right[j]], i + 1, j + 1
        while first != second and isinstance(first, int) and isinstance(second, int):
            if first < second:
                more, m = (before[left[m]] if m < len(left) else None), m + 1
                first = first * more if isinstance(more, int) else None
            else:
                more, n = (after[right[n]] if n < len(right) else None), n + 1
                second = second * more if isinstance(more, int) else None
        if first != second:
            break
        found.append((left[i:m], right[j:n]))
        i, j = m, n
    return found, i, j


def _part(node: ir.Node, results: Sequence[int], parts: Sequence[int]) -> int:
    """Which of the axes that channels are split into is the new channel axis: that of attention heads, or
    else the longest. Atoms along the others are merged."""
    for number, axis in enumerate(results):
        if parts[number] > 1 and _is_batch(node.outputs[0], axis):
            return number
    return int(np.argmax(parts))


def _is_batch(value: ir.Value, axis: int) -> bool:
    """Whether an axis becomes a batch axis of a later MatMul of two computed values."""
    if value.shape is None:
        return False
    rank = len(value.shape)
    for use in value.uses():
        node, moved = use.node, axis
        if node.op_type == "MatMul" and not any(constant(v) is not None for v in node.inputs):
            return axis < rank - 2
        if node.op_type == "Transpose":
            moved = list(node.attributes.get_ints("perm", tuple(reversed(range(rank))))).index(axis)
        elif node.op_type in ("Gather", "Squeeze"):
            gone = (
                [node.attributes.get_int("axis", 0)] if node.op_type == "Gather" else numbers(node, 1, "axes")
            )
            if gone is None or use.idx or axis in (places := {g % rank for g in gone}):
                continue
            single = node.op_type == "Squeeze" or (
                node.inputs[1] is not None and node.inputs[1].shape == ir.Shape([])
            )
            moved = axis - (sum(p < axis for p in places) if single else 0)
        elif node.op_type not in ("Slice", "Split", "Mul", "Div", "Add", "Softmax"):
            continue
        if any(_is_batch(output, moved) for output in node.outputs):
            return True
    return False
