"""Deep Compression: prune, cluster, int8, entropy code, with and without training; a table and a plot.

    python benchmarks/deep_compression.py FOLDER... [--sparsity 0.8 0.85 0.9] [--bits 4] [-o FILE.svg]
    python benchmarks/deep_compression.py FOLDER... --train STEPS STEPS [--seeds 0 1 2] [-o FILE.svg]

FOLDER: model.onnx, calib.npz and eval.npz with labels, as benchmarks/train_nets.py writes them; to train
also train.npz. Each row is one call of `edgepack build`, or one for each seed. --train: so many steps after
pruning and so many after clustering, taught by the original and by labels. The column `judges` is the
accuracy lost on pictures of the training data that only judge. The original has learned those by heart, which
no small net does: rates can be compared there, but more is lost than on pictures that are new to both.

With --done FILE.jsonl builds are noted as they end and not made again: a run that was stopped goes on.
The plot has packed size against accuracy lost.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import yaml

from edgepack.config.target import load_target
from edgepack.runtime.host import for_accuracy
from edgepack.runtime.runner import open_model

COLORS = ("#1b6ca8", "#c8553d", "#588157")
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 380, 70, 50
TUNE: dict[str, Any] = {"batch": 64, "temperature": 4, "features": 0, "level": 0, "labels": 0.3}
TUNE |= {"budget_s": 36000}
LEARNING_RATES = (2e-3, 1e-3)
"""After pruning and after clustering."""


@dataclass(frozen=True)
class Point:
    """One build: from the original to the built model."""

    first: dict[str, Any]
    last: dict[str, Any]
    judges: float | None
    """Points of accuracy that are lost on what only judges."""

    @property
    def times(self) -> float:
        """How much smaller."""
        return float(self.first["raw_bytes"] / self.last["packed_bytes"])

    @property
    def points(self) -> float:
        """Of accuracy, gained."""
        return float(100 * (self.last["metric"] - self.first["metric"]))


def passes(sparsity: float, bits: int, steps: list[int] | None, held_out: float) -> list[dict[str, Any]]:
    """The recipe's passes, with training after both where there are ``steps`` for it."""
    prune, cluster = {"prune": {"sparsity": sparsity}}, {"cluster": {"bits": bits}}
    if steps is None:
        return [prune, cluster]
    first, second = (
        {"tune": {**TUNE, "steps": count, "learning_rate": rate, "held_out": held_out, "threads": 1}}
        for count, rate in zip(steps, LEARNING_RATES, strict=True)
    )
    return [prune, first, cluster, second]


def judged(model: Path, folder: Path) -> float:
    """Accuracy on what judges while training."""
    with np.load(folder / "train.npz") as data:
        every = round(1 / float(data["held_out"]))
        pictures, labels = data["x"][every - 1 :: every, 0], data["label"][every - 1 :: every]
    runner = open_model(model, for_accuracy(load_target("x86-cpu")))
    (entry,) = runner.inputs
    parts = np.array_split(np.arange(len(labels)), max(len(labels) // 50, 1))
    found = np.concatenate(
        [next(iter(runner.run({entry.name: pictures[part]}).values())).argmax(1) for part in parts]
    )
    return float((found == labels).mean())


def built(folder: Path, sparsity: float, bits: int, steps: list[int] | None = None, seed: int = 0) -> Point:
    """One build."""
    held_out = 0.0
    recipe: dict[str, Any] = {
        "model": str(folder / "model.onnx"),
        "target": "x86-cpu",
        "calibration_data": str(folder / "calib.npz"),
        "evaluation_data": {"path": str(folder / "eval.npz"), "labels": {"array": "label"}},
        "metric": "top1",
        "quantize": {"method": "static"},
        "bench": {"runs": 20},
        "gate": {},
        "seed": seed,
    }
    if steps is not None:
        recipe["training_data"] = {"path": str(folder / "train.npz"), "labels": {"array": "label"}}
        with np.load(folder / "train.npz") as data:
            held_out = float(data["held_out"])
    recipe["passes"] = passes(sparsity, bits, steps, held_out)
    with tempfile.TemporaryDirectory() as scratch:
        path, output = Path(scratch) / "edgepack.yaml", Path(scratch) / "dist"
        path.write_text(yaml.safe_dump({**recipe, "output": str(output)}), encoding="utf-8")
        call = [sys.executable, "-m", "edgepack", "build", "--recipe", str(path)]
        subprocess.run(call, check=True, stdout=subprocess.DEVNULL)
        waterfall = json.loads((output / "report.json").read_text())["waterfall"]
        lost = None
        if steps is not None:
            lost = 100 * (judged(folder / "model.onnx", folder) - judged(output / "model.onnx", folder))
    return Point(waterfall[0], waterfall[-1], lost)


def remembered(
    done: Path | None, folder: Path, sparsity: float, bits: int, steps: list[int] | None, seed: int
) -> Point:
    """One build, or what is noted of it in ``done``."""
    key = [folder.name, sparsity, bits, steps, seed]
    notes = done.read_text(encoding="utf-8").splitlines() if done is not None and done.exists() else []
    for note in map(json.loads, notes):
        if note["build"] == key:
            return Point(**note["point"])
    point = built(folder, sparsity, bits, steps, seed)
    if done is not None:
        with done.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"build": key, "point": asdict(point)}) + "\n")
    return point


