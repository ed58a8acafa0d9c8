"""Structured pruning: whole channels, neurons and attention heads leave the model, which is smaller and
faster for it on any runtime."""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import onnx_ir as ir

from edgepack.calibrate.run import stream_activations
from edgepack.config_passes import Structured
from edgepack.data import Samples
from edgepack.errors import ConfigError, did_you_mean
from edgepack.model import constant, name_of
from edgepack.passes.channel_rules import find_channels
from edgepack.passes.channels import Atoms, Channels, Group, find_groups
from edgepack.passes.eliminate import Floats, Reader, eliminate, order_of, salience_of
from edgepack.passes.refit import bias_of, refit
from edgepack.passes.slim import Mask, slim
from edgepack.quantize.statistics import stream_moments
from edgepack.quantize.units import Role, Unit
from edgepack.quantize.weights import to_groups, weight_of


@dataclass(frozen=True, slots=True)
class Multiples:
    """What numbers of channels a target's kernels like."""

    dense: int = 1
    depthwise: int = 1


@dataclass(frozen=True, slots=True)
class SlimGroup:
    """Layers whose channels were chosen together."""

    name: str
    channels: int
    left: int
    reason: str
    """Why no more of them could go, where something stood in the way."""


@dataclass(frozen=True, slots=True)
class SlimReport:
    """What structured pruning did. Multiplications are those of one sample."""

    macs_before: int
    macs_after: int
    groups: tuple[SlimGroup, ...]
    fitted: int
    """Layers whose weights were fitted anew."""


@dataclass(slots=True, eq=False)
class _Choice:
    """A group, the order in which its classes go, and the loss when the first 0, 1, ... have gone."""

    group: Group
    order: Atoms
    losses: Floats
    multiple: int
    gone: int = 0

    def next(self, at_most: float) -> int | None:
        """How many classes have gone after the next step down to a multiple; ``None`` if there is none."""
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
        # A group of classes that weigh differently may step over the multiple; it must not end at nothing.
        return gone if left == goal or (0 < left < goal) else None


def prune_structured(
    model: ir.Model,
    samples: Samples,
    config: Structured,
    multiples: Multiples,
    *,
    threads: int,
    seed: int,
    on_sample: Callable[[], None] = lambda: None,
) -> tuple[ir.Model, SlimReport]:
    """A model with fewer channels that does ``config.macs`` of the multiplications, or as few as it can.

    Raises:
        ConfigError: a name to keep that no node has; no channel of the model can go.
        CalibrationError: the model fails on a sample.
    """
    channels = find_channels(model)
    groups = find_groups(channels, _kept_names(channels, config))
    free = [group for group in groups if len(group.classes)]
    if not free:
        reasons = "; ".join(sorted({g.pinned for g in groups})[:3]) or "it has no weights"
        raise ConfigError(f"structured: no channel of the model can go: {reasons}")
    roots = channels.roots()
    choices = [
        _Choice(group, group.classes[order], losses, _multiple(channels, group, roots, config, multiples))
        for group, (order, losses) in zip(
            free, _orders(model, channels, roots, free, samples, config, threads, seed, on_sample), strict=True
        )
    ]
    costs = _Costs(model, channels, samples, threads)
    alive = np.ones(len(roots), np.bool_)
    before = costs.macs(alive)
    _choose(channels, roots, choices, costs, alive, config)
    pruned = slim(model, channels, alive)
    fitted = 0
    if config.reconstruct and not alive.all():
        cut = frozenset(node.name or "" for node, atoms in channels.readers if not alive[atoms].all())
        cut |= {c.node.name or "" for c in channels.cuts if c.node.op_type == "ConvTranspose" and not alive[c.atoms].all()}
        kept = {
            c.node.name or "": np.flatnonzero(alive[c.atoms])
            for c in channels.cuts
            if c.index == 1 and c.axis == _output_axis(c.node) and not alive[c.atoms].all()
        }
        fitted = refit(model, pruned, cut, kept, samples, threads=threads, seed=seed, on_sample=on_sample)
    rows = tuple(
        SlimGroup(g.name, len(g.widest), int(alive[g.widest].sum()), g.pinned) for g in groups
    )
    return pruned, SlimReport(before, costs.macs(alive), rows, fitted)


