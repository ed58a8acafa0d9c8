"""The table of passes, by the type of their settings in a recipe.

A pass is a function ``(model, settings, inputs) -> (new model, notes for the report)`` that does not change
``model``. ``tune`` is not here, because only the pipeline imports training.
"""

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir

from edgepack.compression.budget import packed_int8_bytes
from edgepack.compression.cluster import cluster
from edgepack.compression.compact import compact, compact_notes
from edgepack.compression.pass_inputs import PassInputs
from edgepack.compression.prune import Limits, prune
from edgepack.compression.share import share
from edgepack.compression.structured import prune_structured, structured_notes
from edgepack.config.passes import Cluster, Compact, Prune, Share, Structured
from edgepack.config.strict_yaml import Strict
from edgepack.quantization.groups import find_fusion_groups

Done = tuple[ir.Model, list[str]]


def _prune(model: ir.Model, settings: Prune, inputs: PassInputs) -> Done:
    groups = find_fusion_groups(model, inputs.target.kernels)
    limits = Limits(lambda w: packed_int8_bytes(model, groups, w, inputs.clusters), inputs.accurate)
    sparse, rows = prune(
        model, groups, inputs.some, settings, threads=inputs.threads, seed=inputs.seed, limits=limits
    )
    zeros, values = sum(r.zeros for r in rows), sum(r.values for r in rows)
    return sparse, [f"{zeros / values:.1%} of {values} weights in {len(rows)} groups are zero"]


def _cluster(model: ir.Model, settings: Cluster, inputs: PassInputs) -> Done:
    groups = find_fusion_groups(model, inputs.target.kernels)
    few, weights = cluster(model, groups, inputs.some, settings, threads=inputs.threads, seed=inputs.seed)
    total, most = sum(w.values for w in weights), max(w.codes for w in weights)
    return few, [f"{total} weights in {len(weights)} groups have at most {most} distinct values each"]


def _share(model: ir.Model, settings: Share, inputs: PassInputs) -> Done:
    shared, replaced = share(model, settings)
    error = max((one.error for one in replaced), default=0.0)
    return shared, [f"{len(replaced)} constants replaced by others, relative difference at most {error:.3g}"]


def _structured(model: ir.Model, settings: Structured, inputs: PassInputs) -> Done:
    slim, report = prune_structured(
        model, inputs.some, settings, inputs.multiples, threads=inputs.threads, seed=inputs.seed
    )
    return slim, structured_notes(report, settings)


def _compact(model: ir.Model, settings: Compact, inputs: PassInputs) -> Done:
    small, left = compact(model, settings, inputs.multiples)
    return small, compact_notes(left)


PASSES: Mapping[type[Strict], Callable[[ir.Model, Any, PassInputs], Done]] = {
    Prune: _prune,
    Cluster: _cluster,
    Share: _share,
    Structured: _structured,
    Compact: _compact,
}
