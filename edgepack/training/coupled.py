"""Channel sparsity during training: which parts of the trained tensors belong to each channel.

A channel is pruned when no weight consumes it. While the choice can still change, only the consuming weights
are masked: with producer and consumer masked, neither would have a gradient, and the channel could not be
chosen again. After the final choice everything of the channel is zero, including the weights and biases that
produce it and its entries in depthwise convolutions and normalizations, so that it can leave the graph.
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
from edgepack.training.parameters import Parameters
from edgepack.training.step import spread
from edgepack.training.weights import PRODUCTS, Kind, Trainable, keys_of, source_of, trainables

SMALLEST = 1e-30


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """The class of each position along ``axis`` of the trained tensor ``key`` [size of the axis]; -1 where
    the channel cannot be pruned."""

    key: str
    axis: int
    classes: Tensor
    weight: bool
    """Whether the tensor is multiplied with activations; only such tensors count in the scores."""
    consuming: bool
    """Whether ``axis`` is the input axis of a weight."""

    def sums(self, tensor: Tensor) -> Tensor:
        """Sum of ``tensor`` over all axes but ``axis`` [size of the axis]."""
        return tensor.movedim(self.axis, 0).flatten(1).sum(1)

    def mask(self, alive: Tensor, ndim: int) -> Tensor:
        """The mask of ``alive`` [classes], shaped to broadcast against ``ndim`` dimensions."""
        last = torch.cat([alive, alive.new_ones(1)])
        return spread(last[self.classes], self.axis, ndim)


@dataclass(frozen=True, slots=True, eq=False)
class Coupled:
    """Prunable channels: classes are pruned together, and classes of one group compete with each other."""

    groups: Tensor
    """The group of each class [classes]."""
    places: tuple[Place, ...]

    def scores(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Importance of each class [classes], with mean 1 in each group: its share of the squared norm of
        every weight that produces or consumes it (as in G. Fang et al., 2023, DepGraph)."""
        found = torch.zeros(len(self.groups), dtype=torch.float64)
        for place in self.places:
            if place.weight:
                squares = place.sums(weights[place.key].double().square())
                self._add(found, place, squares / squares.sum().clamp(min=SMALLEST))
        sums = torch.zeros(int(self.groups.max()) + 1, dtype=torch.float64).index_add(0, self.groups, found)
        means = sums / self.groups.bincount()
        return found / means.clamp(min=SMALLEST)[self.groups]

    def gradients(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Gradient norm of the weights that consume each class [classes]."""
        found = torch.zeros(len(self.groups), dtype=torch.float64)
        for place in self.places:
            if place.consuming and place.key in gradients:
                self._add(found, place, place.sums(gradients[place.key].double().square()))
        return found.sqrt()

    def masks(self, alive: Tensor, shapes: Mapping[str, Trainable], *, final: bool) -> dict[str, Tensor]:
        """Masks for the weights that consume the channels; with ``final``, for all tensors of the
        channels."""
        found: dict[str, Tensor] = {}
        for place in self.places:
            if place.consuming or final:
                shape = shapes[place.key].shape
                mask = place.mask(alive, len(shape)).expand(shape)
                found[place.key] = found[place.key] * mask if place.key in found else mask.clone()
        return found

    def _add(self, found: Tensor, place: Place, values: Tensor) -> None:
        free = place.classes >= 0
        found.index_add_(0, place.classes[free], values[free])


def couple(model: ir.Model, parameters: Parameters) -> Coupled:
    """The channels of ``model`` that training may prune: all of their weights are in ``parameters``.

    Raises:
        ConfigError: no channel can be pruned.
    """
    known = clone(model)
    infer_shapes(known)
    channels = find_channels(known)
    cuts = _trained_cuts(known, channels, parameters)
    groups = find_groups(channels)
    free = [group.classes for group in groups if len(group.classes)]
    if not free:
        reasons = "; ".join(sorted({group.pinned for group in groups})[:3]) or "it has no weights"
        raise ConfigError(f"tune: sparsify: no channel of the model can be pruned: {reasons}")
    numbers = np.full(len(channels.parents), -1)
    numbers[np.concatenate(free)] = np.arange(sum(map(len, free)))
    of_group = np.repeat(np.arange(len(free)), [len(classes) for classes in free])
    places = (_place(channels, cut, trained, numbers[channels.roots()]) for cut, trained in cuts)
    return Coupled(torch.from_numpy(of_group), tuple(p for p in places if (p.classes >= 0).any()))


def _trained_cuts(model: ir.Model, channels: Channels, parameters: Parameters) -> list[tuple[Cut, Trainable]]:
    """The channel axes of trained tensors; channels of tensors that cannot be masked are pinned."""
    keys, known, roots = keys_of(model), trainables(model), channels.roots()
    found: list[tuple[Cut, Trainable]] = []
    sharing: dict[ir.Value, list[Cut]] = defaultdict(list)
    for cut in channels.cuts:
        source = source_of(cut.node.inputs[cut.index])
        trained = None if source is None else known.get(keys[source])
        if source is None or trained is None:
            # Other constants do not matter to a channel that no weight consumes.
            if cut.index == 1 and cut.node.op_type in PRODUCTS:
                channels.pin_atoms(cut.atoms, f"{label(cut.node)} has weights that are not trained")
        elif trained.key not in parameters.trained or trained.key in parameters.places:
            channels.pin_atoms(cut.atoms, f"{trained.key!r} is excluded by `keep`, or is clustered")
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
                channels.pin_atoms(cut.atoms, f"{source.name!r} has several consumers")
    return found


def _place(channels: Channels, cut: Cut, trained: Trainable, numbers: np.ndarray) -> Place:
    consuming = any(cut.node is node and cut.atoms is atoms for node, atoms in channels.consumers)
    classes = torch.from_numpy(numbers[cut.atoms])
    return Place(trained.key, cut.axis, classes, trained.kind is Kind.WEIGHT, consuming and cut.index == 1)
