"""What operators that move data do to channels; see :mod:`edgepack.compression.channels.atoms`."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
import onnx_ir as ir

from edgepack.compression.channels.atoms import Atoms, Channels, Track, label
from edgepack.ir.model import constant, only_consumer


def _tracked(found: Channels, node: ir.Node) -> tuple[ir.Value, Track, int] | None:
    """The first input, its channels and its rank; others are pinned, and all are where that is unknown."""
    x = node.inputs[0]
    for value in node.inputs[1:]:
        found.pin(value, f"{label(node)} reads it as a setting")
    if x is None or x.shape is None or x not in found.tracks:
        return None
    return x, found.tracks[x], len(x.shape)


def _numbers(node: ir.Node, index: int, attribute: str = "") -> list[int] | None:
    """Integers in a constant operand, or in an attribute that took its place in older opsets."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        found = node.attributes.get_ints(attribute, ()) if attribute else ()
        return list(found) or None
    held = constant(value)
    return None if held is None else [int(n) for n in held.reshape(-1)]


def _transpose(found: Channels, node: ir.Node) -> None:
    if (known := _tracked(found, node)) is not None:
        _, track, rank = known
        order = list(node.attributes.get_ints("perm", tuple(reversed(range(rank)))))
        found.track(node.outputs[0], order.index(track.axis), track.atoms)


def _concat(found: Channels, node: ir.Node) -> None:
    values = [v for v in node.inputs if v is not None]
    output = node.outputs[0]
    if output.shape is None:
        found.pin_inputs(node, "has a result of unknown rank")
        return
    axis = node.attributes.get_int("axis", 0) % len(output.shape)
    tracks = [found.tracks.get(v) for v in values]
    sizes = [found.size(v, axis) for v in values]
    if all(t is not None and t.axis != axis and t.axis == _axis(tracks) for t in tracks):
        whole = [t.atoms for t in tracks if t is not None]
        if len({len(atoms) for atoms in whole}) == 1:
            for other in whole[1:]:
                found.tie(whole[0], other)
            found.track(output, _axis(tracks), whole[0])
            return
    if any(t is not None and t.axis != axis for t in tracks) or None in sizes:
        found.pin_inputs(node, "joins them along another axis with others")
        return
    pieces = []
    for value, track, size in zip(values, tracks, sizes, strict=True):
        if track is None:
            fixed = found.fresh(size or 0)
            found.pin_atoms(fixed, f"{label(node)} reads {value.name!r}, which has no channels")
            pieces.append(fixed)
        else:
            pieces.append(track.atoms)
    found.track(output, axis, np.concatenate(pieces))


def _axis(tracks: Sequence[Track | None]) -> int:
    return next((t.axis for t in tracks if t is not None), -1)


def _split(found: Channels, node: ir.Node) -> None:
    if (known := _tracked(found, node)) is None:
        return
    x, track, rank = known
    axis = node.attributes.get_int("axis", 0) % rank
    if axis != track.axis:
        for value in node.outputs:
            found.track(value, track.axis, track.atoms)
        return
    sizes = _numbers(node, 1, "split") or [found.size(v, axis) or 0 for v in node.outputs]
    if sum(sizes) != len(track.atoms):
        found.pin(x, f"{label(node)} splits into unknown sizes")
        return
    ends = np.cumsum(sizes)
    for value, start, end in zip(node.outputs, ends - sizes, ends, strict=True):
        found.track(value, axis, track.atoms[start:end])


def slice_of(node: ir.Node, axis: int, rank: int) -> slice | None:
    """What a Slice takes of an axis: a slice, all of it where it says nothing; ``None`` where unknown."""
    starts, ends = _numbers(node, 1), _numbers(node, 2)
    if starts is None or ends is None:
        return None
    given = len(node.inputs) > 3 and node.inputs[3] is not None
    axes = _numbers(node, 3) if given else list(range(len(starts)))
    stepped = len(node.inputs) > 4 and node.inputs[4] is not None
    steps = _numbers(node, 4) if stepped else [1] * len(starts)
    if axes is None or steps is None:
        return None
    for start, end, at, step in zip(starts, ends, axes, steps, strict=True):
        if at % rank == axis:
            return slice(start, end, step)
    return slice(None)


def _slice(found: Channels, node: ir.Node) -> None:
    if (known := _tracked(found, node)) is None:
        return
    x, track, rank = known
    taken = slice_of(node, track.axis, rank)
    if taken is None or taken.step not in (None, 1):
        found.pin(x, f"{label(node)} takes of its channels what is not known before, or not in a row")
        return
    atoms = track.atoms[taken]
    if not len(atoms):
        found.pin(x, f"{label(node)} takes nothing")
        return
    found.track(node.outputs[0], track.axis, atoms)


def _gather(found: Channels, node: ir.Node) -> None:
    if (known := _tracked(found, node)) is None:
        return
    x, track, rank = known
    axis = node.attributes.get_int("axis", 0) % rank
    indices = node.inputs[1]
    if axis != track.axis and indices is not None and indices.shape is not None:
        moved = track.axis + (len(indices.shape) - 1 if track.axis > axis else 0)
        found.track(node.outputs[0], moved, track.atoms)
        return
    wanted = constant(indices)
    if axis != track.axis or wanted is None or wanted.ndim != 1 or not wanted.size:
        found.pin(x, f"{label(node)} takes of its channels what is not known before, or a single one")
        return
    found.track(node.outputs[0], axis, track.atoms[wanted])


