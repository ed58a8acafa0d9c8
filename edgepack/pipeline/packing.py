"""The command pack: one model into one file, or several into a pool whose outputs are compared."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgepack.errors import ConfigError, ModelError
from edgepack.export.artifacts import FILES
from edgepack.pack.epk import SUFFIX, Packed, pack
from edgepack.pack.pool import Pool, PooledModel, Verdict, make_pool
from edgepack.pipeline.pool_gate import Request, judge_of
from edgepack.pipeline.progress import Progress
from edgepack.report.tables import size_text, table
from edgepack.results import Fidelity, GateLine

NO_REQUEST = Request()
SHOWN_TIED = 8
NOT_POOLED = (".ort", ".tflite", SUFFIX)
FILE_SUFFIXES = (".onnx", ".ort", ".tflite", ".data", ".bin")
"""Suffixes that an output folder must not have."""


def pack_models(
    models: Sequence[Path],
    output: Path,
    within: float = 0.0,
    request: Request = NO_REQUEST,
    progress: Progress = lambda stage, done, total: None,
) -> Packed | Pool:
    """Pack one model into an ``.epk``, or several into a pool, as the suffix of ``output`` says.

    A package's folder is replaced by its ``.onnx``. A pool is not written where one of its models misses its
    gate, see :attr:`Pool.passed`.

    Raises:
        ConfigError: the output fits neither.
        ModelError: a folder is no package.
        EdgepackError: see :mod:`edgepack.errors`.
    """
    models = [_model_of(path) for path in models]
    if output.suffix.lower() == SUFFIX:
        if len(models) != 1:
            raise ConfigError(f"{output}: holds one model; for several models name a folder for a pool")
        if within or request.is_for_a_pool:
            raise ConfigError(
                f"{output}: restores every byte; --within and the options of the gate are only for pools"
            )
        progress(f"pack {models[0].name}", 0, 0)
        return pack(models[0], output)
    if output.suffix in FILE_SUFFIXES:
        raise ConfigError(f"{output}: name a {SUFFIX} file, or a folder for a pool")
    for model in models:
        if model.suffix in NOT_POOLED:
            raise ConfigError(f"{model}: a pool holds .onnx models; other formats have no external data")
    return make_pool(models, output, within=within, judge=judge_of(models, request, progress))


def _model_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    if not (model := path / FILES["onnx"]).is_file():
        raise ModelError(f"{path}: a folder without {model.name}; name a model, or the folder of a package")
    return model


def passes(result: Packed | Pool) -> bool:
    """Whether the result is written; a pool with a model that misses its gate is not."""
    return isinstance(result, Packed) or result.passed


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
        "passed": result.passed,
        "models": [_model_facts(model) for model in result.models],
    }


def _model_facts(model: PooledModel) -> dict[str, Any]:
    return {
        "source": str(model.source),
        "file": model.file,
        "raw_bytes": model.raw_bytes,
        "stored_bytes": model.stored_bytes,
        "relative_error": model.relative_error,
        "verdict": None if model.verdict is None else _verdict_facts(model.verdict),
        "note": model.note,
        "tied": [
            {
                "tensor": tied.tensor,
                "stands_for": tied.stands_for,
                "bytes": tied.size_bytes,
                "relative_error": tied.relative_error,
            }
            for tied in model.shared
        ],
    }


def _verdict_facts(verdict: Verdict) -> dict[str, Any]:
    return {**asdict(verdict), "passed": verdict.passed}


def text(result: Packed | Pool) -> str:
    """The result as text."""
    if isinstance(result, Packed):
        ratio = result.raw_bytes / max(result.packed_bytes, 1)
        return (
            f"{result.path}: {size_text(result.raw_bytes)} in {size_text(result.packed_bytes)}, "
            f"{ratio:.2f}× smaller; unpacked again and compared\n"
        )
    lines = [*_sizes(result.models), *_similar(result.models), *_judged(result.models)]
    ratio = result.pool_bytes / result.raw_bytes
    place = f"{result.folder}{'' if result.passed else ' (not written)'}"
    sizes = f"{size_text(result.pool_bytes)} for models of {size_text(result.raw_bytes)}"
    lines.append(f"{place}: {sizes} ({ratio:.2f}×)")
    return "\n".join(lines) + "\n"


def _sizes(models: Sequence[PooledModel]) -> list[str]:
    rows = [("model", "alone", "adds", "shared tensors", "error of weights", "outputs")]
    for model in models:
        similar = [tied for tied in model.shared if tied.relative_error]
        outputs = "equal weights"
        if model.relative_error:
            outputs = "not compared" if model.verdict is None else _db(model.verdict.moved_db)
        rows.append(
            (
                model.file,
                size_text(model.raw_bytes),
                size_text(model.stored_bytes),
                f"{len(model.shared) - len(similar)} equal, {len(similar)} similar",
                f"{model.relative_error:.4f}",
                outputs,
            )
        )
    return table(rows)


def _similar(models: Sequence[PooledModel]) -> list[str]:
    lines = []
    for model in models:
        if model.note:
            lines.append(f"{model.file}: {model.note}")
        similar = sorted((t for t in model.shared if t.relative_error), key=lambda t: -t.relative_error)
        lines += [
            f"{model.file}: {tied.tensor} shares {tied.stands_for}, relative error {tied.relative_error:.4f}"
            for tied in similar[:SHOWN_TIED]
        ]
        if len(similar) > SHOWN_TIED:
            lines.append(f"{model.file}: and {len(similar) - SHOWN_TIED} more, with smaller errors")
    return lines


def _judged(models: Sequence[PooledModel]) -> list[str]:
    """The figures of each model, against its gate."""
    lines = []
    for model in models:
        verdict = model.verdict
        if verdict is None:
            continue
        lines += ["", f"{model.file}, on {verdict.pooled.samples} samples ({verdict.samples})"]
        rows = [("in the pool", *_figures(verdict.pooled))]
        if verdict.before.sqnr_db is not None:
            rows.insert(0, ("before", *_figures(verdict.before)))
        if verdict.original.metric is not None:
            rows.insert(0, ("original", _figures(verdict.original)[0], "", ""))
        lines += table(rows)
        if verdict.gate:
            lines += table([_gate_row(line, verdict) for line in verdict.gate])
    return lines


def _gate_row(line: GateLine, verdict: Verdict) -> tuple[str, str, str]:
    measured = "not measured" if line.measured is None else f"measured {_measured(line, verdict)}"
    return "ok" if line.passed else "FAIL", f"{line.limit} {line.bound:.4g}", measured


def _figures(found: Fidelity) -> tuple[str, str, str]:
    metric = "" if found.metric is None else f"{found.metric_name} {found.metric:.4f}"
    agreement = "" if found.agreement is None else f"agreement {found.agreement:.4f}"
    return metric, _db(found.sqnr_db), agreement


def _measured(line: GateLine, verdict: Verdict) -> str:
    equal = line.measured is not None and line.measured > 500 and verdict.pooled.sqnr_db is None
    return "equal" if equal else f"{line.measured:.4g}"


def _db(sqnr_db: float | None) -> str:
    return "equal outputs" if sqnr_db is None else f"{sqnr_db:.1f} dB"
