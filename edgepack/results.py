"""Results of a build as frozen types: figures, reasons, verdicts. Text and HTML reports only render them."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

SCHEMA_VERSION = 1
"""Version of ``report.json``. It is incremented when a field is removed or changes its meaning; a new field
does not count, since consumers ignore unknown fields."""


class Cause(StrEnum):
    """The kind of reason for a group's precision."""

    NONE = "none"
    """The group has the requested precision; nothing to explain."""
    REQUEST = "request"
    """The recipe asks for it."""
    CANDIDATE = "candidate"
    """The chosen candidate has this precision."""
    NO_KERNEL = "no_kernel"
    """The target's runtime has no such kernel for the operator."""
    OPERATOR = "operator"
    """A property of the node itself: its attributes, types or constant operands."""
    NEIGHBOURS = "neighbours"
    """The nodes before or after it in the graph."""
    UNMEASURED = "unmeasured"
    """No sample reached it, so there is no range."""
    STORAGE = "storage"
    """The storage format of its constants."""
    SLOWER = "slower"
    """Measured slower in the other precision."""
    NOISIER = "noisier"
    """Measured too noisy in the other precision."""
    FASTER = "faster"
    """A search measured this precision as the better one."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a group has its precision: the cause for programs, the text for people."""

    cause: Cause
    text: str
    summary: str = ""
    """The text without names, by which groups are counted together; ``text`` where empty."""

    def __str__(self) -> str:
        return self.text

    def __bool__(self) -> bool:
        return bool(self.text)


NO_REASON = Reason(Cause.NONE, "")


class Limit(StrEnum):
    """The limits of a gate; the values are those in reports."""

    METRIC_DROP = "metric drop at most"
    SQNR_DB = "fidelity in dB at least"
    CENTRED_SQNR_DB = "fidelity of what varies in dB at least"
    AGREEMENT = "agreement at least"
    BYTES = "bytes at most"
    LATENCY_MS = "latency p50 in ms at most"
    SPEEDUP = "times as fast at least"


@dataclass(frozen=True, slots=True)
class Curve:
    """The loss during a training, subsampled."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    """Mean over the steps since the previous entry."""
    judged_steps: tuple[int, ...]
    """Steps at which the held-out samples were evaluated."""
    judged_losses: tuple[float, ...]
    kept_step: int
    """The step whose weights were kept."""


class Notes(list[str]):
    """Notes of a stage: sentences, and a loss curve if it trained."""

    def __init__(self, sentences: Iterable[str] = (), curve: Curve | None = None) -> None:
        super().__init__(sentences)
        self.curve = curve


@dataclass(frozen=True, slots=True)
class Step:
    """The model after one step of the stage breakdown; all are measured in one run, interleaved."""

    name: str
    """``original``, the name of a pass, or ``quantized``."""
    raw_bytes: int
    """On disk."""
    packed_bytes: int | None
    """As an ``.epk``; ``None`` where it was not packed."""
    resident_bytes: int | None
    """Peak memory that loading and running it adds to a process; ``None`` if unknown."""
    latency_ms_p50: float
    speedup: float
    """Median over rounds of the original's latency divided by this one's."""
    sqnr_db: float | None
    """To the original; ``None`` when the outputs are equal."""
    agreement: float | None
    metric: float | None
    notes: tuple[str, ...] = ()
    """Notes of the pass."""


@dataclass(frozen=True, slots=True)
class Parity:
    """Parity: the difference between two artifacts' outputs, over the evaluation samples."""

    name: str
    against: str
    """The other artifact, whose outputs are the signal."""
    sqnr_db: float | None
    """``None`` when the outputs are equal."""
    agreement: float | None
    """Share of equal argmax, as in :class:`Fidelity`."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An artifact of an optional format to which the model cannot be converted."""

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
    """Median over rounds of the first model's latency divided by this one's."""
    speedup_error: float
    cold_start_ms: float | None
    peak_memory_bytes: int | None
    sha256: str
    """Digest of all outputs as the device computed them: types, shapes and bytes."""
    exact: bool
    """Whether the outputs equal those of the build host bit for bit."""
    sqnr_db: float | None
    """SQNR of the outputs against the host's on the same samples; ``None`` where they are equal."""
    ops_us: Mapping[str, float]
    """Microseconds of a run by operator type, if requested."""
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
    """The reference model first."""