def cells(points: list[Point]) -> list[str]:
    """The figures of the builds of one row: their means, and where there are several the least and most."""

    def text(values: list[float], form: str) -> str:
        low, high = min(values), max(values)
        several = f" ({low:{form}} to {high:{form}})" if len(values) > 1 else ""
        return f"{mean(values):{form}}{several}"

    first = points[0].first
    sizes = [p.last["packed_bytes"] for p in points]
    made = [
        f"{first['raw_bytes']:,}",
        f"{round(mean(p.last['raw_bytes'] for p in points)):,}",
        text(sizes, ",.0f"),
        f"{first['raw_bytes'] / mean(sizes):.1f}×",
        f"{mean(p.last['metric'] for p in points):.4f}",
        text([p.points for p in points], "+.2f"),
        f"{mean(p.last['agreement'] for p in points):.4f}",
        f"{mean(p.last['speedup'] for p in points):.2f}×",
    ]
    judges = [p.judges for p in points if p.judges is not None]
    return [*made, text([-lost for lost in judges], "+.2f")] if judges else made


def plot(lines: dict[str, list[tuple[float, float]]]) -> str:
    """An SVG: times smaller (log) by points of accuracy lost, a line for each net."""
    points = [p for line in lines.values() for p in line]
    low, high = 10.0, max(p[0] for p in points) * 1.1
    least, most = min(0.0, *(p[1] for p in points)) - 0.2, max(1.0, *(p[1] for p in points)) + 0.2

    def place(times: float, lost: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - 20) * math.log(times / low) / math.log(high / low)
        return x, 20 + (HEIGHT - BOTTOM - 20) * (lost - least) / (most - least)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    ]
    for times in (10, 15, 20, 30, 40, 60, 80):
        if times <= high:
            x, _ = place(times, 0)
            parts.append(f'<path d="M{x:.1f} 20V{HEIGHT - BOTTOM}" stroke="#ddd"/>')
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 30}" text-anchor="middle">{times}×</text>')
    for lost in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0):
        if least <= lost <= most:
            _, y = place(low, lost)
            dashes = ' stroke-dasharray="5 3"' if lost == 0.5 else ""
            color = "#888" if lost == 0.5 else "#ddd"
            parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 20}" stroke="{color}"{dashes}/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{-lost:+.1f}</text>')
    for number, (name, line) in enumerate(lines.items()):
        color = COLORS[number % len(COLORS)]
        at = [place(*p) for p in sorted(line)]
        parts.append(
            f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in at)}" fill="none" stroke="{color}"/>'
        )
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>' for x, y in at]
        parts.append(
            f'<text x="{LEFT + 12}" y="{HEIGHT - BOTTOM - 16 * number - 10}" fill="{color}">{name}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 10}" text-anchor="middle">float32 file by .epk'
        f'</text><text x="14" y="{HEIGHT / 2}" transform="rotate(-90 14 {HEIGHT / 2})" '
        'text-anchor="middle">accuracy, points</text></svg>'
    )
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.7, 0.8, 0.85, 0.9])
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--train", type=int, nargs=2, metavar="STEPS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--done", type=Path, metavar="FILE.jsonl")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    columns = ["net", "zeros", "values", "float32", "int8", ".epk", "smaller", "top1", "points", "agreement"]
    columns += ["as fast", "judges"] if arguments.train else ["as fast"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    lines: dict[str, list[tuple[float, float]]] = {}
    for folder in arguments.folders:
        for bits in arguments.bits:
            for rate in arguments.sparsity:
                wanted = [(folder.absolute(), rate, bits, arguments.train, s) for s in arguments.seeds]
                row = [remembered(arguments.done, *build) for build in wanted]
                line = lines.setdefault(f"{folder.name}, {2**bits} values", [])
                line.append((mean(p.times for p in row), -mean(p.points for p in row)))
                print(
                    f"| {' | '.join([folder.name, f'{rate:.1%}', str(2**bits), *cells(row)])} |", flush=True
                )
    if arguments.output is not None:
        arguments.output.write_text(plot(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
