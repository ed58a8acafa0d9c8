"""Inputs of the selection: limits of accuracy, the budget of the search, measurements of earlier runs."""

import hashlib
import json
import math
from collections.abc import Callable

import onnx_ir as ir

from edgepack.benchmark.environment import machine
from edgepack.calibration.ranges import RangeTable
from edgepack.config.recipe import Recipe
from edgepack.config.target import Gate, Target
from edgepack.errors import ConfigError
from edgepack.evaluation.metrics import Metric
from edgepack.quantization.weights.low_bit import wants_four_bits
from edgepack.results import Fidelity
from edgepack.runtime.host import accuracy_notes
from edgepack.selection.history import Measurements, cache_folder
from edgepack.selection.search import REPAIR_SECONDS, Task
from edgepack.selection.trials import Floor

FOUR_BITS_OPSET = 21
"""The first opset whose DequantizeLinear takes INT4."""
LEAST_UNLABELLED_DB = 15.0
"""Least centred SQNR where no other limit of accuracy is set, a conservative one: of the models tested, all
that lost their metric have less than 9 dB, and some that kept it have 12 to 14 dB."""


def limits(recipe: Recipe, target: Target, metric: Metric | None) -> Gate:
    """The gate; without a metric and without a limit of fidelity, with a least centred SQNR."""
    gate = recipe.gate or target.gate
    fidelity = (gate.min_sqnr_db, gate.min_centred_sqnr_db, gate.min_agreement)
    if metric is not None or any(limit is not None for limit in fidelity):
        return gate
    return gate.model_copy(update={"min_centred_sqnr_db": LEAST_UNLABELLED_DB})


def floor_of(gate: Gate, original: Fidelity) -> Floor:
    """The limits of accuracy that the ``gate`` sets for each file."""
    return Floor(
        gate.min_sqnr_db,
        gate.min_agreement,
        gate.max_metric_drop,
        original.metric,
        gate.min_centred_sqnr_db,
    )


def search_task(recipe: Recipe, model: ir.Model, progress: Callable[[str, int, int], None]) -> Task:
    """The search of single groups: improvement for preset best, else only a repair."""
    elements = {v.name: _elements(v.shape) for n in model.graph for v in n.outputs if v.name}
    best = recipe.preset == "best"
    return Task(recipe.search.budget_s if best else REPAIR_SECONDS, best, elements, progress)


def _elements(shape: ir.Shape | None) -> int:
    """Elements of a tensor; an unknown dimension counts as 1, an unknown shape as 0."""
    return math.prod(d if isinstance(d, int) else 1 for d in shape or (0,))


def kept_measurements(recipe: Recipe, target: Target, table: RangeTable) -> Measurements:
    """Measurements of earlier searches with the same model, samples and machine."""
    if recipe.preset != "best":
        return Measurements()
    wanted = recipe.quantize.model_dump_json(include={"weight_bits", "overrides"})
    facts = [table.model_fingerprint, table.samples_fingerprint, target.runtime.model_dump_json(), wanted]
    facts += accuracy_notes(target)  # they change the outputs of the same file on the same machine
    name = hashlib.sha256(" ".join([*facts, json.dumps(machine())]).encode()).hexdigest()
    return Measurements(cache_folder() / "search" / f"{name[:32]}.jsonl")


def with_recipe_settings(target: Target, recipe: Recipe) -> Target:
    """``target`` with the recipe's settings for ``.tflite``, and the opset that INT4 weights need.

    Raises:
        ConfigError: 4-bit weights, but the runtime does not load that opset.
    """
    if wants_four_bits(recipe.quantize):
        if target.max_opset < FOUR_BITS_OPSET:
            raise ConfigError(
                f"4-bit weights: they are tensors from opset {FOUR_BITS_OPSET} on, and the runtime of target "
                f"{target.name!r} loads {target.max_opset} at most"
            )
        target = target.model_copy(update={"min_opset": max(target.min_opset, FOUR_BITS_OPSET)})
    if target.tflite is None:
        return target
    settings = recipe.tflite
    changes = {"dims": {**target.tflite.dims, **settings.dims}, "io": settings.io or target.tflite.io}
    return target.model_copy(update={"tflite": target.tflite.model_copy(update=changes)})