def with_run(runs: Sequence[DeviceRun], run: DeviceRun) -> tuple[DeviceRun, ...]:
    """``runs`` with one more, which replaces an earlier one of the same device."""
    return (*(old for old in runs if old.device != run.device), run)


@dataclass(frozen=True, slots=True)
class StageReport:
    """One stage of the pipeline: its duration and its notes."""

    name: str
    seconds: float
    notes: tuple[str, ...] = ()
    curve: Curve | None = None
    """Loss curve, if the stage trained."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Difference of a model's outputs from the original's, over the evaluation samples."""

    samples: int
    sqnr_db: float | None
    """``None`` when the outputs are equal."""
    agreement: float | None
    """Share of samples with equal argmax over the last axis of the first output; ``None`` if undefined."""
    metric: float | None
    metric_name: str | None
    centred_sqnr_db: float | None = None
    """Centred SQNR: the means of the original's outputs over the samples are subtracted from the signal."""


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
    """Median over rounds of the original's latency divided by this one's."""
    cold_start_ms: float | None
    """``None``, like the memory, if a device did not report it."""
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
    """SQNR of the group's output in the built model against the original's."""
    float_us: float | None = None
    built_us: float | None = None
    cause: Cause = Cause.NONE
    """The kind of ``reason``."""
    summary: str = ""
    """``reason`` without names: groups of one summary are counted together."""


EQUAL_DB = 999.0
"""Value in a gate line for the SQNR of equal outputs, which is infinite."""


@dataclass(frozen=True, slots=True)
class GateLine:
    """One limit of the gate and what was measured."""

    limit: Limit
    bound: float
    measured: float | None
    passed: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """A quantized variant of the whole model that was built and measured before one was chosen.

    Size and speed are ``None`` if the runtime refuses it; ``reason`` has the runtime's message.
    """

    name: str
    size_bytes: int | None
    speedup: float | None
    sqnr_db: float | None
    metric: float | None
    chosen: bool
    reason: str
    of_units: bool = False
    """Whether it differs from another candidate in single groups only."""


@dataclass(frozen=True, slots=True)
class SensitivityRow:
    """One group in one precision, alone in an otherwise float model."""

    name: str
    op_type: str
    method: str
    sqnr_db: float | None
    """SQNR of the model's outputs; ``None`` where they are equal."""
    us: Mapping[str, float]
    """Its time in each candidate of the whole model, microseconds."""


@dataclass(frozen=True, slots=True)
class BuildReport:
    """The whole build."""

    schema_version: int = field(default=SCHEMA_VERSION, kw_only=True)
    """See :data:`SCHEMA_VERSION`."""
    edgepack_version: str
    model: str
    target: str
    command: str
    passed: bool
    models: tuple[ModelFigures, ...]
    """The original first."""
    refused: tuple[Refusal, ...]
    parity: tuple[Parity, ...]
    """Of each artifact to each artifact before it."""
    waterfall: tuple[Step, ...]
    """Stage breakdown: from the original over each pass to the built ``.onnx``."""
    gate: tuple[GateLine, ...]
    candidates: tuple[Candidate, ...]
    units: tuple[GroupRow, ...]
    sensitivity: tuple[SensitivityRow, ...]
    """Groups measured alone, if a search did so."""
    runtime: Mapping[str, Any]
    """How the runtime optimized the built model: fused int8 kernels, leftover Q/DQ, float operators."""
    stages: tuple[StageReport, ...]
    environment: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    devices: tuple[DeviceRun, ...] = ()
    """Runs on devices; file names as in ``models``."""
    notes: tuple[str, ...] = ()
    """Conditions of the measurements that limit their meaning."""

    def to_json(self) -> str:
        """The report as JSON; infinities and NaN never occur in it (RFC 8259)."""
        return json.dumps(asdict(self), indent=1, default=str, allow_nan=False) + "\n"


def step_of(model: ModelFigures, name: str, packed_bytes: int | None) -> Step:
    """A built model, or the original, as a step of the stage breakdown."""
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
    """``value``, or ``None`` where it is infinite or NaN, which JSON cannot represent.

    Noise without any signal gives -999 dB: ``None`` means that there is no noise.
    """
    if value == -math.inf:
        return -EQUAL_DB
    return value if value is not None and math.isfinite(value) else None
