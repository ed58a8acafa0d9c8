"""Trials: candidates that are built, timed against the original and compared with it; their cost."""

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import onnx_ir as ir

from edgepack.benchmark.bench import file_ratios, quick_ratios
from edgepack.benchmark.devices.timing import DeviceTiming
from edgepack.benchmark.profile import match_groups, profile_ops
from edgepack.config.target import Target
from edgepack.errors import ExportError, ModelError
from edgepack.evaluation.check import Comparison, compare_outputs
from edgepack.evaluation.variation import varying_power
from edgepack.graph.compact import compact
from edgepack.ir.arrays import Feeds
from edgepack.ir.files import model_bytes, save_model
from edgepack.ir.numerics import ratio_db
from edgepack.quantization.groups import FusionGroup
from edgepack.quantization.plan.types import Precisions, QuantPlan
from edgepack.quantization.weights.stored_constants import unfolded_bytes
from edgepack.results import Fidelity
from edgepack.runtime.host import for_accuracy
from edgepack.runtime.runner import Outputs, Runner, open_model
from edgepack.selection.candidates import CandidateName
from edgepack.selection.history import Figures, Measurements, file_digest

SAME_SPEED = 0.01
"""A smaller difference decides nothing: two runs of one file differ by as much."""
SIZE_WEIGHT = 0.2
"""In the balance a file four times smaller outweighs a model 1.3 times slower; see docs/decisions."""
NOISE_WEIGHT = 0.087
"""In the balance 6 dB of fidelity outweigh 6% of the time."""
CLEAN_DB = 30.0
"""Fidelity above this has no value: it changed no metric of any model tested."""
NOISY_DB = 15.0
"""How far the least fidelity, which replaces a metric where there is none, lies below ``CLEAN_DB``."""
ROUNDS = 25
FEWEST_ROUNDS = 8
TRIAL_SECONDS = 4.0
"""For timing one candidate; a slow model gets fewer rounds, since its times vary less."""
CALLS_PER_ROUND = 5
DEVICE_PROBES = 4
"""Probe samples that are sent to a device."""
NOISE_PROBES = 4
"""Probe samples that the noise of single groups is measured on."""
PROFILED_RUNS = 10
NEVER = 1e6
FAILURES = (ModelError, ExportError)
"""Errors that exclude a candidate: the runtime does not load it, fails to run it, or gives NaN. Other errors,
such as unreadable samples, end the build."""
RUN = "whole run"
"""Key of the time of a whole run among times by group."""


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A candidate that was built and measured."""

    name: CandidateName
    methods: Precisions
    plan: QuantPlan
    path: Path
    size_bytes: int
    speedup: float
    error: float
    """Standard error of ``speedup``."""
    compared: Comparison
    unfolded_bytes: int = 0
    """Additional bytes of an ``.ort``, where one is shipped: it holds constants that are folded at load."""


@dataclass(frozen=True, slots=True)
class Floor:
    """The least accuracy that a candidate must keep."""

    sqnr_db: float | None
    agreement: float | None
    metric_drop: float | None
    original_metric: float | None
    centred_db: float | None = None
    """Limit of the SQNR without the part of the signal that is the same for all samples."""

    @property
    def limits_anything(self) -> bool:
        """Whether there is any limit that the evaluation data can check."""
        drop = None if self.original_metric is None else self.metric_drop
        return any(limit is not None for limit in (self.sqnr_db, self.centred_db, self.agreement, drop))

    def least_db(self, constant_db: float) -> float | None:
        """The limits of fidelity as one SQNR in dB; ``constant_db`` is added to the centred limit."""
        limits = [] if self.sqnr_db is None else [self.sqnr_db]
        limits += [] if self.centred_db is None else [self.centred_db + constant_db]
        return max(limits, default=None)

    def on_probes(self, trial: Trial) -> bool:
        """Whether ``trial`` keeps the limits of fidelity on the probes."""
        return self._faithful(trial.compared)

    def on_evaluation(self, found: Fidelity | None) -> bool:
        """Whether fidelity and metric on the evaluation data keep their limits; true for ``None``."""
        if found is None:
            return True
        return self._faithful(found) and self.on_metric(found)

    def on_metric(self, found: Fidelity) -> bool:
        """Whether the metric keeps its limit; true where there is none."""
        if self.metric_drop is None or self.original_metric is None or found.metric is None:
            return True
        return self.original_metric - found.metric <= self.metric_drop + 1e-9

    def lost(self, found: Fidelity | None) -> float | None:
        """The metric's drop as a share of the allowed drop; ``None`` where there is no metric."""
        if found is None or found.metric is None or not self.metric_drop or self.original_metric is None:
            return None
        return (self.original_metric - found.metric) / self.metric_drop

    def _faithful(self, found: Fidelity | Comparison) -> bool:
        """Whether the limits of fidelity are kept; equal outputs have no SQNR (``None``) and pass."""
        limits = (
            (self.sqnr_db, found.sqnr_db),
            (self.centred_db, found.centred_sqnr_db),
            (self.agreement, found.agreement),
        )
        return all(least is None or value is None or value >= least for least, value in limits)


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a candidate by ``optimize_for``: time, bytes, or for ``balance`` time, bytes and noise.

    A candidate that is slower than the original costs more than any that is not.
    """

    optimize_for: str
    original_bytes: int
    constant_db: float = 0.0
    """See :attr:`TrialBench.constant_db`."""

    def __call__(self, trial: Trial) -> float:
        """The cost as one number without a unit."""
        if self.optimize_for == "size":
            return trial.size_bytes + trial.unfolded_bytes
        slower = trial.speedup < 1 - SAME_SPEED - 2 * trial.error
        return self.apart_from_time(trial) / trial.speedup * (NEVER if slower else 1.0)

    def apart_from_time(self, trial: Trial) -> float:
        """The cost without the factor of time."""
        if self.optimize_for != "balance":
            return 1.0
        size_bytes = trial.size_bytes + trial.unfolded_bytes
        return float((size_bytes / self.original_bytes) ** SIZE_WEIGHT) * self.of_noise(
            trial.compared.sqnr_db
        )

    def judged(self, trial: Trial, lost: float | None) -> float:
        """The cost with the loss of the metric in the place of noise.

        ``lost``: the metric's drop as a share of the allowed drop; ``None`` where it is unknown, and then
        noise counts. A share of 1 costs as much as noise at the least fidelity of 15 dB.
        """
        if lost is None or self.optimize_for != "balance":
            return self(trial)
        instead = _noise_factor(CLEAN_DB - NOISY_DB * min(max(lost, 0.0), 1.0))
        return self(trial) / self.of_noise(trial.compared.sqnr_db) * instead

    def of_noise(self, sqnr_db: float) -> float:
        """The factor for noise: 1 for a clean candidate, more for others."""
        if self.optimize_for != "balance":
            return 1.0
        return _noise_factor(sqnr_db - self.constant_db)


def _noise_factor(centred_db: float) -> float:
    return float(10 ** (max(CLEAN_DB - centred_db, 0.0) / 20 * NOISE_WEIGHT))


@dataclass(slots=True)
class TrialBench:
    """A session of the original, and the probes on which each candidate is timed and compared with it."""

    original: Path
    target: Target
    feeds: Sequence[Feeds]
    folder: Path
    kept_names: Collection[str]
    """Values that keep their names in the files, see :func:`edgepack.graph.compact.compact`."""
    kept: Measurements = field(default_factory=Measurements)
    made: int = 0
    timing: DeviceTiming | None = None
    """The device that candidates are timed on; ``None``: this host."""

    def __post_init__(self) -> None:
        self._runner = open_model(self.original, self.target.runtime)
        started = time.perf_counter()
        self._reference = [self._runner.run(feed) for feed in self.feeds]
        call_seconds = (time.perf_counter() - started) / len(self.feeds)
        self._varying = varying_power(self._reference)
        self.rounds = round(min(max(TRIAL_SECONDS / CALLS_PER_ROUND / call_seconds, FEWEST_ROUNDS), ROUNDS))

    rounds: int = field(init=False)
    _runner: Runner = field(init=False)
    _reference: list[Outputs] = field(init=False)
    _varying: float = field(init=False)

    @property
    def constant_db(self) -> float:
        """Power of the original's outputs on the probes over the power that varies between samples, in dB."""
        itself = Comparison()
        for outputs in self._reference:
            itself.add(outputs, outputs, "probe")
        return ratio_db(itself.signal, self._varying) if itself.signal else 0.0

    def measure(self, name: CandidateName, methods: Precisions, plan: QuantPlan, model: ir.Model) -> Trial:
        """Write one candidate, time it interleaved with the original, and compare its outputs.

        Raises:
            ModelError, ExportError: the runtime does not run it.
        """
        path = self._write(model)
        digest = self._digest(path)
        figures = self.kept.get("trial", digest)
        if figures is None:
            try:
                runner = open_model(path, self.target.runtime)
            except ModelError as refusal:  # a temporary file: the report names the candidate instead
                raise ModelError(str(refusal).removeprefix(f"{path}: ")) from refusal
            compared = compare_outputs(self._reference, self._exact(path, runner), self.feeds)
            ratio = quick_ratios([self._runner, runner], self.feeds, self.rounds)[1]
            figures = {**asdict(compared), "speedup": ratio.speedup, "error": ratio.standard_error}
            self.kept.put(figures, "trial", digest)
        values = {**figures, "varying": self._varying}
        speedup, error = values.pop("speedup"), values.pop("error")
        assert speedup is not None
        assert error is not None
        compared = Comparison(**values)  # type: ignore[arg-type]  # as asdict gave them
        unfolded = unfolded_bytes(model) if "ort" in self.target.formats else 0
        return Trial(name, methods, plan, path, model_bytes(path), speedup, error, compared, unfolded)

    def _exact(self, path: Path, timed: Runner) -> Runner:
        """A session that computes as the device does: the timed one, where this host's kernels are exact."""
        runtime = for_accuracy(self.target)
        return timed if runtime is self.target.runtime else open_model(path, runtime)

    def as_on_device(self, trials: Sequence[Trial]) -> list[Trial]:
        """``trials`` with their speeds on the device, from one run there; unchanged without a device.

        Raises:
            ModelError, DeviceError: the device cannot be reached, or cannot run them.
        """
        if self.timing is None:
            return list(trials)
        files = [self.original, *(trial.path for trial in trials)]
        ratios = self.timing.ratios(files, self.target.runtime, self.feeds[:DEVICE_PROBES])[1:]
        return [
            replace(trial, speedup=ratio.speedup, error=ratio.standard_error)
            for trial, ratio in zip(trials, ratios, strict=True)
        ]

    def noise(self, model: ir.Model) -> float:
        """Noise power of the model's outputs over the power of the original's, on a few probes."""
        with self.written(model) as path:
            digest = self._digest(path)
            figures = self.kept.get("noise", digest)
            if figures is None:
                runner = open_model(path, for_accuracy(self.target))
                compared = compare_outputs(self._reference[:NOISE_PROBES], runner, self.feeds[:NOISE_PROBES])
                figures = {"noise": compared.noise / compared.signal if compared.signal else 0.0}
                self.kept.put(figures, "noise", digest)
        value = figures["noise"]
        assert value is not None
        return value

    @contextmanager
    def written(self, model: ir.Model) -> Iterator[Path]:
        """A temporary file of ``model``."""
        path = self._write(model)
        try:
            yield path
        finally:
            path.unlink()

    def group_us(self, trial: Trial, groups: Sequence[FusionGroup]) -> Figures:
        """Microseconds by group in ``trial``, and of a whole run under ``RUN``."""
        digest = self._digest(trial.path)
        figures = self.kept.get("units", digest)
        if figures is None:
            profile = profile_ops(trial.path, self.target.runtime, self.feeds, runs=PROFILED_RUNS)
            figures = {**match_groups(groups, profile).us, RUN: profile.run_us}
            self.kept.put(figures, "units", digest)
        return figures

    def confirms(self, trial: Trial, best: Trial, advantage: float = 1.0) -> bool:
        """Whether ``trial`` is better than ``best`` beyond timing noise, interleaved in several sessions.

        ``advantage``: how many times as slow ``trial`` may be, since its size and noise cost less.
        """
        pair = (self._digest(trial.path), self._digest(best.path))
        figures = self.kept.get("pair", *pair)
        if figures is None:
            ratio = file_ratios([best.path, trial.path], self.target.runtime, self.feeds, self.rounds)[1]
            figures = {"speedup": ratio.speedup, "error": ratio.standard_error}
            self.kept.put(figures, "pair", *pair)
        speedup, error = figures["speedup"], figures["error"]
        assert speedup is not None
        assert error is not None
        return speedup * advantage > 1 + SAME_SPEED + error

    def _digest(self, path: Path) -> str:
        """The key of a file's measurements: a digest, or its name where measurements are not saved."""
        return path.name if self.kept.path is None else file_digest(path)

    def _write(self, model: ir.Model) -> Path:
        self.made += 1
        path = self.folder / f"trial_{self.made}.onnx"
        save_model(compact(model, self.kept_names), path)
        return path


def trial_db(noise: float) -> float:
    """SQNR in dB from the power of noise over that of the signal; ``inf`` for no noise."""
    return ratio_db(1.0, noise)
