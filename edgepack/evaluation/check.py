"""Compares a built model with the original on evaluation samples, which are not used for calibration."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from edgepack.config.target import Runtime
from edgepack.data.samples import Sample, Samples
from edgepack.errors import EdgepackError, ExportError, ModelError, SamplesError
from edgepack.evaluation.differences import (
    Difference,
    as_rows,
    compared_outputs,
    data_dependent_axes,
    discrete_difference,
    discrete_row_difference,
    numeric_difference,
    numeric_row_difference,
    open_axis,
)
from edgepack.evaluation.metrics import Metric
from edgepack.evaluation.variation import varying_power
from edgepack.ir.arrays import Array, Feeds
from edgepack.ir.numerics import ratio_db
from edgepack.results import Fidelity, Parity, finite
from edgepack.runtime.runner import Outputs, Runner, open_model


@dataclass(slots=True)
class Comparison:
    """Running sums of the difference between the outputs of a reference and of another model.

    :func:`.differences.compared_outputs` says which outputs are compared.
    """

    signal: float = 0.0
    noise: float = 0.0
    equal_argmax: float = 0.0
    compared: int = 0
    samples: int = 0
    first: str | None = field(default=None)
    varying: float | None = None
    """The power of the outputs around their means over samples; ``None``: the whole ``signal``."""
    open_axes: dict[str, int] = field(default_factory=dict)
    """Axis of data-dependent size, by output; the rows of such an output are compared in any order."""

    def add(self, reference: Outputs, other: Outputs, key: str) -> None:
        """Add one sample.

        Raises:
            ExportError: an output is missing, has another shape in more than one axis, or is not finite where
                the reference is.
        """
        for name, expected in reference.items():
            got = other.get(name)
            axis = None if got is None else open_axis(expected, got)
            if axis is not None:
                self.open_axes.setdefault(name, axis)
            elif got is None or got.shape != expected.shape:
                shape = "nothing" if got is None else f"shape {got.shape}"
                raise ExportError(
                    f"output {name!r} on sample {key}: {shape}, the original gives shape {expected.shape}"
                )
        names, real = compared_outputs(reference)
        for name in names:
            expected, got = reference[name], other[name]
            if real and not np.isfinite(got).all() and not self._may_be_infinite(name, expected, got):
                raise ExportError(f"output {name!r} on sample {key}: NaN or infinity, the original has none")
            found = self._difference(name, expected, got, real=real)
            self.signal += found.signal
            self.noise += found.noise
            if found.equal is not None and self.first in (None, name):
                self.first = name
                self.equal_argmax += found.equal
                self.compared += 1
            elif real and name not in self.open_axes:
                self._add_argmax(name, expected, got)
        self.samples += 1

    def _may_be_infinite(self, name: str, expected: Array, got: Array) -> bool:
        """Whether ``got`` is finite wherever the reference is."""
        if name in self.open_axes:
            return not np.isfinite(expected).all()
        return bool(np.isfinite(got[np.isfinite(expected)]).all())

    def _difference(self, name: str, expected: Array, got: Array, *, real: bool) -> Difference:
        if name not in self.open_axes:
            return numeric_difference(expected, got) if real else discrete_difference(expected, got)
        rows = as_rows(expected, self.open_axes[name]), as_rows(got, self.open_axes[name])
        return numeric_row_difference(*rows) if real else discrete_row_difference(*rows)

    def _add_argmax(self, name: str, expected: Array, got: Array) -> None:
        """Use the first numeric output with a last axis of two or more as class scores."""
        if self.first is None and expected.ndim and expected.shape[-1] > 1:
            self.first = name
        if name == self.first and expected.size:
            self.equal_argmax += float((expected.argmax(-1) == got.argmax(-1)).mean())
            self.compared += 1

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio over all samples; ``inf`` when equal."""
        return ratio_db(self.signal, self.noise)

    @property
    def centred_sqnr_db(self) -> float:
        """The same with the varying power as signal: constant parts of outputs do not count."""
        return ratio_db(self.signal if self.varying is None else self.varying, self.noise)

    @property
    def agreement(self) -> float | None:
        """Mean share of equal argmax, or ``None`` without class scores."""
        return self.equal_argmax / self.compared if self.compared else None

    def fidelity(self, metric: float | None = None, metric_name: str | None = None) -> Fidelity:
        """The result for the report."""
        levels = finite(self.sqnr_db), finite(self.centred_sqnr_db)
        return Fidelity(self.samples, levels[0], self.agreement, metric, metric_name, levels[1])


