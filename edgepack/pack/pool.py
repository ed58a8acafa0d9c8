"""A pool: several models that store equal tensors, or similar ones within an error bound, once.

The models are plain ``.onnx`` files that refer to one shared file of weights. onnxruntime memory-maps that
file, so processes that run models of one pool share its pages.
"""

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from edgepack.errors import ConfigError, ExportError
from edgepack.ir.files import load_model, model_bytes
from edgepack.ir.model import clone, dims
from edgepack.pack.spans import PIECE
from edgepack.results import Fidelity, GateLine

Array = npt.NDArray[Any]

WEIGHTS = "weights.bin"
LEAST_BYTES = 256
"""Smaller tensors stay in their model: a reference with its alignment takes as many bytes."""
PAGE_BYTES = 4096
ALIGNED_BYTES = 1 << 16
"""Larger tensors start at a page boundary, the others at a cache line of 64 bytes."""
SIMILAR_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.INT8)
"""Types for which a relative error is meaningful: int8 weights have no zero point. Others must be equal."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A pooled model, measured and compared with its gate."""

    samples: str
    """The samples that it was evaluated on."""
    original: Fidelity
    """The reference: the original of a build, or the model itself before pooling."""
    before: Fidelity
    """The model before pooling."""
    pooled: Fidelity
    moved_db: float | None
    """Fidelity of the pooled outputs to those before pooling; ``None`` where they are equal."""
    gate: tuple[GateLine, ...]

    @property
    def passed(self) -> bool:
        """Whether every limit of the gate is met."""
        return all(line.passed for line in self.gate)


Judge = Callable[[int, Path, bool], Verdict | None]
"""Evaluates the model of that number from its file in the pool; the flag says whether its tensors have
changed. Returns ``None`` if there is no reference."""


@dataclass(frozen=True, slots=True)
class SharedTensor:
    """A tensor that is not stored, because another one replaces it."""

    tensor: str
    stands_for: str
    """``model: tensor``, the stored one."""
    size_bytes: int
    relative_error: float
    """Norm of the difference of stored values, relative to the norm of the tensor; 0 where equal."""


@dataclass(frozen=True, slots=True)
class PooledModel:
    """One model of a pool."""

    source: Path
    file: str
    raw_bytes: int
    """Of the model before pooling, with its external data."""
    stored_bytes: int
    """Bytes of the pool's weights that are stored because of this model."""
    shared: tuple[SharedTensor, ...]
    relative_error: float
    """Relative error over all weights of the model in the pool."""
    verdict: Verdict | None = None
    """``None`` where it was not evaluated."""
    note: str = ""
    """Why it keeps tensors that similar ones could replace."""


@dataclass(frozen=True, slots=True)
class Pool:
    """The result of pooling."""

    folder: Path
    """Written only if every model has ``passed``."""
    models: tuple[PooledModel, ...]
    raw_bytes: int
    pool_bytes: int

    @property
    def passed(self) -> bool:
        """Whether every model that was evaluated passes its gate."""
        return all(model.verdict is None or model.verdict.passed for model in self.models)


@dataclass(slots=True)
class _Stored:
    owner: str
    model: int
    dtype: ir.DataType
    shape: tuple[int, ...]
    offset: int
    length: int
    norm: float


@dataclass(slots=True)
class _Weights:
    """Writes the file of weights."""

    file: BinaryIO
    end: int = 0
    equal: dict[tuple[int, bytes], _Stored] = field(default_factory=dict)
    by_form: dict[tuple[ir.DataType, tuple[int, ...]], list[_Stored]] = field(default_factory=dict)

    def add(self, raw: Array, stored: _Stored, digest: bytes) -> _Stored:
        """Append a tensor."""
        step = PAGE_BYTES if stored.length >= ALIGNED_BYTES else 64
        stored.offset = -(-self.end // step) * step
        self.file.write(bytes(stored.offset - self.end))
        self.file.write(raw.data)
        self.end = stored.offset + stored.length
        self.equal[stored.length, digest] = stored
        self.by_form.setdefault((stored.dtype, stored.shape), []).append(stored)
        return stored

    def read(self, stored: _Stored) -> Array:
        """The content of a tensor, memory-mapped."""
        self.file.flush()
        return np.memmap(self.file.name, np.uint8, "r", stored.offset, (stored.length,))


def make_pool(
    models: Sequence[Path], folder: Path, *, within: float = 0.0, judge: Judge | None = None
) -> Pool:
    """Write ``models`` and their shared weights to ``folder``, which must be new or empty.

    If a model fails its gate with similar tensors, it keeps its own, shares equal ones only, and is evaluated
    again. If a model fails with equal tensors only, which do not change it, nothing is written.

    Args:
        models: the files; of similar tensors, the one of the earlier model replaces that of the later one.
        folder: the pool.
        within: largest relative error of a replaced tensor; 0 shares equal tensors only.
        judge: evaluates a model from its file in the pool.

    Raises:
        ConfigError: ambiguous names, or an error bound outside of [0, 1).
        ModelError: a model cannot be read.
        ExportError: the folder is not empty, or a file cannot be written; no partial file remains then.
        EdgepackError: whatever ``judge`` raises.
    """
    folder = Path(folder).absolute()
    names = pool_names(models)
    if not 0 <= within < 1:
        raise ConfigError(f"--within {within}: give a relative error from 0 to below 1, such as 0.01")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder}: exists and is not an empty folder; name another with -o")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pool-", dir=folder.parent) as scratch:
            exact: dict[int, str] = {}
            for attempt in range(len(models) + 1):
                draft = Path(scratch) / f"pool{attempt}"
                pooled = _write_pool(models, names, draft, within, exact)
                pooled = [_judged(number, model, draft, judge) for number, model in enumerate(pooled)]
                if not (failed := _too_far_off(pooled)):
                    break
                exact |= failed
            size = sum(file.stat().st_size for file in draft.iterdir())
            pool = Pool(folder, tuple(pooled), sum(model.raw_bytes for model in pooled), size)
            if pool.passed:
                draft.replace(folder)
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written: {error.strerror}") from error
    return pool


