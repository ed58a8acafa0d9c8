"""The gate of a pool: each model must pass the gate of its build, or keep the outputs that it had alone."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepack.config.recipe import Recipe, load_recipe
from edgepack.config.target import Gate, Target, load_target
from edgepack.data.splits import open_evaluation
from edgepack.errors import ConfigError
from edgepack.evaluation.check import baseline, check_together, compare_outputs
from edgepack.evaluation.gate import judge_accuracy
from edgepack.evaluation.metrics import Metric, resolve_metric
from edgepack.ir.files import load_model
from edgepack.ir.fingerprint import fingerprint
from edgepack.ir.inputs import input_specs
from edgepack.pack.pool import Judge, Verdict
from edgepack.pipeline.limits import LEAST_UNLABELLED_DB, limits
from edgepack.pipeline.measuring import random_feed
from edgepack.pipeline.progress import Progress
from edgepack.results import Fidelity
from edgepack.runtime.host import for_accuracy
from edgepack.runtime.runner import open_model

LEAST_DB = 30.0
"""Least SQNR of a pooled model against itself, where there is no gate."""
REPORT = "report.json"
DEFAULT_TARGET = "x86-cpu"


@dataclass(frozen=True, slots=True)
class Request:
    """The options for the gate of a pool; all are optional."""

    recipes: tuple[Path, ...] = ()
    """One for all models, or one for each."""
    default_recipe: Path | None = None
    """Where ``recipes`` is empty: the recipe for models that were built with it."""
    data: str | None = None
    metric: str | None = None
    target: str | None = None
    min_sqnr_db: float | None = None
    """In place of the gate's."""

    @property
    def is_for_a_pool(self) -> bool:
        """Whether an option is set that only a pool has."""
        return bool(self.recipes or self.data or self.metric or self.target) or self.min_sqnr_db is not None


@dataclass(frozen=True, slots=True)
class Limits:
    """The data and the limits for one model."""

    recipe: Recipe
    """Its model is the reference for the pooled one."""
    base: Path
    target: Target
    built: bool
    """Whether the recipe is that of a build, with a gate; else the model is compared with itself."""

    def gate(self, metric: Metric | None, request: Request) -> Gate:
        """The limits of accuracy."""
        gate = limits(self.recipe, self.target, metric)
        least, centred = gate.min_sqnr_db, gate.min_centred_sqnr_db
        others = (least, centred, gate.max_metric_drop, gate.min_agreement)
        if not self.built and metric is None:
            least, centred = LEAST_DB, None
        elif all(limit is None for limit in others):
            centred = LEAST_UNLABELLED_DB
        if request.min_sqnr_db is not None:
            least, centred = request.min_sqnr_db, None
        return gate.model_copy(update={"min_sqnr_db": least, "min_centred_sqnr_db": centred})


def judge_of(models: Sequence[Path], request: Request, progress: Progress) -> Judge:
    """A function that judges a model of a pool, by its index in ``models``.

    Raises:
        ConfigError: the number of recipes is neither 1 nor that of the models; a recipe, its data or its
            target is wrong.
        ModelError: the model of a recipe cannot be read.
    """
    limits_of = _limits_of_all(models, request)
    known: dict[int, Verdict] = {}

    def judge(number: int, pooled: Path, changed: bool) -> Verdict | None:
        by, source = limits_of[number], models[number]
        if by is None:
            return _on_random_input(source, pooled, request) if changed else None
        if changed or number not in known:
            verdict = _measured(by, source, pooled, request, progress)
            if changed:
                return verdict
            known[number] = verdict
        return known[number]

    return judge


def _limits_of_all(models: Sequence[Path], request: Request) -> list[Limits | None]:
    if request.recipes and len(request.recipes) not in (1, len(models)):
        raise ConfigError(
            f"{len(request.recipes)} recipes for {len(models)} models: give one for all, or one for each in "
            "their order"
        )
    recipes = request.recipes * (len(models) if len(request.recipes) == 1 else 1)
    if recipes:
        return [_limits_of_build(m, r, request) for m, r in zip(models, recipes, strict=True)]
    return [_default_limits(model, request) for model in models]


def _default_limits(model: Path, request: Request) -> Limits | None:
    """The limits of the default recipe if it built the model, else those for the given samples."""
    if request.default_recipe is not None and _is_of(model, load_recipe(request.default_recipe, {})):
        return _limits_of_build(model, request.default_recipe, request)
    if request.data is None:
        if request.metric is not None:
            raise ConfigError(f"--metric: there are no labels for {model}; give --recipe, or --data")
        return None
    recipe = load_recipe(None, {"model": str(model), **_changes(request)})
    return Limits(recipe, Path(), load_target(request.target or DEFAULT_TARGET), built=False)


def _limits_of_build(model: Path, path: Path, request: Request) -> Limits:
    recipe = load_recipe(path, _changes(request))
    named = request.target or _report_beside(model).get("target")
    target = load_target(named or next(iter(recipe.target), DEFAULT_TARGET))
    return Limits(recipe, path.parent, target, built=True)


def _changes(request: Request) -> dict[str, Any]:
    return {"metric": request.metric, "evaluation_data": {"path": request.data} if request.data else None}


def _is_of(model: Path, recipe: Recipe) -> bool:
    """Whether ``model`` is the recipe's model, or belongs to a package that was built from it."""
    if not recipe.model.exists():
        return False
    if model.exists() and model.samefile(recipe.model):
        return True
    built_from = _report_beside(model).get("fingerprints", {}).get("model")
    return built_from is not None and built_from == fingerprint(load_model(recipe.model))


def _report_beside(model: Path) -> dict[str, Any]:
    """``report.json`` next to ``model``; empty where there is none."""
    try:
        content = json.loads((model.absolute().parent / REPORT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model.parent / REPORT}: cannot be read ({error})") from error
    return content if isinstance(content, dict) else {}


def _measured(by: Limits, source: Path, pooled: Path, request: Request, progress: Progress) -> Verdict:
    """The verdict on the evaluation data, measured as in a build."""
    recipe = by.recipe
    progress(f"judge {pooled.name}", 0, 0)
    samples = open_evaluation(recipe, by.target, by.base, load_model(recipe.model))
    metric = resolve_metric(recipe.metric, by.base) if recipe.metric else None
    reference = baseline(recipe.model, samples, for_accuracy(by.target), metric)
    files = {"before": source, "pooled": pooled}
    found, (moved,) = check_together(files, reference)
    asked_for = recipe.gate is not None or request.min_sqnr_db is not None
    lines = judge_accuracy(by.gate(metric, request), reference.fidelity, found["pooled"], asked_for=asked_for)
    return Verdict(samples.source, reference.fidelity, found["before"], found["pooled"], moved.sqnr_db, lines)


def _on_random_input(source: Path, pooled: Path, request: Request) -> Verdict:
    """The verdict on one random input, where there are no samples."""
    runtime = for_accuracy(load_target(request.target or DEFAULT_TARGET))
    feeds = [random_feed(input_specs(load_model(source)))]
    outputs = [open_model(source, runtime).run(feed) for feed in feeds]
    found = compare_outputs(outputs, open_model(pooled, runtime), feeds).fidelity()
    least = LEAST_DB if request.min_sqnr_db is None else request.min_sqnr_db
    itself = Fidelity(len(feeds), None, 1.0, None, None)
    lines = judge_accuracy(Gate(min_sqnr_db=least), itself, found, asked_for=True)
    return Verdict("one random input", itself, itself, found, found.sqnr_db, lines)
