"""Metrics of a model's quality: built-in, or a Python function of the user."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgepack.config.user_code import is_reference, load_function
from edgepack.data.labels import Label
from edgepack.errors import ConfigError, EdgepackError, SamplesError, did_you_mean
from edgepack.ir.arrays import Array

Outputs = Sequence[dict[str, Array]]
"""Per sample, the model's outputs by name, in the model's order."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A measure of quality; higher is better."""

    name: str
    function: Callable[[Outputs, Sequence[Label]], float]

    def __call__(self, outputs: Outputs, labels: Sequence[Label] | None) -> float:
        """The metric of ``outputs`` against ``labels``, one of each per sample.

        Raises:
            SamplesError: no labels, not one per output, or of a type that the metric cannot use.
            EdgepackError: the function raises (the cause is chained) or gives no finite number.
        """
        if labels is None:
            raise SamplesError(
                f"metric {self.name}: the evaluation data have no labels; add one of "
                "labels.array, labels.filename or labels.file under evaluation_data, or let its function "
                "yield (feeds, label)"
            )
        if len(labels) != len(outputs) or not outputs:
            raise SamplesError(f"metric {self.name}: {len(outputs)} outputs and {len(labels)} labels")
        try:
            value = float(self.function(outputs, labels))
        except EdgepackError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise EdgepackError(f"metric {self.name}: raised {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise EdgepackError(
                f"metric {self.name}: gave {value} for {len(outputs)} samples, not a finite number"
            )
        return value


def resolve_metric(name: str, base: Path) -> Metric:
    """The metric called ``name``: top1, accuracy, auc, or ``module:function`` with ``base`` on the path.

    Raises:
        ConfigError: no such metric, module or function.
    """
    if is_reference(name):
        return Metric(name, load_function(name, base))
    builtin = {"top1": top1, "accuracy": top1, "auc": auc}
    if name not in builtin:
        raise ConfigError(
            f"metric: there is no {name!r}, {did_you_mean(name, builtin)}; your own is `module:function`"
        )
    return Metric(name, builtin[name])


def top1(outputs: Outputs, labels: Sequence[Label]) -> float:
    """Share of samples whose label, a class number, is the argmax of the first output over its last axis.

    Raises:
        SamplesError: an output with more than one row of scores or NaN, or a label that is no class number.
    """
    correct = 0
    for index, (output, label) in enumerate(zip(outputs, labels, strict=True)):
        name, scores = _first(output, index)
        if scores.ndim == 0 or scores.size != scores.shape[-1]:
            raise SamplesError(
                f"metric top1: output {name!r} of sample {index} has shape {list(scores.shape)}; one row of "
                "class scores is needed. Write a `module:function` for other outputs"
            )
        if not isinstance(label, int | float) or label != int(label):
            raise SamplesError(f"metric top1: the label of sample {index} is {label!r}, not a class number")
        correct += int(scores.argmax()) == int(label)
    return correct / len(outputs)


def auc(outputs: Outputs, labels: Sequence[Label]) -> float:
    """Area under the ROC curve: how often a positive sample scores above a negative one, ties counting half.

    The score is the first output's only value, or for two values the second minus the first (which orders
    logits and probabilities alike). Labels are 0 or 1. From the ranks (Mann and Whitney 1947; Hanley and
    McNeil 1982).

    Raises:
        SamplesError: other outputs or labels, NaN scores, or only one class.
    """
    scores = np.array([_score(output, index) for index, output in enumerate(outputs)])
    for index, label in enumerate(labels):
        if label not in (0, 1):
            raise SamplesError(f"metric auc: the label of sample {index} is {label!r}, not 0 or 1")
    positive = np.array(labels, np.float64) == 1
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        raise SamplesError(
            f"metric auc: {positives} samples are labelled 1 and {negatives} are 0; both are needed"
        )
    rank_sum = float(_average_ranks(scores)[positive].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def _average_ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: npt.NDArray[np.float64] = (last - (counts - 1) / 2)[group]
    return ranks


def _score(output: dict[str, Array], index: int) -> float:
    name, values = _first(output, index)
    flat = values.astype(np.float64).ravel()
    if flat.size == 2:
        return float(flat[1] - flat[0])
    if flat.size != 1:
        raise SamplesError(
            f"metric auc: output {name!r} of sample {index} has shape {list(values.shape)}; "
            "one or two values are needed"
        )
    return float(flat[0])


def _first(output: dict[str, Array], index: int) -> tuple[str, Array]:
    name, values = next(iter(output.items()))
    if np.isnan(values).any():
        raise SamplesError(
            f"metric: output {name!r} of sample {index} holds NaN, which no class or rank can be"
        )
    return name, values
