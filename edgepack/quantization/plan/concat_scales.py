"""Ties: what a concatenation reads and gives gets one scale, so that it copies and recomputes nothing.

onnxruntime's kernel looks every integer up in a table where the scale is not that of the result: 33 µs for
two inputs of [1, 64, 40, 40], one of them of another scale, and 13 where all are equal. A wider range is
coarser, so this is a form that is measured like others, not a rule.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from edgepack.calibration.ranges import Range
from edgepack.quantization.groups import FusionGroup, Role, activation_bounds

LEAST_SHARE = 0.25
"""Of the common range that each of its members must use: a quarter costs it 12 dB."""


@dataclass(frozen=True, slots=True)
class _Member:
    """A value that a group computes, with the range it has and the one that its activation allows."""

    low: float
    high: float
    floor: float
    ceiling: float


def shared_ranges(
    groups: Sequence[FusionGroup],
    nodes: Mapping[str | None, ir.Node],
    ranges: Mapping[str, Range],
    tied: Collection[str],
    fixed: Collection[str],
) -> dict[str, Range]:
    """``ranges`` in which everything that a concatenation of ``tied`` reads or gives has the same.

    ``groups``: those with static integers, in topological order; ``tied``: names of concatenations;
    ``fixed``: operators whose outputs have a range of their own. A concatenation one of whose members would
    use too little of the common range, or whose activation ends before it, stays as it is.
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
        if group.name not in tied:
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
    """The range that holds all; ``None`` where it does not do for one of them."""
    low, high = min(m.low for m in members), max(m.high for m in members)
    wide = (high - low) * LEAST_SHARE
    fits = all(m.high - m.low >= wide and m.floor <= low and m.ceiling >= high for m in members)
    return (low, high) if fits else None
