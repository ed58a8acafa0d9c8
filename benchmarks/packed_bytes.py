"""Where the bytes of an .epk go, and what its sparse weights would take at the least.

    python benchmarks/packed_bytes.py MODEL

Bytes by kind of chunk, then for each int8 weight with zeros: where the others are, at one rate (entropy), at
rates by row and column, and with what is known of the weights before and above as well, each by a logistic
regression whose parameters cost nothing; and which values they are, by entropy.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.ir.files import load_model
from edgepack.ir.model import constant
from edgepack.pack.container import read_chunks
from edgepack.pack.epk import pack

Array = npt.NDArray[Any]
LEAST = 4096
"""Weights of a tensor that is looked at."""
CHUNK_BYTES = 9
"""Before the content of each chunk."""


def entropy_bytes(counts: Array) -> float:
    used = counts[counts > 0]
    return float(-(used * np.log2(used / used.sum())).sum()) / 8


def logistic_bytes(features: list[Array], there: Array) -> float:
    """Bytes of ``there`` where each has the probability that a logistic regression on ``features`` gives."""
    x = np.stack([np.broadcast_to(f, there.shape).ravel() for f in features] + [np.ones(there.size)], axis=1)
    y, w = there.ravel(), np.zeros(len(features) + 1)
    for _ in range(12):  # Newton's method
        p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
        curvature = (x * (p * (1 - p))[:, None]).T @ x + 1e-6 * np.eye(len(w))
        w += np.linalg.solve(curvature, x.T @ (y - p))
    p = np.clip(1 / (1 + np.exp(-np.clip(x @ w, -30, 30))), 1e-6, 1 - 1e-6)
    return float(-np.log2(np.where(y, p, 1 - p)).sum()) / 8


def log_odds(there: Array, axis: int) -> Array:
    share = np.clip(there.mean(axis=axis, keepdims=True), 0.3 / there.shape[axis], 1 - 1e-3)
    return np.asarray(np.log(share / (1 - share)))


def before(there: Array, distance: int, axis: int = 1) -> Array:
    moved = np.roll(there, distance, axis).astype(np.float64)
    moved[(slice(None),) * axis + (slice(0, distance),)] = 0
    return moved


def main(model: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        packed = pack(model, Path(folder) / "m.epk").path
        sizes: Counter[str] = Counter()
        with packed.open("rb") as file:
            for kind, content in read_chunks(file, packed):
                sizes[kind.name] += len(content) + CHUNK_BYTES
        print(f"{packed.stat().st_size:,} bytes: " + ", ".join(f"{k} {v:,}" for k, v in sizes.items()))
    columns = ("weight", "not zero", "one rate", "by row and column", "and neighbours", "values")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    sums = np.zeros(4)
    for value in load_model(model).graph.initializers.values():
        array = constant(value)
        if array is None or array.dtype != np.int8 or array.size < LEAST or array.all() or not array.any():
            continue
        rows = array.reshape(len(array), -1)
        there = rows != 0
        rates = [log_odds(there, 1), log_odds(there, 0)]
        near = [before(there, 1), before(there, 2), np.sum([before(there, i) for i in range(3, 10)], axis=0)]
        found = [
            entropy_bytes(np.bincount(there.ravel())),
            logistic_bytes(rates, there),
            logistic_bytes([*rates, *near, before(there, 1, axis=0)], there),
            entropy_bytes(np.unique(rows[there], return_counts=True)[1]),
        ]
        sums += found
        cells = " | ".join(f"{v:,.0f}" for v in found)
        print(f"| {'×'.join(map(str, array.shape))} | {there.mean():.1%} | {cells} |")
    print(f"| together | | {' | '.join(f'{v:,.0f}' for v in sums)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
