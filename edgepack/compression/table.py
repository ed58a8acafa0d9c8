"""The table of passes: how each is carried out, by the type of its settings in a recipe.

A pass is a function ``(model, settings, material) -> (new model, sentences for the report)`` that leaves
``model`` as it is. ``tune`` is not here: it trains, and only the pipeline knows of training.
"""

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir

from edgepack.compression.budget import packed_int8_bytes
from edgepack.compression.cluster import cluster
from edgepack.compression.compact import compact, compact_notes
from edgepack.compression.material import PassInputs
from edgepack.compression.prune import Limits, prune
from edgepack.compression.share import share
from edgepack.compression.structured import prune_structured, structured_notes
from edgepack.config.passes import Cluster, Compact, Prune, Share, Structured
from edgepack.config.strict_yaml import Strict
from edgepack.quantization.groups import find_fusion_groups

Done = tuple[ir.Model, list[str]]


def _prune(model: ir.Model, settings: Prune, material: PassInputs) -> Done:
    groups = find_fusion_groups(model, material.target.kernels)
    limits = Limits(lambda w: packed_int8_bytes(model, groups, w, material.clusters), material.accurate)
    sparse, rows = prune(
        model, groups, material.some, settings, threads=material.threads, seed=material.seed, limits=limits
    )
    zeros, values = sum(r.zeros for r in rows), sum(r.values for r in rows)
    return sparse, [f"{zeros / values:.1%} of {values} weights in {len(rows)} groups are zero"]


def _cluster(model: ir.Model, settings: Cluster, material: PassInputs) -> Done:
    groups = find_fusion_groups(model, material.target.kernels)
    few, weights = cluster(
        model, groups, material.some, settings, threads=material.threads, seed=material.seed
    )
    total, most = sum(w.values for w in weights), max(w.codes for w in weights)
    return few, [f"{total} weights in {len(weights)} groups take at most {most} values each"]


def _share(model: ir.Model, settings: Share, material: PassInputs) -> Done:
    tied, ties = share(model, settings)
    error = max((tie.error for tie in ties), default=0.0)
    return tied, [f"{len(ties)} constants replaced by others, at most {error:.3g} of their norm apart"]


def _structured(model: ir.Model, settings: Structured, material: PassInputs) -> Done:
    slim, report = prune_structured(
        model, material.some, settings, material.multiples, threads=material.threads, seed=material.seed
    )
    return slim, structured_notes(report, settings)


def _compact(model: ir.Model, settings: Compact, material: PassInputs) -> Done:
    small, left = compact(model, settings, material.multiples)
    return small, compact_notes(left)


PASSES: Mapping[type[Strict], Callable[[ir.Model, Any, PassInputs], Done]] = {
    Prune: _prune,
    Cluster: _cluster,
    Share: _share,
    Structured: _structured,
    Compact: _compact,
}
