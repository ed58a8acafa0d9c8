"""Chooses how many channels of each group are pruned: greedily by loss per saved work."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from edgepack.calibration.run import stream_activations
from edgepack.compression.channels.atoms import Atoms, Channels, Group, Mask
from edgepack.compression.eliminate import Floats
from edgepack.data.samples import Samples
from edgepack.ir.model import constant, name_of


@dataclass(slots=True, eq=False)
class Choice:
    """A group, the pruning order of its classes, and the loss after 0, 1, ... of them are pruned."""

    group: Group
    order: Atoms
    losses: Floats
    multiple: int
    gone: int = 0

    def next(self, at_most: float) -> int | None:
        """Number of pruned classes after the next step down to a multiple; ``None`` if there is none."""
        weights = np.bincount(self.group.widest, minlength=int(self.order.max()) + 1)[self.order]
        total = len(self.group.widest)
        left = total - int(weights[: self.gone].sum())
        goal = (left - 1) // self.multiple * self.multiple
        if goal < max(self.multiple, round(total * (1 - at_most)), 1):
            return None
        gone = self.gone
        while gone < len(self.order) and left > goal:
            left -= int(weights[gone])
            gone += 1
        # Classes of different sizes may step over the multiple, but at least one channel must remain.
        return gone if left == goal or (0 < left < goal) else None


Terms = list[tuple[float, tuple[Atoms, ...]]]
"""Summands of a cost: a number times the remaining channels of each of the factors."""

MOVED = 10.0
"""Cost of reading one input or writing one output of a layer, in multiplications, for int8 kernels on one
core with VNNI: a depthwise convolution takes ten times as long for each multiplication as a dense one."""


class Costs:
    """Multiplications of a model for one sample as a function of the remaining channels, and its work:
    multiplications plus memory traffic in the same unit."""

    def __init__(self, model: ir.Model, channels: Channels, samples: Samples, threads: int) -> None:
        factors: dict[ir.Node, tuple[Atoms, ...]] = {p.node: p.factors for p in channels.products}
        heavy = [n for n in model.graph if n.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
        names = [name_of(v) for n in heavy for v in (n.inputs[0], n.outputs[0]) if v is not None]
        computed = [n for n in dict.fromkeys(names) if n not in model.graph.initializers]
        ((_, arrays),) = stream_activations(model, samples.spread(1), computed, threads=threads)
        self.terms: Terms = []
        self.work: Terms = []
        for node in heavy:
            macs, mine = _macs(node, arrays), factors.get(node, ())
            self.terms.append((macs / max(prod(len(a) for a in mine), 1), mine))
            written = arrays[name_of(node.outputs[0])].size
            self.work.extend(_moves(node, macs, written, mine))
        self.work.extend(self.terms)

    def macs(self, alive: Mask) -> int:
        """Total number of multiplications."""
        return round(_sum(self.terms, alive))


def _moves(node: ir.Node, macs: float, written: int, factors: tuple[Atoms, ...]) -> Terms:
    """Cost of memory traffic. All outputs of a dense layer read the same inputs; each output of a depthwise
    convolution reads its own inputs, one for each multiplication."""
    if not factors:
        return []
    out = MOVED * written / len(factors[-1]), factors[-1:]
    if len(factors) > 1:
        return [out, (MOVED * macs / (len(factors[0]) * len(factors[1])), factors[:1])]
    apart = node.attributes.get_int("group", 1) > 1
    return [out, (MOVED * macs / len(factors[0]), factors)] if apart else [out]


def _sum(terms: Terms, alive: Mask) -> float:
    return sum(scale * prod(int(alive[a].sum()) for a in atoms) for scale, atoms in terms)


def _macs(node: ir.Node, arrays: dict[str, np.ndarray]) -> float:
    source, weight = node.inputs[0], constant(node.inputs[1])
    outputs = arrays[name_of(node.outputs[0])]
    if node.op_type == "Conv" and weight is not None:
        return float(outputs.size * prod(weight.shape[1:]))
    assert source is not None
    known = constant(source)
    inputs = arrays[name_of(source)] if known is None else known
    if node.op_type == "ConvTranspose" and weight is not None:
        return float(inputs.size * prod(weight.shape[1:]))
    return float(outputs.size * inputs.shape[0 if node.attributes.get_int("transA", 0) else -1])


def choose(
    channels: Channels,
    choices: Sequence[Choice],
    costs: Costs,
    alive: Mask,
    macs: float,
    at_most: float,
) -> None:
    """Clear classes in ``alive`` by least loss per saved work, until the share ``macs`` of the
    multiplications remains or nothing more can be pruned."""
    roots = channels.roots()
    reach = [_Reach(channels, roots, choice, costs) for choice in choices]
    now = float(costs.macs(alive))
    target = macs * now
    prices: dict[int, tuple[float, int, Mask, float]] = {}
    while now > target:
        for place, choice in enumerate(choices):
            if place not in prices and (gone := choice.next(at_most)) is not None:
                without = reach[place].without(alive, choice.order[choice.gone : gone])
                saved = _saved(reach[place].terms, alive, without)
                if saved > 0 and reach[place].leaves_some(without):
                    loss = float(choice.losses[gone] - choice.losses[choice.gone])
                    work = _saved(reach[place].work, alive, without)
                    prices[place] = loss / work, gone, without, saved
        if not prices:
            return
        place = min(prices, key=lambda p: prices[p][0])
        _, choices[place].gone, without, saved = prices[place]
        changed = alive & ~without
        alive &= without
        now -= saved
        prices = {p: found for p, found in prices.items() if not reach[p].meets(changed) and p != place}


def _saved(terms: Terms, alive: Mask, without: Mask) -> float:
    return _sum(terms, alive) - _sum(terms, without)


class _Reach:
    """The summands that depend on the channels of a group."""

    def __init__(self, channels: Channels, roots: Atoms, choice: Choice, costs: Costs) -> None:
        mine = np.zeros(len(roots), np.bool_)
        mine[np.isin(roots, choice.order)] = True
        self.members = {int(root): np.flatnonzero(roots == root) for root in choice.order.tolist()}
        self.tracks = [t.atoms for t in channels.tracks.values() if mine[t.atoms].any()]
        self.terms, self.work = (
            [(scale, f) for scale, f in terms if any(mine[a].any() for a in f)]
            for terms in (costs.terms, costs.work)
        )

    def without(self, alive: Mask, classes: Atoms) -> Mask:
        """``alive`` less the atoms of ``classes``."""
        left = alive.copy()
        for root in classes.tolist():
            left[self.members[root]] = False
        return left

    def leaves_some(self, without: Mask) -> bool:
        """Whether every value keeps at least one channel."""
        return all(without[atoms].any() for atoms in self.tracks)

    def meets(self, changed: Mask) -> bool:
        """Whether the work that these channels save depends on the atoms ``changed``."""
        return any(changed[a].any() for _, f in self.terms for a in f) or any(
            changed[a].any() for a in self.tracks
        )
