"""Bench: latency of several models that take turns, so that what disturbs one disturbs all.

A median of one model alone drifts by several percent on a shared machine; the ratio of two models in the
same round hardly does. Ratios are therefore taken per round, and their median is reported.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgepack.errors import ExportError
from edgepack.feeds import Feeds
from edgepack.measure.session import open_session
from edgepack.target import Runtime

if TYPE_CHECKING:
    import onnxruntime as ort

LEAST_TURN_SECONDS = 1e-3
"""A model faster than this is called several times a turn: a clock reading costs as much as a call."""
COLD_STARTS = 3


@dataclass(frozen=True, slots=True)
class Latency:
    """Times of one model, milliseconds per call."""

    p50_ms: float
    p90_ms: float
    min_ms: float
    mean_ms: float
    runs: int
    speedup: float
    """Median over rounds of the first model's time by this one's."""
    cold_start_ms: float
    """Opening a session and the first call, in a new process; median of three."""
    peak_memory_bytes: int
    """Resident memory that opening and running the model adds to a process, at its peak."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """How much faster than the first model, with what a repeat may differ by."""

    speedup: float
    standard_error: float


def bench(
    models: Mapping[str, Path], runtime: Runtime, feeds: Sequence[Feeds], *, warmup: int, runs: int
) -> dict[str, Latency]:
    """Time ``models``; all get the same feed in a round, and each round begins with another model.

    Raises:
        ModelError: the runtime refuses a model.
        ExportError: a model cannot be run in a process of its own.
    """
    sessions = [open_session(path, runtime) for path in models.values()]
    for _ in range(warmup):
        for session in sessions:
            session.run(None, dict(feeds[0]))
    times = _rounds(sessions, feeds, runs) * 1e3
    starts = {name: cold_start(path, runtime, feeds[0]) for name, path in models.items()}
    return {
        name: Latency(
            p50_ms=float(np.median(column)),
            p90_ms=float(np.percentile(column, 90)),
            min_ms=float(column.min()),
            mean_ms=float(column.mean()),
            runs=runs,
            speedup=float(np.median(times[:, 0] / column)),
            cold_start_ms=starts[name].milliseconds,
            peak_memory_bytes=starts[name].memory_bytes,
        )
        for name, column in zip(models, times.T, strict=True)
    }


def quick_ratios(
    sessions: Sequence["ort.InferenceSession"], feeds: Sequence[Feeds], rounds: int
) -> list[Ratio]:
    """Speed of open ``sessions`` relative to the first, with standard errors of the medians."""
    times = _rounds(sessions, feeds, rounds)
    return [_ratio(times[:, 0] / column) for column in times.T]


def _ratio(ratios: npt.NDArray[np.float64]) -> Ratio:
    # The median's standard error from the spread between quartiles, which outliers do not move.
    low, high = np.percentile(ratios, [25, 75])
    return Ratio(float(np.median(ratios)), float(1.2533 * (high - low) / 1.349 / len(ratios) ** 0.5))


def _rounds(
    sessions: Sequence["ort.InferenceSession"], feeds: Sequence[Feeds], rounds: int
) -> npt.NDArray[np.float64]:
    """Seconds per call, ``[rounds, models]``."""
    calls = [_calls_per_turn(session, feeds[0]) for session in sessions]
    times = np.zeros((rounds, len(sessions)))
    for r in range(rounds):
        feed = dict(feeds[r % len(feeds)])
        for offset in range(len(sessions)):
            j = (r + offset) % len(sessions)
            # The model that ran before has the caches: one call that does not count brings them back.
            sessions[j].run(None, feed)
            started = time.perf_counter()
            for _ in range(calls[j]):
                sessions[j].run(None, feed)
            times[r, j] = (time.perf_counter() - started) / calls[j]
    return times


def _calls_per_turn(session: "ort.InferenceSession", feed: Feeds) -> int:
    session.run(None, dict(feed))
    started = time.perf_counter()
    session.run(None, dict(feed))
    return max(1, min(200, round(LEAST_TURN_SECONDS / max(time.perf_counter() - started, 1e-7))))


@dataclass(frozen=True, slots=True)
class ColdStart:
    """What a new process pays for the first result."""

    milliseconds: float
    memory_bytes: int


def cold_start(model: Path, runtime: Runtime, feed: Feeds) -> ColdStart:
    """Open and run ``model`` once in processes of their own.

    Raises:
        ExportError: the process fails.
    """
    with tempfile.TemporaryDirectory(prefix="edgepack-cold-") as folder:
        inputs = Path(folder) / "feed.npz"
        np.savez(inputs, allow_pickle=False, **feed)
        command = [
            sys.executable, "-m", "edgepack.measure.cold", str(model.absolute()), str(inputs),
            runtime.model_dump_json(),
        ]  # fmt: skip
        results = []
        for _ in range(COLD_STARTS):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                raise ExportError(f"{model}: cannot be run in a process of its own: {reason}")
            results.append(json.loads(done.stdout))
    return ColdStart(
        float(np.median([r["milliseconds"] for r in results])), int(max(r["memory_bytes"] for r in results))
    )