def _depth_to_space(found: Channels, node: ir.Node) -> None:
    if (known := _tracked(found, node)) is None:
        return
    x, track, _ = known
    if track.axis != 1:
        found.pin(x, f"{label(node)} has its channels along another axis")
        return
    block = node.attributes.get_int("blocksize", 1) ** 2
    if node.attributes.get_string("mode", "DCR") == "DCR":
        atoms = found.tie_rows(track.atoms.reshape(block, -1).T)
    else:
        atoms = found.tie_rows(track.atoms.reshape(-1, block))
    found.track(node.outputs[0], 1, atoms)


def _space_to_depth(found: Channels, node: ir.Node) -> None:
    if (known := _tracked(found, node)) is None:
        return
    x, track, _ = known
    if track.axis != 1:
        found.pin(x, f"{label(node)} has its channels along another axis")
        return
    found.track(node.outputs[0], 1, np.tile(track.atoms, node.attributes.get_int("blocksize", 1) ** 2))


def _pad(found: Channels, node: ir.Node) -> None:
    if (known := _tracked(found, node)) is None:
        return
    x, track, rank = known
    pads = _numbers(node, 1)
    axes = list(range(rank))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        given = _numbers(node, 3)
        pads, axes = (None, axes) if given is None else (pads, [a % rank for a in given])
    at = axes.index(track.axis) if track.axis in axes else None
    if pads is None or (at is not None and (pads[at] or pads[at + len(axes)])):
        found.pin(x, f"{label(node)} pads its channels")
        return
    found.track(node.outputs[0], track.axis, track.atoms)


def _resize(found: Channels, node: ir.Node) -> None:
    if (known := _tracked(found, node)) is None:
        return
    x, track, rank = known
    axes = [a % rank for a in node.attributes.get_ints("axes", tuple(range(rank)))]
    scales = _numbers(node, 2) if len(node.inputs) > 2 else None
    if scales is not None:
        held = constant(node.inputs[2])
        whole = held is not None and (
            track.axis not in axes or float(held.reshape(-1)[axes.index(track.axis)]) == 1
        )
    else:
        sizes = _numbers(node, 3)
        whole = sizes is not None and (
            track.axis not in axes or sizes[axes.index(track.axis)] == len(track.atoms)
        )
    cropped = (
        node.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    )
    if not whole or cropped or node.attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        found.pin(x, f"{label(node)} resizes across its channels, or to what is not known before")
        return
    found.track(node.outputs[0], track.axis, track.atoms)


def _shape(found: Channels, node: ir.Node) -> None:
    """Sizes of axes that are no channels do not change."""
    if (known := _tracked(found, node)) is None:
        return
    x, track, rank = known
    start = node.attributes.get_int("start", 0)
    start = max(start + rank, 0) if start < 0 else start
    for use in node.outputs[0].uses():
        taken = constant(use.node.inputs[1]) if use.node.op_type == "Gather" and use.idx == 0 else None
        if taken is None or track.axis - start in {int(i) % (rank - start) for i in taken.reshape(-1)}:
            found.pin(x, f"{label(node)} is asked for the number of channels")


# --- reshaping -------------------------------------------------------------------------------------------


def shape_entries(node: ir.Node) -> list[int | None] | None:
    """The shape that a Reshape is given; entries that are computed are ``None``; all are if not even their
    number is known."""
    value = node.inputs[1]
    held = constant(value)
    if held is not None:
        return [int(n) for n in held]
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
    """Sizes: numbers, names of free sizes, and for unknown ones an object that equals no other."""
    assert value.shape is not None
    return [d if isinstance(d, int) else (d.value or object()) for d in value.shape]


def _asked_for(value: ir.Value) -> int | None:
    """The size of the last axis that the only reader, a matrix product, needs."""
    reader = only_consumer(value)
    matrix = constant(reader.inputs[1]) if reader is not None and reader.op_type == "MatMul" else None
    return matrix.shape[0] if matrix is not None and matrix.ndim == 2 else None


def _reshape(found: Channels, node: ir.Node) -> None:
    if (known := _tracked(found, node)) is None:
        return
    x, track, _ = known
    output = node.outputs[0]
    entries = shape_entries(node) if node.op_type == "Reshape" else []
    if output.shape is None or entries is None or node.attributes.get_int("allowzero", 0) > 0:
        found.pin(x, f"{label(node)} gives it a shape that is not known before")
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
    """Whether a Reshape whose channels move from one axis to another can be given the new number."""
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
    """Where the channels are afterwards, and their atoms; ``None`` if that cannot be told."""
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
    """Axes before and after a Reshape that hold the same elements, from the front and from the back.

    In row-major order a run of axes holds what another holds when their products are equal and those of all
    axes before them (or behind them) are. Axes of size 1 do not matter and are left out. A middle that
    cannot be told is left out too.
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
    """Which of the axes that channels become has the channels from now on: that of attention heads, or else
    the longest. The others are tied."""
    for number, axis in enumerate(results):
        if parts[number] > 1 and _is_batch(node.outputs[0], axis):
            return number
    return int(np.argmax(parts))


def _is_batch(value: ir.Value, axis: int) -> bool:
    """Whether an axis numbers the products of a MatMul of two computed values further on."""
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
                [node.attributes.get_int("axis", 0)]
                if node.op_type == "Gather"
                else _numbers(node, 1, "axes")
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


MOVES: dict[str, Callable[[Channels, ir.Node], None]] = {
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Pad": _pad,
    "Resize": _resize,
    "Shape": _shape,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
}
