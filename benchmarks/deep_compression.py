"""Deep Compression without retraining: prune, cluster, int8, entropy code; a table and a plot.

    python benchmarks/deep_compression.py FOLDER... [--sparsity 0.8 0.85 0.9] [--bits 4] [-o DIR]

FOLDER: model.onnx, calib.npz and eval.npz with labels, as benchmarks/train_nets.py writes them. Each point is
one call of `edgepack build`; the plot, DIR/deep_compression.svg, has packed size against accuracy lost.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

COLORS = ("#1b6ca8", "#c8553d", "#588157")
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 380, 70, 50


def built(folder: Path, sparsity: float, bits: int) -> list[dict[str, Any]]:
    """The waterfall of one build."""
    recipe = {
        "model": str(folder / "model.onnx"),
        "target": "x86-cpu",
        "calibration_data": str(folder / "calib.npz"),
        "evaluation_data": {"path": str(folder / "eval.npz"), "labels": {"array": "label"}},
        "metric": "top1",
        "quantize": {"method": "static"},
        "passes": [{"prune": {"sparsity": sparsity}}, {"cluster": {"bits": bits}}],
        "bench": {"runs": 20},
        "gate": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "edgepack.yaml"
        path.write_text(yaml.safe_dump({**recipe, "output": scratch + "/dist"}), encoding="utf-8")
        call = [sys.executable, "-m", "edgepack", "build", "--recipe", str(path)]
        subprocess.run(call, check=True, stdout=subprocess.DEVNULL)
        steps: list[dict[str, Any]] = json.loads((Path(scratch) / "dist/report.json").read_text())[
            "waterfall"
        ]
        return steps


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
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    columns = ("net", "zeros", "values", "float32", "int8", ".epk", "smaller", "top1", "points", "agreement")
    print(f"| {' | '.join(columns)} | as fast |\n|{'---|' * (len(columns) + 1)}")
    lines: dict[str, list[tuple[float, float]]] = {}
    for folder in arguments.folders:
        for bits in arguments.bits:
            for sparsity in arguments.sparsity:
                first, *_, last = built(folder.absolute(), sparsity, bits)
                times = first["raw_bytes"] / last["packed_bytes"]
                points = 100 * (last["metric"] - first["metric"])
                lines.setdefault(f"{folder.name}, {2**bits} values", []).append((times, -points))
                cells = [
                    folder.name,
                    f"{sparsity:.0%}",
                    2**bits,
                    *(f"{size:,}" for size in (first["raw_bytes"], last["raw_bytes"], last["packed_bytes"])),
                    f"{times:.1f}×",
                    f"{last['metric']:.4f}",
                    f"{points:+.2f}",
                    f"{last['agreement']:.4f}",
                    f"{last['speedup']:.2f}×",
                ]
                print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "deep_compression.svg").write_text(plot(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