@dataclass(frozen=True, slots=True, eq=False)
class Baseline:
    """Outputs of the original on the evaluation samples, and what is needed to compare others with them."""

    samples: Samples
    runtime: Runtime
    metric: Metric | None
    fidelity: Fidelity
    outputs: list[Outputs]
    varying: float
    """Power of the outputs around their means."""
    shapes: Mapping[str, frozenset[tuple[int, ...]]]
    """All shapes of each input in the samples."""
    open_axes: Mapping[str, int]
    """Axis of data-dependent size, by output."""


def baseline(
    original: Path,
    samples: Samples,
    runtime: Runtime,
    metric: Metric | None,
    on_sample: Callable[[], None] = lambda: None,
) -> Baseline:
    """Run the ``original`` over ``samples``.

    Raises:
        SamplesError: the original fails on a sample, or the metric has no labels.
    """
    runner = open_model(original, runtime)
    outputs: list[Outputs] = []
    shapes: dict[str, set[tuple[int, ...]]] = {}

    def runs() -> Iterator[tuple[Feeds, Outputs]]:
        for sample in samples:
            for name, array in sample.feeds.items():
                shapes.setdefault(name, set()).add(array.shape)
            outputs.append(_outputs(runner, original, sample, SamplesError))
            on_sample()
            yield sample.feeds, outputs[-1]

    open_axes = data_dependent_axes(runs())
    value = metric(outputs, samples.labels) if metric is not None else None
    fidelity = Fidelity(len(outputs), None, 1.0, value, metric.name if metric else None)
    fed = {name: frozenset(found) for name, found in shapes.items()}
    return Baseline(samples, runtime, metric, fidelity, outputs, varying_power(outputs), fed, open_axes)


def check(model: Path, reference: Baseline, on_sample: Callable[[], None] = lambda: None) -> Fidelity:
    """Fidelity of ``model`` to the original over the same samples, with the metric if there is one.

    Raises:
        ExportError: the model fails where the original does not.
    """
    return check_together({"": model}, reference, on_sample)[0][""]


def check_together(
    models: Mapping[str, Path], reference: Baseline, on_sample: Callable[[], None] = lambda: None
) -> tuple[dict[str, Fidelity], tuple[Parity, ...]]:
    """Fidelity of each of ``models``, by name, to the original, and of each to those before it.

    Outputs are kept only for a metric, which needs all of them.

    Raises:
        ExportError: a model fails where the original does not.
    """
    samples, metric = reference.samples, reference.metric
    runners = {name: open_model(path, reference.runtime) for name, path in models.items()}
    open_axes = reference.open_axes
    to_original = {n: Comparison(varying=reference.varying, open_axes=dict(open_axes)) for n in models}
    pairs = {pair: Comparison(open_axes=dict(open_axes)) for pair in combinations(models, 2)}
    kept: dict[str, list[Outputs]] = {name: [] for name in models}
    for expected, sample in zip(reference.outputs, samples, strict=True):
        found = {n: _outputs(runner, models[n], sample, ExportError) for n, runner in runners.items()}
        for name, outputs in found.items():
            to_original[name].add(expected, outputs, sample.key)
            if metric is not None:
                kept[name].append(outputs)
        for (first, second), comparison in pairs.items():
            comparison.add(found[first], found[second], sample.key)
        on_sample()
    values = {n: metric(kept[n], samples.labels) if metric is not None else None for n in models}
    metric_name = metric.name if metric else None
    fidelity = {name: c.fidelity(values[name], metric_name) for name, c in to_original.items()}
    parity = (Parity(b, a, finite(c.sqnr_db), c.agreement) for (a, b), c in pairs.items())
    return fidelity, tuple(parity)


def compare_outputs(reference: Sequence[Outputs], runner: Runner, feeds: Sequence[Feeds]) -> Comparison:
    """Compare a model's outputs on a few ``feeds`` with kept ``reference`` outputs.

    Raises:
        ModelError: the runtime fails to run the model.
    """
    comparison = Comparison(open_axes=data_dependent_axes(zip(feeds, reference, strict=True)))
    for index, (expected, feed) in enumerate(zip(reference, feeds, strict=True)):
        try:
            found = runner.run(feed)
        except Exception as error:  # the runtimes' exceptions have no common base class
            raise ModelError(f"the runtime fails to run it: {str(error).splitlines()[0]}") from error
        comparison.add(expected, found, f"probe {index}")
    return comparison


def _outputs(runner: Runner, model: Path, sample: Sample, failure: type[EdgepackError]) -> Outputs:
    """The outputs on one sample; a failure of the model raises ``failure``."""
    try:
        return runner.run(sample.feeds)
    except Exception as error:  # the runtimes' exceptions have no common base class
        # An EdgepackError names the file already.
        place = "" if isinstance(error, EdgepackError) else f"{model} fails on it: "
        raise failure(f"sample {sample.key}: {place}{str(error).splitlines()[0]}") from error
