"""The commands that measure existing models: check and bench."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgepack.benchmark.bench import bench
from edgepack.benchmark.environment import environment
from edgepack.benchmark.profile import profile_ops
from edgepack.config.recipe import Data, ImageInput, Recipe
from edgepack.config.target import Runtime, Target
from edgepack.data.samples import open_samples
from edgepack.errors import ConfigError
from edgepack.evaluation.check import baseline, check
from edgepack.evaluation.metrics import resolve_metric
from edgepack.ir.arrays import Feeds
from edgepack.ir.files import load_model, model_bytes
from edgepack.ir.inputs import InputSpec, input_specs
from edgepack.report.tables import or_dash, size_text, time_text
from edgepack.runtime.host import for_accuracy
from edgepack.runtime.runner import open_model

UNKNOWN_SIZE = 1
BENCH_SAMPLES = 16
SHOWN_OPS = 8


def check_models(
    original: Path,
    built: Sequence[Path],
    recipe: Recipe,
    base: Path,
    target: Target,
    progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    """Fidelity of each built model against ``original`` on the recipe's evaluation (or calibration) data.

    Raises:
        ConfigError: there is no data.
        EdgepackError: see :mod:`edgepack.errors`.
    """
    inputs = input_specs(load_model(original))
    data = recipe.evaluation_data or recipe.calibration_data
    if data is None:
        raise ConfigError("no samples to check on: give them with --data, or in the recipe")
    samples = open_samples(data, "evaluation", inputs, recipe.images, base=base)
    metric = resolve_metric(recipe.metric, base) if recipe.metric else None
    progress("check original", 0, 0)
    reference = baseline(original, samples, for_accuracy(target), metric)
    rows = [{"model": str(original), "size_bytes": model_bytes(original), **asdict(reference.fidelity)}]
    for path in built:
        progress(f"check {path.name}", 0, 0)
        fidelity = check(path, reference)
        rows.append({"model": str(path), "size_bytes": _bytes(path), **asdict(fidelity)})
    return rows


def check_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as lines of text, the original first."""
    width = max(len(row["model"]) for row in rows)
    lines = []
    for i, row in enumerate(rows):
        parts = [row["model"].ljust(width), size_text(row["size_bytes"]).rjust(10)]
        if row["metric"] is not None:
            parts.append(f"{row['metric_name']} {row['metric']:.4f}")
        if i:
            parts.append("equal" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB")
            if row["sqnr_db"] is not None:
                parts.append(f"{row['centred_sqnr_db']:.1f} dB centred")
            if row["agreement"] is not None:
                parts.append(f"agreement {row['agreement']:.4f}")
        lines.append("  ".join(parts))
    return "\n".join(lines) + f"\non {rows[0]['samples']} samples\n"


@dataclass(frozen=True, slots=True)
class BenchData:
    """Samples that models are timed on, and the settings to read them."""

    data: Data
    images: Mapping[str, ImageInput]
    base: Path
    """Folder that ``module:function`` references are relative to."""


def bench_data(recipe: Recipe, base: Path, count: int = BENCH_SAMPLES) -> BenchData | None:
    """``count`` of the recipe's calibration samples, evenly spread; ``None`` where it has none."""
    data = recipe.calibration_data
    return None if data is None else BenchData(Data(path=data.path, samples=count), recipe.images, base)


def bench_models(
    models: Sequence[Path],
    data: BenchData | None,
    target: Target,
    *,
    threads: int | None,
    runs: int,
    ops: bool,
) -> list[dict[str, Any]]:
    """Latency of ``models``, interleaved, on ``data`` or on random inputs.

    With ``ops`` also microseconds by operator type, from a profile.

    Raises:
        EdgepackError: see :mod:`edgepack.errors`.
    """
    runtime = target.runtime if threads is None else target.runtime.model_copy(update={"threads": threads})
    feeds = bench_feeds(models, data, runtime)
    if ops and (unknown := [path for path in models if path.suffix == ".tflite"]):
        raise ConfigError(f"{unknown[0]}: its runtime gives no times per operator; run bench without --ops")
    names = {f"{i} {path}": path for i, path in enumerate(models)}
    latencies = bench(names, runtime, feeds, warmup=5, runs=runs)
    facts = {"environment": {**environment(), "threads": runtime.threads}}
    return [
        {
            "model": str(path),
            "size_bytes": _bytes(path),
            **asdict(latencies[name]),
            **({"ops_us": profile_ops(path, runtime, feeds).by_op_type} if ops else {}),
            **(facts if not i else {}),
        }
        for i, (name, path) in enumerate(names.items())
    ]


def bench_feeds(models: Sequence[Path], data: BenchData | None, runtime: Runtime) -> list[Feeds]:
    """Inputs for ``models``: all of ``data``, or one random sample.

    Raises:
        ConfigError, ModelError, SamplesError: the data are broken, or do not fit the models.
    """
    inputs = _inputs(models, runtime)
    if data is None:
        return [random_feed(inputs)]
    samples = open_samples(data.data, "bench", inputs, data.images, base=data.base)
    return [sample.feeds for sample in samples]


def random_feed(inputs: Sequence[InputSpec]) -> Feeds:
    """Standard normal floats and zero integers; symbolic dimensions become 1.

    Raises:
        ConfigError: an input has an unknown rank.
    """
    rng = np.random.default_rng(0)
    feed = {}
    for spec in inputs:
        if spec.shape is None:
            raise ConfigError(f"input {spec.name!r} has an unknown rank; give samples with --data")
        shape = [d if isinstance(d, int) else UNKNOWN_SIZE for d in spec.shape]
        floating = np.issubdtype(spec.dtype, np.floating)
        feed[spec.name] = (rng.standard_normal(shape) if floating else np.zeros(shape)).astype(spec.dtype)
    return feed


def bench_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    width = max(len(row["model"]) for row in rows)
    lines = []
    for row in rows:
        lines.append(
            f"{row['model'].ljust(width)}  {size_text(row['size_bytes']).rjust(10)}  "
            f"p50 {time_text(row['p50_ms']).rjust(9)}  p90 {time_text(row['p90_ms']).rjust(9)}  "
            f"min {time_text(row['min_ms']).rjust(9)}  {row['speedup']:.2f}× as fast  "
            f"cold {or_dash(time_text, row['cold_start_ms'])}  "
            f"memory {or_dash(size_text, row['peak_memory_bytes'])}"
        )
        for op_type, us in list(row.get("ops_us", {}).items())[:SHOWN_OPS]:
            lines.append(f"  {time_text(us / 1e3).rjust(9)}  {op_type}")
    where = rows[0]["environment"]
    lines.append(f"{where['cpu']}, {where['threads']} thread(s), onnxruntime {where['onnxruntime']}")
    return "\n".join(lines) + "\n"


def _inputs(models: Sequence[Path], runtime: Runtime) -> tuple[InputSpec, ...]:
    """The inputs of a .tflite among the models, whose shapes are fixed; else those of the first model."""
    model = next((path for path in models if path.suffix == ".tflite"), models[0])
    return input_specs(load_model(model)) if model.suffix == ".onnx" else open_model(model, runtime).inputs


def _bytes(path: Path) -> int:
    return model_bytes(path) if path.suffix == ".onnx" else path.stat().st_size
