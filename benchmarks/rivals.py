"""Suite tasks built by edgepack and by its rivals from the same samples, measured in one run.

    python benchmarks/rivals.py SUITE_FOLDER [TASK ...] [--work DIR] [--cache DIR]

For each task: `edgepack build --target x86-cpu` with the default preset and with the best one, and each
rival in benchmarks/rival_tools.py in a virtual environment of its own, made once in the cache folder with the
versions below. All models are checked on the evaluation data and timed alternately, on one thread. What does
not install, fails, or writes a file that onnxruntime refuses has a line with the reason. Prints Markdown.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from suite import HERE, recipe_for

from edgepack.benchmark.bench import Latency, bench
from edgepack.benchmark.environment import environment
from edgepack.config.recipe import Recipe, load_recipe
from edgepack.config.target import load_target
from edgepack.data.samples import Samples, open_samples
from edgepack.errors import EdgepackError
from edgepack.evaluation.check import baseline, check
from edgepack.evaluation.metrics import resolve_metric
from edgepack.ir.files import load_model, model_bytes
from edgepack.ir.inputs import input_specs
from edgepack.results import Fidelity
from edgepack.runtime.host import for_accuracy

PRESETS = {"edgepack": "balanced", "edgepack, best": "best"}
TASKS = ("efficientnet_lite0", "fastestdet", "ppocrv4_rec", "minilm_sst2", "dscnn_fsdd", "dlrm_ml100k")
RUNTIME = "onnxruntime==1.32.0"
RUNS = 60
PATIENCE_SECONDS = 900


@dataclass(frozen=True, slots=True)
class Rival:
    """A tool: what it is called in rival_tools.py, and what its environment holds."""

    tool: str
    requirements: tuple[str, ...]


RIVALS: Mapping[str, Rival] = {
    "onnxruntime static, MinMax": Rival("static MinMax", (RUNTIME, "onnx==1.23.2", "sympy")),
    "onnxruntime static, Percentile": Rival("static Percentile", (RUNTIME, "onnx==1.23.2", "sympy")),
    "onnxruntime dynamic": Rival("dynamic", (RUNTIME, "onnx==1.23.2", "sympy")),
    "nncf": Rival("nncf", ("nncf==3.4.0", RUNTIME, "onnx==1.23.2")),
    "amd-quark": Rival("quark", ("amd-quark==0.13", "torch==2.13.0", RUNTIME, "onnx==1.22.0")),
}


def python_of(rival: Rival, cache: Path) -> Path | str:
    """The interpreter of the rival's environment, which is made where it is missing; else why it is not."""
    folder = cache / "-".join(r.replace("==", "-") for r in rival.requirements)
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    venv.create(folder, with_pip=True, clear=True)
    call = [str(python), "-m", "pip", "install", "--quiet", *rival.requirements]
    done = subprocess.run(call, check=False, capture_output=True, text=True)
    if done.returncode:
        return f"does not install: {_last_line(done.stderr)}"
    (folder / "complete").touch()
    return python