def pool_names(models: Sequence[Path]) -> list[str]:
    """File names in the pool: the models' own if they differ, else prefixed with their folders.

    Raises:
        ConfigError: the names with folders are equal too.
    """
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        names = [f"{model.absolute().parent.name}-{model.name}" for model in models]
    if len(set(names)) < len(names) or WEIGHTS in names:
        raise ConfigError("two models of one name in folders of one name; rename one of them")
    return names


def _too_far_off(models: Sequence[PooledModel]) -> dict[int, str]:
    """The models that fail with similar tensors, by number, with the message."""
    return {
        number: f"{_miss(model.verdict)} with similar tensors: keeps its own"
        for number, model in enumerate(models)
        if model.relative_error and model.verdict is not None and not model.verdict.passed
    }


def _miss(verdict: Verdict) -> str:
    line = next(line for line in verdict.gate if not line.passed)
    measured = "not measured" if line.measured is None else f"{line.measured:.4g}"
    return f"{line.limit} {line.bound:.4g}, {measured}"


def _judged(number: int, model: PooledModel, folder: Path, judge: Judge | None) -> PooledModel:
    if judge is None:
        return model
    return replace(model, verdict=judge(number, folder / model.file, bool(model.relative_error)))


def _write_pool(
    models: Sequence[Path], names: Sequence[str], folder: Path, within: float, exact: dict[int, str]
) -> list[PooledModel]:
    folder.mkdir()
    pooled = []
    with (folder / WEIGHTS).open("w+b") as file:
        weights = _Weights(file)
        for number, (path, name) in enumerate(zip(models, names, strict=True)):
            model = clone(load_model(path))
            before = weights.end
            shared, error = _move(model, number, name, weights, 0.0 if number in exact else within)
            ir.save(model, folder / name, format="protobuf")
            pooled.append(
                PooledModel(
                    path, name, model_bytes(path), weights.end - before, tuple(shared), error,
                    note=exact.get(number, ""),
                )
            )  # fmt: skip
    for name in names:
        try:
            onnx.checker.check_model(str(folder / name))
        except onnx.checker.ValidationError as error:
            raise ExportError(f"{name}: the pooled model is not valid: {error}") from error
    return pooled


def _move(
    model: ir.Model, number: int, name: str, weights: _Weights, within: float
) -> tuple[list[SharedTensor], float]:
    """Make each weight of ``model`` refer to the file; returns the replaced tensors, and the error of all."""
    shared: list[SharedTensor] = []
    noise = signal = 0.0
    values = [v for graph in model.graphs() for v in graph.initializers.values()]
    for value in values:
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            continue
        raw = np.frombuffer(tensor.tobytes(), np.uint8)
        if tensor.nbytes < LEAST_BYTES:
            value.const_value = ir.tensor(tensor.numpy().copy(), tensor.dtype, name=tensor.name)
            continue
        digest = hashlib.sha256(raw.data).digest()
        norm = _norm(raw, tensor.dtype)
        new = _Stored(f"{name}: {value.name}", number, tensor.dtype, dims(tensor), 0, len(raw), norm)
        stored, error = weights.equal.get((len(raw), digest)), 0.0
        if stored is None and within:
            stored, error = _similar(raw, new, weights, within)
        if stored is None:
            stored = weights.add(raw, new, digest)
        else:
            shared.append(SharedTensor(str(value.name), stored.owner, len(raw), error))
        signal, noise = signal + norm**2, noise + (error * norm) ** 2
        value.const_value = ir.ExternalTensor(
            WEIGHTS, stored.offset, stored.length, tensor.dtype,
            shape=ir.Shape(dims(tensor)), name=str(tensor.name), base_dir=Path(weights.file.name).parent,
        )  # fmt: skip
    return shared, float(np.sqrt(noise / signal)) if signal else 0.0


def _similar(raw: Array, new: _Stored, weights: _Weights, within: float) -> tuple[_Stored | None, float]:
    """The nearest tensor of an earlier model within the error bound, and its relative error."""
    best: _Stored | None = None
    least = within
    for stored in weights.by_form.get((new.dtype, new.shape), []):
        unlike = abs(stored.norm - new.norm) > within * new.norm
        if stored.model == new.model or new.dtype not in SIMILAR_TYPES or not new.norm or unlike:
            continue
        error = _distance(raw, weights.read(stored), new.dtype) / new.norm
        if error <= least:
            best, least = stored, error
    return best, 0.0 if best is None else least


def _norm(raw: Array, dtype: ir.DataType) -> float:
    return _distance(raw, None, dtype) if dtype in SIMILAR_TYPES else 0.0


def _distance(raw: Array, other: Array | None, dtype: ir.DataType) -> float:
    """Euclidean distance, computed in chunks."""
    total = 0.0
    left = raw.view(dtype.numpy())
    right = None if other is None else other.view(dtype.numpy())
    for at in range(0, len(left), PIECE):
        delta = left[at : at + PIECE].astype(np.float64)
        if right is not None:
            delta = delta - right[at : at + PIECE]
        total += float(delta @ delta)
    return float(np.sqrt(total))
