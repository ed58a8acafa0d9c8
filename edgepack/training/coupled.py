"""Whole channels, as training takes them out: what belongs to each of them among what is trained.

A channel is out when nothing reads it. While choices are made anew, the weights that read it are masked and
what makes it goes on as it is: masked on both sides, neither would have a gradient, and nothing could tell
whether the channel should come back. After the last choice all that belongs to it is zero, the weights and
biases that make it and its entries in depthwise convolutions and normalizations among them, and the channel
can leave the graph.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgepack.compression.channels.atoms import Channels, Cut, find_groups, label
from edgepack.compression.channels.rules import find_channels
from edgepack.errors import ConfigError
from edgepack.graph.shape_inference import infer_shapes
from edgepack.ir.model import clone
from edgepack.training.held import Parameters
from edgepack.training.step import spread
from edgepack.training.weights import PRODUCTS, Kind, Trainable, keys_of, source_of, trainables

SMALLEST = 1e-30


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Along ``axis`` of the trained tensor ``key`` the class [size of the axis] of each position, -1 where
    channels stay."""

    key: str
    axis: int
    classes: Tensor
    weight: bool
    """Multiplied with activations, so that it counts."""
    reading: bool
    """Whether the channels are those that a weight reads."""

    def sums(self, tensor: Tensor) -> Tensor:
        """What the positions of ``tensor`` come to, each by itself [size of the axis]."""
        return tensor.movedim(self.axis, 0).flatten(1).sum(1)

    def mask(self, alive: Tensor, ndim: int) -> Tensor:
        """One where channels are, to be broadcast against ``ndim`` dimensions; ``alive`` is [classes]."""
        last = torch.cat([alive, alive.new_ones(1)])
        return spread(last[self.classes], self.axis, ndim)


@dataclass(frozen=True, slots=True, eq=False)
class Coupled:
    """Channels that may leave, in classes that leave together and groups of classes that are compared."""

    groups: Tensor
    """The group of each class [classes]."""
    places: tuple[Place, ...]

    def scores(self, weights: Mapping[str, Tensor]) -> Tensor:
        """What each class [classes] counts, one on average in each group: its share of the squares of each
        weight that it is made or read by (as in G. Fang et al., 2023, DepGraph)."""
        found = torch.zeros(len(self.groups), dtype=torch.float64)
        for place in self.places:
            if place.weight:
                squares = place.sums(weights[place.key].double().square())
                self._add(found, place, squares / squares.sum().clamp(min=SMALLEST))
        sums = torch.zeros(int(self.groups.max()) + 1, dtype=torch.float64).index_add(0, self.groups, found)
        means = sums / self.groups.bincount()
        return found / means.clamp(min=SMALLEST)[self.groups]

    def gradients(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """How much the loss would change with what reads each class [classes]: the length of the gradient."""
        found = torch.zeros(len(self.groups), dtype=torch.float64)
        for place in self.places:
            if place.reading and place.key in gradients:
                self._add(found, place, place.sums(gradients[place.key].double().square()))
        return found.sqrt()

    def masks(self, alive: Tensor, shapes: Mapping[str, Trainable], *, final: bool) -> dict[str, Tensor]:
        """Masks for what reads the channels, and in the end for all that belongs to them."""
        found: dict[str, Tensor] = {}
        for place in self.places:
            if place.reading or final:
                shape = shapes[place.key].shape
                mask = place.mask(alive, len(shape)).expand(shape)
                found[place.key] = found[place.key] * mask if place.key in found else mask.clone()
        return found

    def _add(self, found: Tensor, place: Place, values: Tensor) -> None:
        free = place.classes >= 0
        found.index_add_(0, place.classes[free], values[free])


def couple(model: ir.Model, held: Parameters) -> Coupled:
    """The channels of ``model`` that training may take out: all that belongs to them is ``held``.

    Raises:
        ConfigError: no channel may go.
    """
    known = clone(model)
    infer_shapes(known)
    channels = find_channels(known)
    cuts = _trained_cuts(known, channels, held)
    groups = find_groups(channels)
    free = [group.classes for group in groups if len(group.classes)]
    if not free:
        reasons = "; ".join(sorted({group.pinned for group in groups})[:3]) or "it has no weights"
        raise ConfigError(f"tune: sparsify: no channel of the model can go: {reasons}")
    numbers = np.full(len(channels.parents), -1)
    numbers[np.concatenate(free)] = np.arange(sum(map(len, free)))
    of_group = np.repeat(np.arange(len(free)), [len(classes) for classes in free])
    places = (_place(channels, cut, trained, numbers[channels.roots()]) for cut, trained in cuts)
    return Coupled(torch.from_numpy(of_group), tuple(p for p in places if (p.classes >= 0).any()))


def _trained_cuts(model: ir.Model, channels: Channels, held: Parameters) -> list[tuple[Cut, Trainable]]:
    """Where channels stand in what is trained; those of what cannot be masked are pinned."""
    keys, known, roots = keys_of(model), trainables(model), channels.roots()
    found: list[tuple[Cut, Trainable]] = []
    sharing: dict[ir.Value, list[Cut]] = defaultdict(list)
    for cut in channels.cuts:
        source = source_of(cut.node.inputs[cut.index])
        trained = None if source is None else known.get(keys[source])
        if source is None or trained is None:
            # What else is constant says nothing to what does not read it.
            if cut.index == 1 and cut.node.op_type in PRODUCTS:
                channels.pin_atoms(cut.atoms, f"{label(cut.node)} has weights that are not trained")
        elif trained.key not in held.trained or trained.key in held.places:
            channels.pin_atoms(cut.atoms, f"{trained.key!r} is kept, or takes few values")
        else:
            sharing[source].append(cut)
            found.append((cut, trained))
    for source, cuts in sharing.items():
        ways: dict[ir.Node, dict[int, list[int]]] = defaultdict(dict)
        for cut in cuts:
            ways[cut.node][cut.axis] = roots[cut.atoms].tolist()
        alike = all(way == ways[cuts[0].node] for way in ways.values())
        if not alike or {use.node for use in source.uses()} != ways.keys():
            for cut in cuts:
                channels.pin_atoms(cut.atoms, f"{source.name!r} has several readers")
    return found


def _place(channels: Channels, cut: Cut, trained: Trainable, numbers: np.ndarray) -> Place:
    reading = any(cut.node is node and cut.atoms is atoms for node, atoms in channels.readers)
    classes = torch.from_numpy(numbers[cut.atoms])
    return Place(trained.key, cut.axis, classes, trained.kind is Kind.WEIGHT, reading and cut.index == 1)