def built_by(rival: Rival, python: Path, model: Path, samples: Path, out: Path) -> str:
    """Have the rival write ``out``; empty, or why it did not."""
    files = [str(path.absolute()) for path in (model, samples, out)]
    call = [str(python), str(HERE / "rival_tools.py"), rival.tool, *files]
    # A rival must not see this environment's packages.
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        done = subprocess.run(
            call, check=False, capture_output=True, text=True, env=clean, timeout=PATIENCE_SECONDS,
            cwd=out.parent,  # some leave files of their own where they run
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"fails: not done in {PATIENCE_SECONDS} s"
    if done.returncode < 0:
        return f"fails: killed by signal {-done.returncode}"
    if done.returncode or not out.exists():
        return f"fails: {_last_line(done.stderr)}"
    return ""


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return (lines or ["no message"])[-1][:140].replace("|", "/")


def rows_of(suite: Path, task: str, work: Path, cache: Path) -> Iterator[str]:
    """Markdown rows of one task: the original, edgepack's models, the rivals' models or why there is none."""
    folder = work / task
    folder.mkdir(parents=True, exist_ok=True)
    ours = {name: _ours(suite, task, preset, folder / preset) for name, preset in PRESETS.items()}
    recipe = _recipe(suite, task, work)
    inputs = input_specs(load_model(recipe.model))
    assert recipe.calibration_data is not None
    assert recipe.evaluation_data is not None
    calibration = open_samples(recipe.calibration_data, "calibration", inputs, recipe.images, base=HERE)
    evaluation = open_samples(recipe.evaluation_data, "evaluation", inputs, recipe.images, base=HERE)
    models = {"original": recipe.model, **ours}
    failures = {}
    with tempfile.TemporaryDirectory(dir=folder) as samples:
        for index, sample in enumerate(calibration):
            np.savez(Path(samples) / f"{index:06}.npz", **sample.feeds)  # type: ignore[arg-type]
        for name, rival in RIVALS.items():
            out = folder / f"{name.replace(' ', '_').replace(',', '')}.onnx"
            out.unlink(missing_ok=True)
            python = python_of(rival, cache)
            why = python if isinstance(python, str) else built_by(
                rival, python, recipe.model, Path(samples), out
            )  # fmt: skip
            if why:
                failures[name] = why
            else:
                models[name] = out
    yield from _measured(task, recipe, models, failures, evaluation)


def _ours(suite: Path, task: str, preset: str, out: Path) -> Path:
    call = [sys.executable, str(HERE / "suite.py"), str(suite), task, "-o", str(out), "--preset", preset]
    # A gate that is not met leaves a complete package, which is measured all the same.
    code = subprocess.run(call, check=False, stdout=subprocess.DEVNULL).returncode
    if code not in (0, 1):
        raise SystemExit(f"edgepack build of {task} failed with exit code {code}")
    return out / "model.onnx"


def _measured(
    task: str, recipe: Recipe, models: dict[str, Path], failures: dict[str, str], evaluation: Samples
) -> Iterator[str]:
    target = load_target("x86-cpu")
    metric = resolve_metric(recipe.metric or "", HERE)
    reference = baseline(models["original"], evaluation, for_accuracy(target), metric)
    found = {"original": reference.fidelity}
    for name, path in list(models.items())[1:]:
        try:
            found[name] = check(path, reference)
        except EdgepackError as error:
            said = str(error).splitlines()[0].replace(f"{path}: ", "").replace(str(path), path.name)
            failures[name] = _last_line(said)
    feeds = [sample.feeds for _, sample in zip(range(16), evaluation, strict=False)]
    times = bench({n: models[n] for n in found}, target.runtime, feeds, warmup=5, runs=RUNS)
    original = model_bytes(models["original"])
    for name, fidelity in found.items():
        yield _row(task, name, fidelity, original / model_bytes(models[name]), times[name])
    for name, why in failures.items():
        yield f"| {task} | {name} | {why} | | | | | |"


def _row(task: str, name: str, fidelity: Fidelity, smaller: float, times: Latency) -> str:
    level = agreement = ""
    if name != "original":
        level = "equal" if fidelity.sqnr_db is None else f"{fidelity.sqnr_db:.1f}"
        agreement = "" if fidelity.agreement is None else f"{fidelity.agreement:.4f}"
    return (
        f"| {task} | {name} | {fidelity.metric:.4f} | {level} | {agreement} | {smaller:.2f}× | "
        f"{times.p50_ms:.3f} | {times.speedup:.2f}× |"
    )


def _recipe(suite: Path, task: str, work: Path) -> Recipe:
    file = work / f"{task}.yaml"
    file.write_text(recipe_for(suite, task), encoding="utf-8")
    return load_recipe(file, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--work", type=Path, help="where models are left; a temporary folder by default")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "edgepack-rivals")
    args = parser.parse_args()
    os.environ["EDGEPACK_SUITE"] = str(args.suite.absolute())
    work = args.work or Path(tempfile.mkdtemp(prefix="edgepack-rivals-"))
    work.mkdir(parents=True, exist_ok=True)
    columns = ("task", "model", "metric", "SQNR dB", "agreement", "smaller", "ms", "as fast")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for task in args.tasks:
        for row in rows_of(args.suite, task, work, args.cache):
            print(row, flush=True)
    where = environment()
    versions = sorted({r for rival in RIVALS.values() for r in rival.requirements})
    print(
        f"\n{where['cpu']} ({', '.join(where['flags'])}), one thread, onnxruntime {where['onnxruntime']}, "
        f"{RUNS} rounds taking turns; {', '.join(versions)}"
    )


if __name__ == "__main__":
    main()
