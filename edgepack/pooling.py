"""The command that packs: one model into one file, several into a pool whose outputs are compared."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgepack.compare import random_feed
from edgepack.config import Data
from edgepack.data import open_samples
from edgepack.errors import ConfigError
from edgepack.lines import size_text, table
from edgepack.measure.check import compare_outputs
from edgepack.measure.runner import open_model
from edgepack.model import input_specs, load_model
from edgepack.pack.epk import SUFFIX, Packed, pack
from edgepack.pack.pool import Pool, PooledModel, make_pool
from edgepack.target import Runtime

SAMPLES = 16
"""That outputs are compared on."""
LEAST_DB = 30.0
"""What the outputs of a model with similar tensors have to keep, where nothing else is asked for."""
SHOWN_TIED = 8
FILE_SUFFIXES = (".onnx", ".ort", ".tflite", ".data", ".bin")
"""What nobody calls a folder."""


def pack_models(
    models: Sequence[Path], output: Path, within: float, data: str | None, least_db: float | None
) -> Packed | Pool:
    """Pack one model into an ``.epk``, or several into a pool folder; ``output`` says which.

    Raises:
        ConfigError: the output fits neither.
        EdgepackError: see :mod:`edgepack.errors`.
    """
    if output.suffix.lower() == SUFFIX:
        if len(models) != 1:
            raise ConfigError(f"{output}: holds one model; for several name a folder, which becomes a pool")
        if within or data or least_db is not None:
            raise ConfigError(f"{output}: restores every byte; --within and --data are for pools")
        return pack(models[0], output)
    if output.suffix in FILE_SUFFIXES:
        raise ConfigError(f"{output}: name a {SUFFIX} file, or a folder for a pool")
    runtime = Runtime()

    def verify(original: Path, pooled: Path) -> float:
        inputs = input_specs(load_model(original))
        feeds = [random_feed(inputs)]
        if data is not None:
            samples = open_samples(Data(path=data, samples=SAMPLES), "comparison", inputs, {}, base=Path())
            feeds = [sample.feeds for sample in samples]
        reference = open_model(original, runtime)
        outputs = [reference.run(feed) for feed in feeds]
        return compare_outputs(outputs, open_model(pooled, runtime), feeds).sqnr_db

    floor = LEAST_DB if least_db is None else least_db
    return make_pool(models, output, within=within, verify=verify, least_db=floor)


def facts(result: Packed | Pool) -> dict[str, Any]:
    """The result for JSON."""
    if isinstance(result, Packed):
        return {
            "file": str(result.path),
            "raw_bytes": result.raw_bytes,
            "packed_bytes": result.packed_bytes,
            "files": list(result.files),
        }
    return {
        "folder": str(result.folder),
        "raw_bytes": result.raw_bytes,
        "pool_bytes": result.pool_bytes,
        "models": [_model_facts(model) for model in result.models],
    }


def _model_facts(model: PooledModel) -> dict[str, Any]:
    return {
        "source": str(model.source),
        "file": model.file,
        "raw_bytes": model.raw_bytes,
        "stored_bytes": model.stored_bytes,
        "relative_error": model.relative_error,
        "sqnr_db": model.sqnr_db,
        "note": model.note,
        "tied": [
            {
                "tensor": tied.tensor,
                "stands_for": tied.stands_for,
                "bytes": tied.size_bytes,
                "relative_error": tied.relative_error,
            }
            for tied in model.tied
        ],
    }


def text(result: Packed | Pool) -> str:
    """The result as lines."""
    if isinstance(result, Packed):
        ratio = result.raw_bytes / max(result.packed_bytes, 1)
        return (
            f"{result.path}: {size_text(result.raw_bytes)} in {size_text(result.packed_bytes)}, "
            f"{ratio:.2f}× smaller; unpacked again and compared\n"
        )
    rows = [("model", "alone", "adds", "tied", "error of weights", "outputs")]
    for model in result.models:
        similar = [tied for tied in model.tied if tied.relative_error]
        outputs = "equal weights" if model.sqnr_db is None else f"{model.sqnr_db:.1f} dB"
        rows.append(
            (
                model.file,
                size_text(model.raw_bytes),
                size_text(model.stored_bytes),
                f"{len(model.tied) - len(similar)} equal, {len(similar)} similar",
                f"{model.relative_error:.4f}",
                model.note or outputs,
            )
        )
    lines = table(rows)
    for model in result.models:
        similar = sorted((t for t in model.tied if t.relative_error), key=lambda t: -t.relative_error)
        lines += [
            f"{model.file}: {tied.tensor} is {tied.stands_for} within {tied.relative_error:.4f}"
            for tied in similar[:SHOWN_TIED]
        ]
        if len(similar) > SHOWN_TIED:
            lines.append(f"{model.file}: and {len(similar) - SHOWN_TIED} more, nearer")
    ratio = result.pool_bytes / result.raw_bytes
    lines.append(
        f"{result.folder}: {size_text(result.pool_bytes)} for models of {size_text(result.raw_bytes)} "
        f"({ratio:.2f}×)"
    )
    return "\n".join(lines) + "\n"
