"""What a build knows, as frozen types: figures, reasons, verdicts. Text and HTML only render them."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

SCHEMA_VERSION = 1
"""Of ``report.json``. It is counted up when a field is removed or changes its meaning; a new field does not
count, since readers ignore what they do not know."""


class Cause(StrEnum):
    """What kind of reason a group's precision has."""

    NONE = "none"
    """It has what was asked for, and there is nothing to explain."""
    REQUEST = "request"
    """The recipe asks for it."""
    CANDIDATE = "candidate"
    """The candidate that was chosen has it so."""
    NO_KERNEL = "no_kernel"
    """The target's runtime has no such kernel for the operator."""
    OPERATOR = "operator"
    """What the node itself is: its attributes, types or constant operands."""
    NEIGHBOURS = "neighbours"
    """What is before or behind it in the graph."""
    UNMEASURED = "unmeasured"
    """No sample reached it, so there is no range."""
    STORAGE = "storage"
    """How its constants are stored."""
    SLOWER = "slower"
    """Measured slower in the other precision."""
    NOISIER = "noisier"
    """Measured too noisy in the other precision."""
    FASTER = "faster"
    """A search measured this precision as the better one."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a group has its precision: the cause for programs, the sentence for people."""

    cause: Cause
    text: str
    summary: str = ""
    """The sentence without names, by which groups are counted together; ``text`` where empty."""

    def __str__(self) -> str:
        return self.text

    def __bool__(self) -> bool:
        return bool(self.text)


NO_REASON = Reason(Cause.NONE, "")


class Limit(StrEnum):
    """The limits of a gate; the value is what reports call them."""

    METRIC_DROP = "metric drop at most"
    SQNR_DB = "fidelity in dB at least"
    CENTRED_SQNR_DB = "fidelity of what varies in dB at least"
    AGREEMENT = "agreement at least"
    BYTES = "bytes at most"
    LATENCY_MS = "latency p50 in ms at most"
    SPEEDUP = "times as fast at least"


@dataclass(frozen=True, slots=True)
class Curve:
    """The loss of a training on its way, thinned out."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    """Each the mean of the steps since the one before."""
    judged_steps: tuple[int, ...]
    """After these the samples judged that nothing was trained on."""
    judged_losses: tuple[float, ...]
    kept_step: int
    """The step whose weights were kept."""


class Notes(list[str]):
    """What a stage has to say: sentences, and a curve where it trained."""

    def __init__(self, sentences: Iterable[str] = (), curve: Curve | None = None) -> None:
        super().__init__(sentences)
        self.curve = curve


@dataclass(frozen=True, slots=True)
class Step:
    """The model after one step; all are measured in one run, taking turns."""

    name: str
    """``original``, the name of a pass, or ``quantized``."""
    raw_bytes: int
    """On disk."""
    packed_bytes: int | None
    """As an ``.epk``; ``None`` where it was not packed."""
    resident_bytes: int | None
    """What opening and running it adds to a process, at its peak; ``None`` where that is not known."""
    latency_ms_p50: float
    speedup: float
    """Median over rounds of the original's latency by this one's."""
    sqnr_db: float | None
    """To the original; ``None`` when the outputs are equal."""
    agreement: float | None
    metric: float | None
    notes: tuple[str, ...] = ()
    """What the pass has to say."""


@dataclass(frozen=True, slots=True)
class Parity:
    """How close one artifact's outputs are to another's, over the evaluation samples."""

    name: str
    against: str
    """The other one, whose outputs count as the signal."""
    sqnr_db: float | None
    """``None`` when the outputs are equal."""
    agreement: float | None
    """Share of equal argmax, as in :class:`Fidelity`."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An artifact that the target leaves optional and the model has no form of."""

    format: str
    file: str
    reason: str
    """Names the node."""


@dataclass(frozen=True, slots=True)
class DeviceFigures:
    """Everything that a device measured of one model file."""

    model: str
    size_bytes: int
    p50_ms: float
    p90_ms: float
    min_ms: float
    speedup: float
    """Median over rounds of the first model's latency by this one's."""
    speedup_error: float
    cold_start_ms: float | None
    peak_memory_bytes: int | None
    sha256: str
    """Of all outputs as the device computed them: types, shapes and bytes."""
    exact: bool
    """Whether the outputs are those of the build host to the bit."""
    sqnr_db: float | None
    """Of the outputs against the host's on the same samples; ``None`` where they are equal."""
    ops_us: Mapping[str, float]
    """Microseconds of a run by type of operator, where that was asked for."""
    mean_ms: float | None = None
    """``None`` in reports of versions that did not measure it."""


@dataclass(frozen=True, slots=True)
class DeviceRun:
    """One bench on one device."""

    device: str
    machine: str
    cpu: str
    cores: int | None
    system: str
    python: str
    numpy: str | None
    onnxruntime: str | None
    litert: str | None
    clock_mhz: float | None
    temperature_before_c: float | None
    temperature_after_c: float | None
    threads: int
    samples: int
    date: str
    models: tuple[DeviceFigures, ...]
    """The yardstick first."""


