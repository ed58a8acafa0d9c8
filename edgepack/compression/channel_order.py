"""The pruning order of channels in each group and its loss: by magnitude or by the error of consumers."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from edgepack.compression.channels.atoms import Atoms, Channels, Group, output_axis
from edgepack.compression.eliminate import Consumer, Floats, eliminate, order_of, salience_of
from edgepack.compression.refit import bias_of
from edgepack.compression.sample_run import SampleRun
from edgepack.config.passes import Structured
from edgepack.ir.model import name_of
from edgepack.quantization.groups import FusionGroup, Role
from edgepack.quantization.weights.matrix import to_groups, weight_of
from edgepack.quantization.weights.moments import stream_moments


def orders(
    model: ir.Model,
    channels: Channels,
    roots: Atoms,
    groups: Sequence[Group],
    config: Structured,
    run: SampleRun,
) -> list[tuple[Atoms, Floats]]:
    """For each group the pruning order of its classes (as indices into ``classes``) and the losses."""
    if config.method in ("l1", "l2"):
        return [order_of(_magnitudes(channels, roots, group, config.method)) for group in groups]
    consumers = _consumers(model, channels, roots, groups, run)
    found = []
    for group in groups:
        mine = [
            _owned(consumer, read, group)
            for consumer, read in consumers
            if np.isin(group.classes, read).any()
        ]
        if config.method == "activation":
            found.append(order_of(salience_of(mine, len(group.classes))))
        else:
            found.append(eliminate(mine, len(group.classes)))
    return found


def _magnitudes(channels: Channels, roots: Atoms, group: Group, method: str) -> Floats:
    """For each class its share of the norm (L1 or squared L2) of the weights that produce it."""
    place = {int(c): i for i, c in enumerate(group.classes)}
    costs = np.zeros(len(group.classes), np.float32)
    for cut in channels.cuts:
        if cut.node not in group.producers or cut.index != 1 or cut.axis != output_axis(cut.node):
            continue
        weight = np.abs(np.moveaxis(weight_of(cut.node), cut.axis, 0)).reshape(len(cut.atoms), -1)
        rows = (weight if method == "l1" else weight**2).sum(1)
        for root, share in zip(roots[cut.atoms].tolist(), rows / max(float(rows.sum()), 1e-12), strict=True):
            if root in place:
                costs[place[root]] += share
    return costs


def _consumers(
    model: ir.Model, channels: Channels, roots: Atoms, coupled: Sequence[Group], run: SampleRun
) -> list[tuple[Consumer, Atoms]]:
    """Consumers of prunable channels, each with the root of every input."""
    free = np.concatenate([each.classes for each in coupled])
    wanted = [(node, roots[atoms]) for node, atoms in channels.consumers if np.isin(roots[atoms], free).any()]
    read_by = [
        FusionGroup(
            name=node.name or "",
            op_type=node.op_type,
            role=Role.HEAVY,
            inputs=(name_of(node.inputs[0]),),
            outputs=(),
        )
        for node, _ in wanted
        if node.op_type != "ConvTranspose" and node.inputs[0] is not None
    ]
    second = {}
    for consumer, moments in stream_moments(
        model,
        read_by,
        run.samples,
        with_second_moments=True,
        threads=run.threads,
        seed=run.seed,
        on_sample=run.on_sample,
    ):
        second[consumer.name] = moments
    found = []
    for node, read in wanted:
        weight = _columns(node)
        taps = weight.shape[1] // len(read)
        moments_of = second.get(node.name or "")
        if moments_of is None or moments_of.second is None:
            # Moments of transposed convolutions and of very wide inputs are not measured: all count alike.
            table = np.eye(weight.shape[1], dtype=np.float32)
        else:
            table = moments_of.second[0]
            if bias_of(node) is not None:
                table = table - np.outer(moments_of.mean[0], moments_of.mean[0])
            # With few rows, correlations between inputs are less reliable than their variances.
            trust = moments_of.count / (moments_of.count + len(table))
            table = trust * table + (1 - trust) * np.diag(np.diagonal(table))
        found.append((Consumer(weight, table, np.repeat(read, taps)), read))
    return found


def _columns(node: ir.Node) -> Floats:
    """A weight as [M, K], with the inputs of one channel adjacent."""
    weight = weight_of(node)
    if node.op_type == "ConvTranspose":
        return np.asarray(weight.reshape(len(weight), -1).T)
    return np.asarray(to_groups(node, weight)[0])


def _owned(consumer: Consumer, read: Atoms, group: Group) -> Consumer:
    """The consumer with indices into the group's classes in place of roots."""
    place = np.searchsorted(group.classes, consumer.owner)
    place = np.clip(place, 0, len(group.classes) - 1)
    return replace(consumer, owner=np.where(group.classes[place] == consumer.owner, place, -1))
