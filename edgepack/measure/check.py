"""Check: how close a built model is to the original, on samples it was not calibrated with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgepack.data import Samples
from edgepack.errors import ExportError, SamplesError
from edgepack.feeds import Array, Feeds
from edgepack.measure.session import open_session, run
from edgepack.metrics import Metric
from edgepack.numerics import ratio_db
from edgepack.report import Fidelity, finite
from edgepack.target import Runtime

if TYPE_CHECKING:
    import onnxruntime as ort

Outputs = dict[str, Array]


@dataclass(slots=True)
class Comparison:
    """Running sums of the difference between a reference's outputs and another's, float outputs only."""

    signal: float = 0.0
    noise: float = 0.0
    equal_argmax: float = 0.0
    compared: int = 0
    samples: int = 0
    first: str | None = field(default=None)

    def add(self, reference: Outputs, other: Outputs, key: str) -> None:
        """Take in one sample.

        Raises:
            ExportError: an output is missing, has another shape, or is not finite where the reference is.
        """
        for name, expected in reference.items():
            got = other.get(name)
            if got is None or got.shape != expected.shape:
                shape = "nothing" if got is None else f"shape {got.shape}"
                raise ExportError(
                    f"output {name!r} on sample {key}: {shape}, the original gives shape {expected.shape}"
                )
            if not np.issubdtype(expected.dtype, np.floating):
                continue
            finite_reference = np.isfinite(expected)
            if not np.isfinite(got[finite_reference]).all():
                raise ExportError(f"output {name!r} on sample {key}: NaN or infinity, the original has none")
            wide = np.where(finite_reference, expected, 0).astype(np.float64)
            self.signal += float((wide**2).sum())
            self.noise += float(((wide - np.where(finite_reference, got, 0)) ** 2).sum())
            self._add_argmax(name, expected, got)
        self.samples += 1

    def _add_argmax(self, name: str, expected: Array, got: Array) -> None:
        """The first float output with a last axis of two or more counts as scores."""
        if self.first is None and expected.ndim and expected.shape[-1] > 1:
            self.first = name
        if name == self.first and expected.size:
            self.equal_argmax += float((expected.argmax(-1) == got.argmax(-1)).mean())
            self.compared += 1

    @property
    def sqnr_db(self) -> float:
        """Signal to noise over everything taken in; ``inf`` when equal."""
        return ratio_db(self.signal, self.noise)

    @property
    def agreement(self) -> float | None:
        """Mean share of equal argmax, or ``None`` without scores."""
        return self.equal_argmax / self.compared if self.compared else None

    def fidelity(self, metric: float | None = None, metric_name: str | None = None) -> Fidelity:
        """The sums as a line of the report."""
        return Fidelity(self.samples, finite(self.sqnr_db), self.agreement, metric, metric_name)


@dataclass(frozen=True, slots=True, eq=False)
class Baseline:
    """The original's outputs on the evaluation samples, kept when a metric needs them all."""

    fidelity: Fidelity
    outputs: list[Outputs]


def baseline(
    original: Path,
    samples: Samples,
    runtime: Runtime,
    metric: Metric | None,
    on_sample: Callable[[], None] = lambda: None,
) -> Baseline:
    """Run the untouched ``original`` over ``samples``.

    Raises:
        SamplesError: the original fails on a sample, or the metric has no labels.
    """
    session = open_session(original, runtime)
    outputs = []
    for _key, result in _outputs(session, samples, on_sample):
        outputs.append(result)
    value = metric(outputs, samples.labels) if metric is not None else None
    return Baseline(Fidelity(len(outputs), None, 1.0, value, metric.name if metric else None), outputs)


def check(
    model: Path,
    samples: Samples,
    runtime: Runtime,
    reference: Baseline,
    metric: Metric | None,
    on_sample: Callable[[], None] = lambda: None,
) -> Fidelity:
    """Fidelity of ``model`` to the original over the same ``samples``, and the metric where there is one.

    Raises:
        ExportError: the model fails where the original does not.
    """
    session = open_session(model, runtime)
    comparison, kept = Comparison(), []
    for expected, (key, result) in zip(reference.outputs, _outputs(session, samples, on_sample), strict=True):
        comparison.add(expected, result, key)
        if metric is not None:
            kept.append(result)
    value = metric(kept, samples.labels) if metric is not None else None
    return comparison.fidelity(value, metric.name if metric else None)


def compare_sessions(
    reference: Sequence[Outputs], session: "ort.InferenceSession", feeds: Sequence[Feeds]
) -> Comparison:
    """A session's outputs on a few ``feeds`` against outputs that were kept."""
    comparison = Comparison()
    for index, (expected, feed) in enumerate(zip(reference, feeds, strict=True)):
        comparison.add(expected, run(session, feed), f"probe {index}")
    return comparison


def _outputs(
    session: "ort.InferenceSession", samples: Samples, on_sample: Callable[[], None]
) -> Iterator[tuple[str, Outputs]]:
    for sample in samples:
        try:
            yield sample.key, run(session, sample.feeds)
        except RuntimeError as error:
            raise SamplesError(
                f"sample {sample.key}: the model fails: {str(error).splitlines()[0]}"
            ) from error
        on_sample()
