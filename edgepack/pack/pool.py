"""A pool: several models whose equal tensors, or similar ones within a stated error, are stored once.

The models are plain ``.onnx`` files beside one file of weights that all of them refer to. onnxruntime maps
that file, so processes that run models of one pool share its pages in memory too.
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
"""Smaller tensors stay in their model: a reference with its alignment takes as much."""
PAGE_BYTES = 4096
ALIGNED_BYTES = 1 << 16
"""Larger tensors begin on a page, the others on a cache line of 64 bytes."""
SIMILAR_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.INT8)
"""Stored values that an error means something for: int8 weights have no zero point. Others must be equal."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A model as the pool has it, measured and judged."""

    samples: str
    """What it was run on."""
    original: Fidelity
    """The model that it is compared with: what a build was made of, or itself as it was before."""
    before: Fidelity
    """The model by itself."""
    pooled: Fidelity
    moved_db: float | None
    """Of the pooled outputs to those of the model by itself; ``None`` where they are equal."""
    gate: tuple[GateLine, ...]

    @property
    def passed(self) -> bool:
        """Whether every limit of the gate is met."""
        return all(line.passed for line in self.gate)


Judge = Callable[[int, Path, bool], Verdict | None]
"""Judges the model of that number from its file in the pool; told whether tensors of it have changed.
``None``: there is nothing to judge it by."""


@dataclass(frozen=True, slots=True)
class Tied:
    """A tensor that is not stored, since another stands for it."""

    tensor: str
    stands_for: str
    """``model: tensor`` that is stored."""
    size_bytes: int
    relative_error: float
    """Norm of the difference by the norm of the tensor, of stored values; 0 where equal."""


@dataclass(frozen=True, slots=True)
class PooledModel:
    """One model of a pool."""

    source: Path
    file: str
    raw_bytes: int
    """Of the model by itself, with its external data."""
    stored_bytes: int
    """Of weights that the pool has because of this model."""
    tied: tuple[Tied, ...]
    relative_error: float
    """Over all weights of the model in the pool."""
    verdict: Verdict | None = None
    """``None`` where it was not judged."""
    note: str = ""
    """Why it keeps tensors that others could stand for."""


@dataclass(frozen=True, slots=True)
class Pool:
    """What pooling came to."""

    folder: Path
    """Written only where every model has ``passed``."""
    models: tuple[PooledModel, ...]
    raw_bytes: int
    pool_bytes: int

    @property
    def passed(self) -> bool:
        """Whether every model that was judged meets its gate."""
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
    """The file of weights while it is written."""

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
        """The content of a tensor, mapped."""
        self.file.flush()
        return np.memmap(self.file.name, np.uint8, "r", stored.offset, (stored.length,))


def make_pool(
    models: Sequence[Path], folder: Path, *, within: float = 0.0, judge: Judge | None = None
) -> Pool:
    """Write ``models`` and the weights that they share to ``folder``, which must be new or empty.

    A model that does not pass with similar tensors keeps its own, but for equal ones, and is judged again. If
    one does not pass with those, which is what it was before, nothing is written.

    Args:
        models: the files; where tensors are similar, that of the earlier model stands for the later one.
        folder: the pool.
        within: largest relative error of a tensor that another stands for; 0 takes equal ones only.
        judge: measures a model as the pool has it.

    Raises:
        ConfigError: names that cannot be told apart, or an error out of [0, 1).
        ModelError: a model cannot be read.
        ExportError: the folder has something in it, or the disk refuses; nothing half written is left then.
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
    """File names in the pool: the models' own where they differ, else with their folder before.

    Raises:
        ConfigError: these are equal too.
    """
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        names = [f"{model.absolute().parent.name}-{model.name}" for model in models]
    if len(set(names)) < len(names) or WEIGHTS in names:
        raise ConfigError("two models of one name in folders of one name; rename one of them")
    return names


def _too_far_off(models: Sequence[PooledModel]) -> dict[int, str]:
    """Those that do not pass and have similar tensors, by number, with what there is to say of it."""
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
            tied, error = _move(model, number, name, weights, 0.0 if number in exact else within)
            ir.save(model, folder / name, format="protobuf")
            pooled.append(
                PooledModel(
                    path, name, model_bytes(path), weights.end - before, tuple(tied), error,
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
) -> tuple[list[Tied], float]:
    """Refer each weight of ``model`` to the file; gives those that others stand for, and the error of all."""
    tied: list[Tied] = []
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
            tied.append(Tied(str(value.name), stored.owner, len(raw), error))
        signal, noise = signal + norm**2, noise + (error * norm) ** 2
        value.const_value = ir.ExternalTensor(
            WEIGHTS, stored.offset, stored.length, tensor.dtype,
            shape=ir.Shape(dims(tensor)), name=str(tensor.name), base_dir=Path(weights.file.name).parent,
        )  # fmt: skip
    return tied, float(np.sqrt(noise / signal)) if signal else 0.0


def _similar(raw: Array, new: _Stored, weights: _Weights, within: float) -> tuple[_Stored | None, float]:
    """The nearest tensor of an earlier model that is within the error, and how far it is."""
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
    """Euclidean, a part at a time."""
    total = 0.0
    left = raw.view(dtype.numpy())
    right = None if other is None else other.view(dtype.numpy())
    for at in range(0, len(left), PIECE):
        delta = left[at : at + PIECE].astype(np.float64)
        if right is not None:
            delta = delta - right[at : at + PIECE]
        total += float(delta @ delta)
    return float(np.sqrt(total))