def with_run(runs: Sequence[DeviceRun], run: DeviceRun) -> tuple[DeviceRun, ...]:
    """``runs`` with one more, which takes the place of an earlier one of the same device."""
    return (*(old for old in runs if old.device != run.device), run)


@dataclass(frozen=True, slots=True)
class StageReport:
    """One stage of the line: how long it took and what it has to say."""

    name: str
    seconds: float
    notes: tuple[str, ...] = ()
    curve: Curve | None = None
    """Of the loss, where the stage trained."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How close a model's outputs are to the original's, over the evaluation samples."""

    samples: int
    sqnr_db: float | None
    """``None`` when the outputs are equal."""
    agreement: float | None
    """Share of equal argmax over the last axis of the first output; ``None`` where that has no meaning."""
    metric: float | None
    metric_name: str | None
    centred_sqnr_db: float | None = None
    """``sqnr_db`` with the means of the original's outputs over the samples left out of the signal."""


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """Everything measured of one model file."""

    name: str
    file: str
    size_bytes: int
    latency_ms_p50: float
    latency_ms_p90: float
    latency_ms_min: float
    speedup: float
    """Median over rounds of the original's latency by this one's."""
    cold_start_ms: float | None
    """``None``, like the memory, where a device did not tell."""
    peak_memory_bytes: int | None
    fidelity: Fidelity | None
    packed_bytes: int | None = None
    """As an ``.epk``; ``None`` where it was not packed."""
    packed_file: str | None = None
    """The ``.epk``, where the package has it."""


@dataclass(frozen=True, slots=True)
class GroupRow:
    """One group in the report."""

    name: str
    op_type: str
    method: str
    reason: str
    parameters: int
    sqnr_db: float | None = None
    """Fidelity of the group's output in the built model to the original's."""
    float_us: float | None = None
    built_us: float | None = None
    cause: Cause = Cause.NONE
    """What kind of reason ``reason`` is."""
    summary: str = ""
    """``reason`` without names: groups of one summary are counted together."""


EQUAL_DB = 999.0
"""Stands for the fidelity of equal outputs in a line of the gate: they have no noise, and no dB."""


@dataclass(frozen=True, slots=True)
class GateLine:
    """One limit of the gate and what was measured."""

    limit: Limit
    bound: float
    measured: float | None
    passed: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """A form of the whole model that was built and measured before one was chosen.

    Size and speed are ``None`` where the runtime does not run it; ``reason`` says what it answered.
    """

    name: str
    size_bytes: int | None
    speedup: float | None
    sqnr_db: float | None
    metric: float | None
    chosen: bool
    reason: str
    of_units: bool = False
    """Differs from another candidate in single groups."""


@dataclass(frozen=True, slots=True)
class SensitivityRow:
    """One group in one form, alone in an otherwise float model."""

    name: str
    op_type: str
    method: str
    sqnr_db: float | None
    """Fidelity of the model's outputs; ``None`` where they are equal."""
    us: Mapping[str, float]
    """Its time in every form of the whole model, microseconds."""


@dataclass(frozen=True, slots=True)
class BuildReport:
    """The whole build."""

    schema_version: int = field(default=SCHEMA_VERSION, kw_only=True)
    """Of these fields: :data:`SCHEMA_VERSION`."""
    edgepack_version: str
    model: str
    target: str
    command: str
    passed: bool
    models: tuple[ModelFigures, ...]
    """The original first."""
    refused: tuple[Refusal, ...]
    parity: tuple[Parity, ...]
    """Of each artifact to each before it."""
    waterfall: tuple[Step, ...]
    """From the original over each pass to the built ``.onnx``."""
    gate: tuple[GateLine, ...]
    candidates: tuple[Candidate, ...]
    units: tuple[GroupRow, ...]
    sensitivity: tuple[SensitivityRow, ...]
    """Groups alone, where a search measured them."""
    runtime: Mapping[str, Any]
    """What the runtime made of the built model: fused integer kernels, leftover Q/DQ, float operators."""
    stages: tuple[StageReport, ...]
    environment: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    devices: tuple[DeviceRun, ...] = ()
    """Runs on devices; the files' names as in ``models``."""
    notes: tuple[str, ...] = ()
    """What the figures must be read with."""

    def to_json(self) -> str:
        """The report as JSON; infinities and NaN never occur in it (RFC 8259)."""
        return json.dumps(asdict(self), indent=1, default=str, allow_nan=False) + "\n"


def step_of(model: ModelFigures, name: str, packed_bytes: int | None) -> Step:
    """A built model, or the original, as a step of the waterfall."""
    found = model.fidelity
    return Step(
        name=name,
        raw_bytes=model.size_bytes,
        packed_bytes=packed_bytes,
        resident_bytes=model.peak_memory_bytes,
        latency_ms_p50=model.latency_ms_p50,
        speedup=model.speedup,
        sqnr_db=found.sqnr_db if found else None,
        agreement=found.agreement if found else None,
        metric=found.metric if found else None,
    )


def finite(value: float | None) -> float | None:
    """``value``, or ``None`` where it is infinite or NaN and JSON has no word for it.

    Noise without any signal has -999 dB: ``None`` would say that there is no noise.
    """
    if value == -math.inf:
        return -EQUAL_DB
    return value if value is not None and math.isfinite(value) else None
