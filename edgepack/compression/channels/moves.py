"""Channel rules of operators that move data; see :mod:`edgepack.compression.channels.atoms`."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from edgepack.compression.channels.atoms import Channels, Track, label, numbers, tracked
from edgepack.compression.channels.reshape import reshape
from edgepack.ir.model import constant


def _transpose(found: Channels, node: ir.Node) -> None:
    if (known := tracked(found, node)) is not None:
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
        found.pin_inputs(node, "concatenates them along another axis")
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
    if (known := tracked(found, node)) is None:
        return
    x, track, rank = known
    axis = node.attributes.get_int("axis", 0) % rank
    if axis != track.axis:
        for value in node.outputs:
            found.track(value, track.axis, track.atoms)
        return
    sizes = numbers(node, 1, "split") or [found.size(v, axis) or 0 for v in node.outputs]
    if sum(sizes) != len(track.atoms):
        found.pin(x, f"{label(node)} splits into unknown sizes")
        return
    ends = np.cumsum(sizes)
    for value, start, end in zip(node.outputs, ends - sizes, ends, strict=True):
        found.track(value, axis, track.atoms[start:end])


def slice_of(node: ir.Node, axis: int, rank: int) -> slice | None:
    """The slice that a Slice takes of an axis; ``None`` if it is not constant."""
    starts, ends = numbers(node, 1), numbers(node, 2)
    if starts is None or ends is None:
        return None
    given = len(node.inputs) > 3 and node.inputs[3] is not None
    axes = numbers(node, 3) if given else list(range(len(starts)))
    stepped = len(node.inputs) > 4 and node.inputs[4] is not None
    steps = numbers(node, 4) if stepped else [1] * len(starts)
    if axes is None or steps is None:
        return None
    for start, end, at, step in zip(starts, ends, axes, steps, strict=True):
        if at % rank == axis:
            return slice(start, end, step)
    return slice(None)


def _slice(found: Channels, node: ir.Node) -> None:
    if (known := tracked(found, node)) is None:
        return
    x, track, rank = known
    taken = slice_of(node, track.axis, rank)
    if taken is None or taken.step not in (None, 1):
        found.pin(x, f"{label(node)} slices its channels with unknown bounds, or with a step")
        return
    atoms = track.atoms[taken]
    if not len(atoms):
        found.pin(x, f"{label(node)} has an empty result")
        return
    found.track(node.outputs[0], track.axis, atoms)


def _gather(found: Channels, node: ir.Node) -> None:
    if (known := tracked(found, node)) is None:
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
        found.pin(x, f"{label(node)} gathers its channels by indices that are not constant, or a single one")
        return
    found.track(node.outputs[0], axis, track.atoms[wanted])


def _depth_to_space(found: Channels, node: ir.Node) -> None:
    if (known := tracked(found, node)) is None:
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
    if (known := tracked(found, node)) is None:
        return
    x, track, _ = known
    if track.axis != 1:
        found.pin(x, f"{label(node)} has its channels along another axis")
        return
    found.track(node.outputs[0], 1, np.tile(track.atoms, node.attributes.get_int("blocksize", 1) ** 2))


def _pad(found: Channels, node: ir.Node) -> None:
    if (known := tracked(found, node)) is None:
        return
    x, track, rank = known
    pads = numbers(node, 1)
    axes = list(range(rank))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        given = numbers(node, 3)
        pads, axes = (None, axes) if given is None else (pads, [a % rank for a in given])
    at = axes.index(track.axis) if track.axis in axes else None
    if pads is None or (at is not None and (pads[at] or pads[at + len(axes)])):
        found.pin(x, f"{label(node)} pads its channels")
        return
    found.track(node.outputs[0], track.axis, track.atoms)


def _resize(found: Channels, node: ir.Node) -> None:
    if (known := tracked(found, node)) is None:
        return
    x, track, rank = known
    axes = [a % rank for a in node.attributes.get_ints("axes", tuple(range(rank)))]
    scales = numbers(node, 2) if len(node.inputs) > 2 else None
    if scales is not None:
        content = constant(node.inputs[2])
        whole = content is not None and (
            track.axis not in axes or float(content.reshape(-1)[axes.index(track.axis)]) == 1
        )
    else:
        sizes = numbers(node, 3)
        whole = sizes is not None and (
            track.axis not in axes or sizes[axes.index(track.axis)] == len(track.atoms)
        )
    cropped = (
        node.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    )
    if not whole or cropped or node.attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        found.pin(x, f"{label(node)} resizes its channels, or to an unknown size")
        return
    found.track(node.outputs[0], track.axis, track.atoms)


def _shape(found: Channels, node: ir.Node) -> None:
    """Shape: pins the channels unless only the sizes of other axes are gathered."""
    if (known := tracked(found, node)) is None:
        return
    x, track, rank = known
    start = node.attributes.get_int("start", 0)
    start = max(start + rank, 0) if start < 0 else start
    for use in node.outputs[0].uses():
        taken = constant(use.node.inputs[1]) if use.node.op_type == "Gather" and use.idx == 0 else None
        if taken is None or track.axis - start in {int(i) % (rank - start) for i in taken.reshape(-1)}:
            found.pin(x, f"{label(node)} returns the number of channels")


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
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), reshape),
}