def _output_axis(node: ir.Node) -> int:
    """The axis of a weight that its outputs are on."""
    if node.op_type == "ConvTranspose" or node.op_type == "MatMul":
        return 1
    return 1 if node.op_type == "Gemm" and not node.attributes.get_int("transB", 0) else 0


def _kept_names(channels: Channels, config: Structured) -> frozenset[str]:
    names = [node.name or "" for node, _ in channels.makers]
    for pattern in config.keep:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"structured: keep: no node that makes channels is named {pattern!r}, {did_you_mean(pattern, names)}"
            )
    return frozenset(n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in config.keep))


def _multiple(
    channels: Channels, group: Group, roots: Atoms, config: Structured, multiples: Multiples
) -> int:
    if config.multiple is not None:
        return config.multiple
    classes = set(group.classes.tolist())
    for cut in channels.cuts:
        groups = cut.node.attributes.get_int("group", 1) if cut.index == 1 else 1
        if groups > 1 and classes & set(roots[cut.atoms].tolist()):
            return max(multiples.dense, multiples.depthwise)
    return multiples.dense


# --- in which order ---------------------------------------------------------------------------------------


def _orders(
    model: ir.Model,
    channels: Channels,
    roots: Atoms,
    groups: Sequence[Group],
    samples: Samples,
    config: Structured,
    threads: int,
    seed: int,
    on_sample: Callable[[], None],
) -> list[tuple[Atoms, Floats]]:
    """Of each group the order of its classes (as positions in ``classes``) and the losses."""
    if config.method in ("l1", "l2"):
        return [order_of(_magnitudes(channels, roots, group, config.method)) for group in groups]
    readers = _readers(model, channels, roots, groups, samples, threads, seed, on_sample)
    found = []
    for group in groups:
        mine = [_owned(reader, read, group) for reader, read in readers if np.isin(group.classes, read).any()]
        if config.method == "activation":
            found.append(order_of(salience_of(mine, len(group.classes))))
        else:
            found.append(eliminate(mine, len(group.classes)))
    return found


def _magnitudes(channels: Channels, roots: Atoms, group: Group, method: str) -> Floats:
    """Of each class the share of the weights that make it, by magnitude or square."""
    place = {int(c): i for i, c in enumerate(group.classes)}
    costs = np.zeros(len(group.classes), np.float32)
    for cut in channels.cuts:
        if cut.node not in group.makers or cut.index != 1 or cut.axis != _output_axis(cut.node):
            continue
        weight = np.abs(np.moveaxis(weight_of(cut.node), cut.axis, 0)).reshape(len(cut.atoms), -1)
        rows = (weight if method == "l1" else weight**2).sum(1)
        for root, share in zip(roots[cut.atoms].tolist(), rows / max(float(rows.sum()), 1e-12), strict=True):
            if root in place:
                costs[place[root]] += share
    return costs


def _readers(
    model: ir.Model,
    channels: Channels,
    roots: Atoms,
    groups: Sequence[Group],
    samples: Samples,
    threads: int,
    seed: int,
    on_sample: Callable[[], None],
) -> list[tuple[Reader, Atoms]]:
    """Readers of channels that may go, each with the root of every input."""
    free = np.concatenate([group.classes for group in groups])
    wanted = [(node, roots[atoms]) for node, atoms in channels.readers if np.isin(roots[atoms], free).any()]
    units = [
        Unit(name=node.name or "", op_type=node.op_type, role=Role.HEAVY, inputs=(name_of(node.inputs[0]),), outputs=())
        for node, _ in wanted
        if node.op_type != "ConvTranspose" and node.inputs[0] is not None
    ]
    second = {}
    for unit, moments in stream_moments(
        model, units, samples, second_order=True, threads=threads, seed=seed, on_sample=on_sample
    ):
        second[unit.name] = moments
    found = []
    for node, read in wanted:
        weight = _columns(node)
        taps = weight.shape[1] // len(read)
        moments_of = second.get(node.name or "")
        if moments_of is None or moments_of.second is None:
            # Moments of transposed convolutions and of very wide inputs are not measured: all inputs alike.
            table = np.eye(weight.shape[1], dtype=np.float32)
        else:
            table = moments_of.second[0]
            if bias_of(node) is not None:
                table = table - np.outer(moments_of.mean[0], moments_of.mean[0])
        found.append((Reader(weight, table, np.repeat(read, taps)), read))
    return found


