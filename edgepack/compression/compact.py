"""Removes channels that no weight consumes; the outputs do not change.

Given (the weights that consume channel 1 of ``h`` are zero)::

    x -> Conv(w [2, 3, 1, 1], b [2]) -> h -> Conv(v [5, 2, 1, 1], v[:, 1] = 0) -> y

Result::

    x -> Conv(w [1, 3, 1, 1], b [1]) -> h -> Conv(v [5, 1, 1, 1]) -> y
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepack.compression.channel_choice import Choice
from edgepack.compression.channels.atoms import Atoms, Channels, Mask, find_groups
from edgepack.compression.channels.rules import find_channels
from edgepack.compression.slim import slim
from edgepack.compression.structured import Multiples, multiple_of
from edgepack.config.passes import Compact
from edgepack.quantization.weights.matrix import weight_of


@dataclass(frozen=True, slots=True)
class CompactReport:
    """Numbers of removed, removable and unused channels."""

    channels: int
    unread: int
    gone: int


def compact(model: ir.Model, config: Compact, multiples: Multiples) -> tuple[ir.Model, CompactReport]:
    """A model without the channels whose consuming weights are all zero.

    Each layer keeps a number of channels that is a multiple preferred by the kernels.
    """
    channels = find_channels(model)
    roots = channels.roots()
    silent = _silent(channels, roots)
    alive, free, unread, gone = np.ones(len(roots), np.bool_), 0, 0, 0
    for group in find_groups(channels):
        order = group.classes[silent[group.classes]]
        free, unread = free + len(group.classes), unread + len(order)
        if not len(order):
            continue
        multiple = multiple_of(channels, group, roots, config.multiple, multiples)
        choice = Choice(group, order, np.zeros(len(order) + 1, np.float32), multiple)
        while (further := choice.next(at_most=1.0)) is not None:
            choice.gone = further
        alive[np.isin(roots, order[: choice.gone])] = False
        gone += choice.gone
    for track in channels.tracks.values():
        if not alive[track.atoms].any():
            alive[roots == roots[track.atoms[0]]] = True
            gone -= 1
    return slim(model, channels, alive), CompactReport(free, unread, gone)


def _silent(channels: Channels, roots: Atoms) -> Mask:
    """Mask of the roots that no weight consumes [atoms]."""
    silent = np.ones(len(roots), np.bool_)
    for node, read in channels.consumers:
        axis = next(c.axis for c in channels.cuts if c.node is node and c.index == 1 and c.atoms is read)
        weight = np.moveaxis(weight_of(node), axis, 0).reshape(len(read), -1)
        silent[roots[read[weight.any(1)]]] = False
    return silent


def compact_notes(report: CompactReport) -> list[str]:
    """Notes for the report."""
    notes = [f"{report.gone} of {report.channels} channels removed, no weight uses them"]
    if report.unread > report.gone:
        notes.append(f"{report.unread - report.gone} more are unused and stay: kernels prefer multiples")
    return notes
