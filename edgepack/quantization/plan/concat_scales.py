"""Shared concat scales: inputs and output of a Concat get one scale, so that it only copies.

onnxruntime's kernel requantizes an input by table look-up where its scale differs from that of the output:
33 µs for two inputs of [1, 64, 40, 40], one of them of another scale, and 13 where all are equal. The common
range is wider and so has coarser steps: this is a candidate that is measured, not a rule.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from edgepack.calibration.ranges import Range
from edgepack.quantization.groups import FusionGroup, Role, activation_bounds

LEAST_SHARE = 0.25
"""Least share of the common range that each tensor must use: a quarter costs it 12 dB."""


@dataclass(frozen=True, slots=True)
class _Member:
    """Range of an output of a group, and the bounds of the activation in the group."""

    low: float
    high: float
    floor: float
    ceiling: float


def shared_ranges(
    groups: Sequence[FusionGroup],
    nodes: Mapping[str | None, ir.Node],
    ranges: Mapping[str, Range],
    concats: Collection[str],
    fixed: Collection[str],
) -> dict[str, Range]:
    """``ranges`` in which inputs and output of each Concat in ``concats`` have one common range.

    ``groups``: those with static precision, in topological order; ``concats``: names of Concat groups;
    ``fixed``: operators whose outputs have a fixed range. A Concat is left as it is where a tensor would use
    too little of the common range, or where an activation clips it to less.
    """
    joined = {name: frozenset([name]) for group in groups for name in (*group.inputs, *group.outputs)}
    members: dict[str, _Member] = {}
    for group in groups:
        if group.role is Role.MOVE:
            _join(joined, (*group.inputs, *group.outputs))
        elif group.op_type not in fixed:
            members.update(_members(group, nodes, ranges))
    new = dict(ranges)
    for group in groups:
        if group.name not in concats:
            continue
        together = frozenset[str]().union(*(joined[n] for n in (*group.inputs, *group.outputs)))
        moved = {n for u in groups if u.role is Role.MOVE for n in u.outputs}
        found = [members.get(n) for n in sorted(together - moved)]
        common = _common([m for m in found if m is not None])
        if None in found or common is None:
            continue
        _join(joined, sorted(together))
        for name in together & set(ranges):
            new[name] = replace(ranges[name], low=common[0], high=common[1])
    return new


def _join(joined: dict[str, frozenset[str]], names: Sequence[str]) -> None:
    together = frozenset[str]().union(*(joined[name] for name in names))
    for name in together:
        joined[name] = together


def _members(
    group: FusionGroup, nodes: Mapping[str | None, ir.Node], ranges: Mapping[str, Range]
) -> Iterator[tuple[str, _Member]]:
    floor, ceiling = (-float("inf"), float("inf"))
    if group.activation is not None:
        floor, ceiling = activation_bounds(nodes[group.activation])
    for name in group.outputs:
        if name in ranges:
            low, high = max(ranges[name].low, floor), min(ranges[name].high, ceiling)
            yield name, _Member(min(low, high), high, floor, ceiling)


def _common(members: Sequence[_Member]) -> tuple[float, float] | None:
    """The range that covers all; ``None`` where it does not suit one of them."""
    low, high = min(m.low for m in members), max(m.high for m in members)
    wide = (high - low) * LEAST_SHARE
    fits = all(m.high - m.low >= wide and m.floor <= low and m.ceiling >= high for m in members)
    return (low, high) if fits else None