def _columns(node: ir.Node) -> Floats:
    """A weight as [M, K], the inputs of one channel beside each other."""
    weight = weight_of(node)
    if node.op_type == "ConvTranspose":
        return weight.reshape(len(weight), -1).T
    return to_groups(node, weight)[0]


def _owned(reader: Reader, read: Atoms, group: Group) -> Reader:
    """The reader with positions in the group's classes in place of roots."""
    place = np.searchsorted(group.classes, reader.owner)
    place = np.clip(place, 0, len(group.classes) - 1)
    return replace(reader, owner=np.where(group.classes[place] == reader.owner, place, -1))


# --- how many ---------------------------------------------------------------------------------------------


class _Costs:
    """Multiplications of a model for one sample, by which channels are alive."""

    def __init__(self, model: ir.Model, channels: Channels, samples: Samples, threads: int) -> None:
        factors: dict[ir.Node, tuple[Atoms, ...]] = {p.node: p.factors for p in channels.products}
        heavy = [n for n in model.graph if n.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
        names = [name_of(v) for n in heavy for v in (n.inputs[0], n.outputs[0]) if v is not None]
        arrays: dict[str, np.ndarray] = {}
        computed = [n for n in dict.fromkeys(names) if n not in model.graph.initializers]
        for _, arrays in stream_activations(model, samples.spread(1), computed, threads=threads):
            break
        self.terms = []
        for node in heavy:
            macs = _macs(node, arrays)
            mine = factors.get(node, ())
            self.terms.append((macs / max(prod(len(a) for a in mine), 1), mine))

    def macs(self, alive: Mask) -> int:
        """In all."""
        return round(sum(scale * prod(int(alive[a].sum()) for a in atoms) for scale, atoms in self.terms))


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


def _choose(
    channels: Channels,
    roots: Atoms,
    choices: Sequence[_Choice],
    costs: _Costs,
    alive: Mask,
    config: Structured,
) -> None:
    """Clear in ``alive`` what costs least for each multiplication saved, until the target is met."""
    reach = [_Reach(channels, roots, choice, costs) for choice in choices]
    now = float(costs.macs(alive))
    target = config.macs * now
    prices: dict[int, tuple[float, int, Mask, float]] = {}
    while now > target:
        for place, choice in enumerate(choices):
            if place not in prices and (gone := choice.next(config.at_most)) is not None:
                without = reach[place].without(alive, choice.order[choice.gone : gone])
                saved = reach[place].saved(alive, without)
                if saved > 0 and reach[place].leaves_some(without):
                    loss = float(choice.losses[gone] - choice.losses[choice.gone])
                    prices[place] = loss / saved, gone, without, saved
        if not prices:
            return
        place = min(prices, key=lambda p: prices[p][0])
        _, choices[place].gone, without, saved = prices[place]
        changed = alive & ~without
        alive &= without
        now -= saved
        prices = {p: found for p, found in prices.items() if not reach[p].meets(changed) and p != place}


class _Reach:
    """What a group's channels have a part in."""

    def __init__(self, channels: Channels, roots: Atoms, choice: _Choice, costs: _Costs) -> None:
        mine = np.zeros(len(roots), np.bool_)
        mine[np.isin(roots, choice.order)] = True
        self.members = {int(root): np.flatnonzero(roots == root) for root in choice.order.tolist()}
        self.tracks = [t.atoms for t in channels.tracks.values() if mine[t.atoms].any()]
        self.terms = [(scale, f) for scale, f in costs.terms if any(mine[a].any() for a in f)]

    def without(self, alive: Mask, classes: Atoms) -> Mask:
        """``alive`` less the atoms of ``classes``."""
        left = alive.copy()
        for root in classes.tolist():
            left[self.members[root]] = False
        return left

    def saved(self, alive: Mask, without: Mask) -> float:
        """Multiplications."""
        return sum(
            scale * (prod(int(alive[a].sum()) for a in f) - prod(int(without[a].sum()) for a in f))
            for scale, f in self.terms
        )

    def leaves_some(self, without: Mask) -> bool:
        """Whether every value has a channel left."""
        return all(without[atoms].any() for atoms in self.tracks)

    def meets(self, changed: Mask) -> bool:
        """Whether what these channels save depends on the atoms ``changed``."""
        return any(changed[a].any() for _, f in self.terms for a in f) or any(
            changed[a].any() for a in self.tracks
        )
