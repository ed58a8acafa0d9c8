"""Trials: forms of a model that are built, timed against the original, compared with it, and weighed."""

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
"""A difference below this is not worth a decision: two runs of one file differ by as much."""
SIZE_WEIGHT = 0.2
"""In the balance a file four times smaller outweighs a model 1.3 times slower; see docs/decisions."""
NOISE_WEIGHT = 0.087
"""In the balance 6 dB of fidelity outweigh 6% of the time."""
CLEAN_DB = 30.0
"""Fidelity beyond this buys nothing: no metric of any model here moved by it."""
NOISY_DB = 15.0
"""So far below that is the floor of fidelity that stands in for a metric."""
ROUNDS = 25
FEWEST_ROUNDS = 8
TRIAL_SECONDS = 4.0
"""For timing one form, where fewer rounds can keep to it: slow models vary less."""
CALLS_PER_ROUND = 5
DEVICE_PROBES = 4
"""Probes that go to a device."""
NOISE_PROBES = 4
"""Probes that the noise of single groups is measured on."""
PROFILED_RUNS = 10
NEVER = 1e6
FAILURES = (ModelError, ExportError)
"""What says that a form cannot be used: the runtime does not load it, fails to run it, or gives no numbers.
All else, samples that cannot be read for one, is no fault of a form."""
RUN = "whole run"
"""The time of a run among times by group."""


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A built and measured form."""

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
    """How much more an .ort of it takes, where one is shipped: it holds what a runtime folds at load."""


@dataclass(frozen=True, slots=True)
class Floor:
    """The least accuracy that a form must keep."""

    sqnr_db: float | None
    agreement: float | None
    metric_drop: float | None
    original_metric: float | None
    centred_db: float | None = None
    """Of what varies from sample to sample."""

    @property
    def limits_anything(self) -> bool:
        """Whether there is a limit at all that evaluation data could tell of."""
        drop = None if self.original_metric is None else self.metric_drop
        return any(limit is not None for limit in (self.sqnr_db, self.centred_db, self.agreement, drop))

    def least_db(self, constant_db: float) -> float | None:
        """The limits of fidelity as one of plain dB, for outputs whose constant parts are ``constant_db``."""
        limits = [] if self.sqnr_db is None else [self.sqnr_db]
        limits += [] if self.centred_db is None else [self.centred_db + constant_db]
        return max(limits, default=None)

    def on_probes(self, trial: Trial) -> bool:
        """Whether ``trial`` is faithful enough on the probes."""
        return self._faithful(trial.compared)

    def on_evaluation(self, found: Fidelity | None) -> bool:
        """Whether fidelity and metric on the evaluation data keep their limits; true where none was asked."""
        if found is None:
            return True
        return self._faithful(found) and self.on_metric(found)

    def on_metric(self, found: Fidelity) -> bool:
        """Whether the metric keeps its limit; true where there is none."""
        if self.metric_drop is None or self.original_metric is None or found.metric is None:
            return True
        return self.original_metric - found.metric <= self.metric_drop + 1e-9

    def lost(self, found: Fidelity | None) -> float | None:
        """The part of the allowed drop of the metric that is used up; ``None`` where there is no metric."""
        if found is None or found.metric is None or not self.metric_drop or self.original_metric is None:
            return None
        return (self.original_metric - found.metric) / self.metric_drop

    def _faithful(self, found: Fidelity | Comparison) -> bool:
        """Whether the limits of fidelity are kept; equal outputs have no noise, and no dB."""
        limits = (
            (self.sqnr_db, found.sqnr_db),
            (self.centred_db, found.centred_sqnr_db),
            (self.agreement, found.agreement),
        )
        return all(least is None or value is None or value >= least for least, value in limits)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a form costs: time, bytes, or in the balance both and noise too.

    What is slower than the original costs more than all else.
    """

    optimize_for: str
    original_bytes: int
    constant_db: float = 0.0
    """How much of the signal is the same for all samples, see :attr:`TrialBench.constant_db`."""

    def __call__(self, trial: Trial) -> float:
        """The cost as one number; its unit has no meaning."""
        if self.optimize_for == "size":
            return trial.size_bytes + trial.unfolded_bytes
        slower = trial.speedup < 1 - SAME_SPEED - 2 * trial.error
        return self.apart_from_time(trial) / trial.speedup * (NEVER if slower else 1.0)

    def apart_from_time(self, trial: Trial) -> float:
        """What a form of equal speed costs."""
        if self.optimize_for != "balance":
            return 1.0
        size_bytes = trial.size_bytes + trial.unfolded_bytes
        return float((size_bytes / self.original_bytes) ** SIZE_WEIGHT) * self.of_noise(
            trial.compared.sqnr_db
        )

    def judged(self, trial: Trial, lost: float | None) -> float:
        """The cost where the evaluation data tell what noise does.

        ``lost``: the part of the allowed drop of the metric that is used up; ``None`` where that is unknown,
        and then noise itself counts. All of it costs as much as noise at the floor of 15 dB.
        """
        if lost is None or self.optimize_for != "balance":
            return self(trial)
        instead = _noise_factor(CLEAN_DB - NOISY_DB * min(max(lost, 0.0), 1.0))
        return self(trial) / self.of_noise(trial.compared.sqnr_db) * instead

    def of_noise(self, sqnr_db: float) -> float:
        """What noise costs: a factor of 1 for a clean form, more for others."""
        if self.optimize_for != "balance":
            return 1.0
        return _noise_factor(sqnr_db - self.constant_db)


