"""Structured pruning: removes whole channels, neurons and attention heads, which makes a model smaller and
faster on any runtime."""

import fnmatch
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepack.compression.channel_choice import Choice, Costs, choose
from edgepack.compression.channel_order import orders
from edgepack.compression.channels.atoms import Atoms, Channels, Group, Mask, find_groups, output_axis
from edgepack.compression.channels.rules import find_channels
from edgepack.compression.refit import refit
from edgepack.compression.sample_run import SampleRun
from edgepack.compression.slim import slim
from edgepack.compression.weights import require_types
from edgepack.config.passes import Structured
from edgepack.data.samples import Samples
from edgepack.errors import ConfigError, did_you_mean


@dataclass(frozen=True, slots=True)
class Multiples:
    """Channel multiples that a target's kernels prefer."""

    dense: int = 1
    depthwise: int = 1


@dataclass(frozen=True, slots=True)
class SlimGroup:
    """Result for layers whose channels are pruned together."""

    name: str
    channels: int
    left: int
    reason: str
    """Why the other channels cannot be pruned; empty if they can."""


@dataclass(frozen=True, slots=True)
class SlimReport:
    """Result of structured pruning. Multiplications are those of one sample."""

    macs_before: int
    macs_after: int
    groups: tuple[SlimGroup, ...]
    fitted: int
    """Number of refitted layers."""


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
    """Remove channels until the share ``config.macs`` of the multiplications remains, or as few as possible.

    Raises:
        ConfigError: a pattern in ``keep`` matches no node, or no channel of the model can be pruned.
        CalibrationError: the model fails on a sample.
    """
    channels = find_channels(model)
    groups = find_groups(channels, _kept_names(channels, config))
    free = [group for group in groups if len(group.classes)]
    if not free:
        reasons = "; ".join(sorted({g.pinned for g in groups})[:3]) or "it has no weights"
        raise ConfigError(f"structured: no channel of the model can be pruned: {reasons}")
    roots = channels.roots()
    run = SampleRun(samples, threads, seed, on_sample)
    found = orders(model, channels, roots, free, config, run)
    choices = [
        Choice(
            group,
            group.classes[order],
            losses,
            multiple_of(channels, group, roots, config.multiple, multiples),
        )
        for group, (order, losses) in zip(
            free,
            found,
            strict=True,
        )
    ]
    costs = Costs(model, channels, samples, threads)
    alive = np.ones(len(roots), np.bool_)
    before = costs.macs(alive)
    choose(channels, choices, costs, alive, config.macs, config.at_most)
    pruned = slim(model, channels, alive)
    fitted = 0
    if config.reconstruct and not alive.all():
        cut, kept = _changes(channels, alive)
        fitted = refit(model, pruned, cut, kept, run)
    rows = tuple(SlimGroup(g.name, len(g.widest), int(alive[g.widest].sum()), g.pinned) for g in groups)
    return pruned, SlimReport(before, costs.macs(alive), rows, fitted)


def _changes(channels: Channels, alive: Mask) -> tuple[frozenset[str], dict[str, Atoms]]:
    """Names of the nodes that consume fewer channels; kept output indices of those that produce fewer."""
    cut = {node.name or "" for node, atoms in channels.consumers if not alive[atoms].all()}
    kept = {
        c.node.name or "": np.flatnonzero(alive[c.atoms])
        for c in channels.cuts
        if c.index == 1 and c.axis == output_axis(c.node) and not alive[c.atoms].all()
    }
    return frozenset(cut), kept


def _kept_names(channels: Channels, config: Structured) -> frozenset[str]:
    names = [node.name or "" for node, _ in channels.producers]
    for pattern in config.keep:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"structured: keep: no node that produces channels is named {pattern!r}, "
                + did_you_mean(pattern, names)
            )
    require_types("structured", config.keep_types, {node.op_type for node, _ in channels.producers})
    named = {n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in config.keep)}
    typed = {node.name or "" for node, _ in channels.producers if node.op_type in config.keep_types}
    return frozenset(named | typed)


def multiple_of(
    channels: Channels, group: Group, roots: Atoms, given: int | None, multiples: Multiples
) -> int:
    """The multiple for the number of a group's channels; ``given`` overrides that of the target."""
    if given is not None:
        return given
    classes = set(group.classes.tolist())
    for cut in channels.cuts:
        groups = cut.node.attributes.get_int("group", 1) if cut.index == 1 else 1
        if groups > 1 and classes & set(roots[cut.atoms].tolist()):
            return max(multiples.dense, multiples.depthwise)
    return multiples.dense


def structured_notes(report: SlimReport, config: Structured) -> list[str]:
    """Notes for the report."""
    cut = [group for group in report.groups if group.left < group.channels]
    gone, of = sum(g.channels - g.left for g in cut), sum(g.channels for g in report.groups)
    share = report.macs_after / max(report.macs_before, 1)
    notes = [
        f"{gone} of {of} channels removed from {len(cut)} groups, {share:.1%} of the multiplications remain"
    ]
    if share > config.macs:
        notes.append(f"{config.macs:.1%} were requested, but no more channels can be pruned")
    if report.fitted:
        notes.append(f"{report.fitted} layers refitted")
    reasons = Counter(
        group.reason for group in report.groups if group.reason and group.left == group.channels
    )
    notes.extend(f"{count} groups not pruned: {why}" for why, count in reasons.most_common(3))
    return notes
