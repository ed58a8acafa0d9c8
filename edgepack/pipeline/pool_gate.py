"""How the models of a pool are judged: by the gate of the build that each comes from, or by what it was."""

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
"""What the outputs of a model with similar tensors keep of its own, where no gate says anything."""
REPORT = "report.json"
USUAL_TARGET = "x86-cpu"


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user says of the judging; all of it may be left out."""

    recipes: tuple[Path, ...] = ()
    """One for all models, or one for each."""
    usual: Path | None = None
    """The recipe that is taken for those models that were built with it, where ``recipes`` is empty."""
    data: str | None = None
    metric: str | None = None
    target: str | None = None
    min_sqnr_db: float | None = None
    """In place of the gate's."""

    @property
    def is_for_a_pool(self) -> bool:
        """Whether anything is asked for that only a pool has."""
        return bool(self.recipes or self.data or self.metric or self.target) or self.min_sqnr_db is not None


@dataclass(frozen=True, slots=True)
class Terms:
    """What one model is judged by."""

    recipe: Recipe
    """Its model is what the pooled one is compared with."""
    base: Path
    target: Target
    built: bool
    """Whether the recipe is that of a build, which has a gate; else the model is compared with itself."""

    def gate(self, metric: Metric | None, wish: Wish) -> Gate:
        """The limits of accuracy."""
        gate = limits(self.recipe, self.target, metric)
        least, centred = gate.min_sqnr_db, gate.min_centred_sqnr_db
        others = (least, centred, gate.max_metric_drop, gate.min_agreement)
        if not self.built and metric is None:
            least, centred = LEAST_DB, None
        elif all(limit is None for limit in others):
            centred = LEAST_UNLABELLED_DB
        if wish.min_sqnr_db is not None:
            least, centred = wish.min_sqnr_db, None
        return gate.model_copy(update={"min_sqnr_db": least, "min_centred_sqnr_db": centred})


def judge_of(models: Sequence[Path], wish: Wish, progress: Progress) -> Judge:
    """What judges the models of a pool, by their numbers.

    Raises:
        ConfigError: as many recipes as fit neither all models nor each; a recipe, its data or its target
            are wrong.
        ModelError: the model of a recipe cannot be read.
    """
    terms = _all_terms(models, wish)
    known: dict[int, Verdict] = {}

    def judge(number: int, pooled: Path, changed: bool) -> Verdict | None:
        found, source = terms[number], models[number]
        if found is None:
            return _on_random_input(source, pooled, wish) if changed else None
        if changed or number not in known:
            verdict = _measured(found, source, pooled, wish, progress)
            if changed:
                return verdict
            known[number] = verdict
        return known[number]

    return judge


def _all_terms(models: Sequence[Path], wish: Wish) -> list[Terms | None]:
    if wish.recipes and len(wish.recipes) not in (1, len(models)):
        raise ConfigError(
            f"{len(wish.recipes)} recipes for {len(models)} models: give one for all, or one for each in "
            "their order"
        )
    recipes = wish.recipes * (len(models) if len(wish.recipes) == 1 else 1)
    if recipes:
        return [_terms_of_build(m, r, wish) for m, r in zip(models, recipes, strict=True)]
    return [_terms_unasked(model, wish) for model in models]


def _terms_unasked(model: Path, wish: Wish) -> Terms | None:
    """Those of the recipe at hand if it built the model, else of the samples that are given."""
    if wish.usual is not None and _is_of(model, load_recipe(wish.usual, {})):
        return _terms_of_build(model, wish.usual, wish)
    if wish.data is None:
        if wish.metric is not None:
            raise ConfigError(f"--metric: there are no labels for {model}; give --recipe, or --data")
        return None
    recipe = load_recipe(None, {"model": str(model), **_changes(wish)})
    return Terms(recipe, Path(), load_target(wish.target or USUAL_TARGET), built=False)


def _terms_of_build(model: Path, path: Path, wish: Wish) -> Terms:
    recipe = load_recipe(path, _changes(wish))
    named = wish.target or _report_beside(model).get("target")
    target = load_target(named or next(iter(recipe.target), USUAL_TARGET))
    return Terms(recipe, path.parent, target, built=True)


def _changes(wish: Wish) -> dict[str, Any]:
    return {"metric": wish.metric, "evaluation_data": {"path": wish.data} if wish.data else None}


def _is_of(model: Path, recipe: Recipe) -> bool:
    """Whether ``model`` is the recipe's own, or lies in the package of a build from it."""
    if not recipe.model.exists():
        return False
    if model.exists() and model.samefile(recipe.model):
        return True
    built_from = _report_beside(model).get("fingerprints", {}).get("model")
    return built_from is not None and built_from == fingerprint(load_model(recipe.model))


def _report_beside(model: Path) -> dict[str, Any]:
    """The report of the package that ``model`` lies in; empty for a model that lies in none."""
    try:
        content = json.loads((model.absolute().parent / REPORT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model.parent / REPORT}: cannot be read ({error})") from error
    return content if isinstance(content, dict) else {}


def _measured(terms: Terms, source: Path, pooled: Path, wish: Wish, progress: Progress) -> Verdict:
    """On all samples that judge a build, by the means of a build."""
    recipe = terms.recipe
    progress(f"judge {pooled.name}", 0, 0)
    samples = open_evaluation(recipe, terms.target, terms.base, load_model(recipe.model))
    metric = resolve_metric(recipe.metric, terms.base) if recipe.metric else None
    reference = baseline(recipe.model, samples, for_accuracy(terms.target), metric)
    files = {"before": source, "pooled": pooled}
    found, (moved,) = check_together(files, reference)
    asked_for = recipe.gate is not None or wish.min_sqnr_db is not None
    lines = judge_accuracy(terms.gate(metric, wish), reference.fidelity, found["pooled"], asked_for=asked_for)
    return Verdict(samples.source, reference.fidelity, found["before"], found["pooled"], moved.sqnr_db, lines)


def _on_random_input(source: Path, pooled: Path, wish: Wish) -> Verdict:
    """On what is at hand where nobody gives samples."""
    runtime = for_accuracy(load_target(wish.target or USUAL_TARGET))
    feeds = [random_feed(input_specs(load_model(source)))]
    outputs = [open_model(source, runtime).run(feed) for feed in feeds]
    found = compare_outputs(outputs, open_model(pooled, runtime), feeds).fidelity()
    least = LEAST_DB if wish.min_sqnr_db is None else wish.min_sqnr_db
    itself = Fidelity(len(feeds), None, 1.0, None, None)
    lines = judge_accuracy(Gate(min_sqnr_db=least), itself, found, asked_for=True)
    return Verdict("one random input", itself, itself, found, found.sqnr_db, lines)