def _noise_factor(centred_db: float) -> float:
    return float(10 ** (max(CLEAN_DB - centred_db, 0.0) / 20 * NOISE_WEIGHT))


@dataclass(slots=True)
class TrialBench:
    """The original, open, and the probes on which every form is timed and compared with it."""

    original: Path
    target: Target
    feeds: Sequence[Feeds]
    folder: Path
    kept_names: Collection[str]
    """Values that keep their names in files, see :func:`edgepack.graph.compact.compact`."""
    kept: Measurements = field(default_factory=Measurements)
    made: int = 0
    timing: DeviceTiming | None = None
    """The device that whole forms are timed on; ``None``: this host will do."""

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
        """Power of the original's outputs on the probes over that of what varies in them, in dB."""
        itself = Comparison()
        for outputs in self._reference:
            itself.add(outputs, outputs, "probe")
        return ratio_db(itself.signal, self._varying) if itself.signal else 0.0

    def measure(self, name: CandidateName, methods: Precisions, plan: QuantPlan, model: ir.Model) -> Trial:
        """Write one form, time it against the original, interleaved, and compare its outputs."""
        path = self._write(model)
        digest = self._digest(path)
        figures = self.kept.get("trial", digest)
        if figures is None:
            try:
                runner = open_model(path, self.target.runtime)
            except ModelError as refusal:  # nobody will see this file: it is told by what it is made of
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
        """What computes as the device does: the session that is timed, where this host's kernels allow it."""
        runtime = for_accuracy(self.target)
        return timed if runtime is self.target.runtime else open_model(path, runtime)

    def as_on_device(self, trials: Sequence[Trial]) -> list[Trial]:
        """``trials`` with their speeds on the device, from one run there; as they are without a device.

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
        """Power of the difference of a form's outputs over that of the original's, on a few probes."""
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
        """A form's file, for as long as it is looked at."""
        path = self._write(model)
        try:
            yield path
        finally:
            path.unlink()

    def group_us(self, trial: Trial, groups: Sequence[FusionGroup]) -> Figures:
        """Microseconds by group in the form ``trial``, and those of a ``RUN``."""
        digest = self._digest(trial.path)
        figures = self.kept.get("units", digest)
        if figures is None:
            profile = profile_ops(trial.path, self.target.runtime, self.feeds, runs=PROFILED_RUNS)
            figures = {**match_groups(groups, profile).us, RUN: profile.run_us}
            self.kept.put(figures, "units", digest)
        return figures

    def confirms(self, trial: Trial, best: Trial, advantage: float = 1.0) -> bool:
        """Whether ``trial`` beats ``best`` beyond noise, side by side in several sessions.

        ``advantage``: how many times as slow it may be for what else is better about it.
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
        """What names a form's measurements: its bytes, or, where none are kept, its file."""
        return path.name if self.kept.path is None else file_digest(path)

    def _write(self, model: ir.Model) -> Path:
        self.made += 1
        path = self.folder / f"trial_{self.made}.onnx"
        save_model(compact(model, self.kept_names), path)
        return path


def trial_db(noise: float) -> float:
    """A power ratio of noise to signal in dB, the other way round: ``inf`` where there is none."""
    return ratio_db(1.0, noise)
