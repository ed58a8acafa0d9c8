"""Latency of several models, interleaved, so that a disturbance affects all of them.

In a round every model has a turn on the same feed, and each round begins with another model. In a turn the
model is called several times, and each call is timed separately; a mean would include other programs' time.
The value of a turn is its fastest call. The ratio of two models is computed within a round, and the median
over the rounds is reported.

Models on one thread are compared by thread time (CPU time of the calling thread), which excludes other
programs. Difference between two sessions of one file, on two busy cores with onnxruntime 1.32 (95% of repeats
are below)::

    rounds                              10      25      50      100
    5 ms a call, wall clock, mean      31%     19%      10%      3%
    5 ms a call, as here              3.4%    1.5%    1.2%     0.5%
    20 µs a call, wall clock, mean     21%    7.6%    1.2%     0.8%
    20 µs a call, as here             0.8%    0.4%    0.3%     0.2%

Sessions of one file differ by their memory addresses, however long they are measured: the speed-up of a 20 µs
model has a standard deviation of 1.5% between pairs of sessions, after 10 rounds and after 50. Files are
therefore measured in five sets of sessions, one after another: 0.7%, and 0.4% for a 5 ms model, at 25 rounds.
That is within 1.5% and 1% in 95% of repeats; more rounds gain little.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgepack.config.target import Runtime
from edgepack.data.feeds import plain
from edgepack.errors import ExportError
from edgepack.ir.arrays import Feeds
from edgepack.runtime.runner import Runner, open_model

Times = npt.NDArray[np.float64]

TURN_SECONDS = 1e-3
"""A fast model is called until this has passed; a slow one ``FEWEST_CALLS`` times."""
FEWEST_CALLS = 2
"""The first call of a turn runs with another model's data in the caches, and is up to four times as slow."""
MOST_CALLS = 50
FEWEST_ROUNDS = 10
"""Least number of rounds, also for slow models."""
SESSIONS = 5
"""Sets of sessions that the rounds on files are divided among."""
COLD_STARTS = 3


@dataclass(frozen=True, slots=True)
class Latency:
    """Times of one model, milliseconds per call, wall clock, without the first call of each turn."""

    p50_ms: float
    p90_ms: float
    min_ms: float
    mean_ms: float | None
    runs: int
    """Rounds; a fast model is called many times in each."""
    speedup: float
    """Median over rounds of the first model's time divided by this one's."""
    speedup_error: float
    """Standard error of ``speedup``."""
    cold_start_ms: float | None
    """Opening a session and the first call, in a new process; median of three, the file in the page cache.
    ``None``, like the memory, where a device does not report it."""
    peak_memory_bytes: int | None
    """Peak resident memory that opening and running the model adds to a process."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Speed relative to the first model, with its standard error."""

    speedup: float
    standard_error: float


@dataclass(frozen=True, slots=True, eq=False)
class Rounds:
    """Seconds of all rounds."""

    best: Times
    """``[rounds, models]``: the fastest call of each turn, by the clock for ratios."""
    calls: tuple[Times, ...]
    """For each model all calls but the first of each turn, by the wall clock."""


def bench(
    models: Mapping[str, Path],
    runtime: Runtime,
    feeds: Sequence[Feeds],
    *,
    warmup: int,
    runs: int,
    seconds: float | None = None,
) -> dict[str, Latency]:
    """Time ``models`` over ``runs`` rounds, on ``feeds`` in turn, after ``warmup`` calls of each session.

    With ``seconds``, slow models get fewer rounds, at least ``FEWEST_ROUNDS``, and one warm-up call, so that
    the measurement takes about that time.

    Raises:
        ModelError: the runtime refuses a model.
        ExportError: a model cannot be run in a separate process.
    """
    if seconds is not None:
        warmup, runs = _within(seconds, list(models.values()), runtime, feeds[0], warmup, runs)
    rounds = _measure_files(list(models.values()), runtime, feeds, runs, warmup)
    starts = [cold_start(path, runtime, feeds[0]) for path in models.values()]
    ratios = [_ratio(rounds.best[:, 0] / column) for column in rounds.best.T]
    return {
        name: Latency(
            p50_ms=float(np.median(calls)) * 1e3,
            p90_ms=float(np.percentile(calls, 90)) * 1e3,
            min_ms=float(calls.min()) * 1e3,
            mean_ms=float(calls.mean()) * 1e3,
            runs=runs,
            speedup=ratio.speedup,
            speedup_error=ratio.standard_error,
            cold_start_ms=start.milliseconds,
            peak_memory_bytes=start.memory_bytes,
        )
        for name, calls, ratio, start in zip(models, rounds.calls, ratios, starts, strict=True)
    }


def _within(
    seconds: float, models: Sequence[Path], runtime: Runtime, feed: Feeds, warmup: int, runs: int
) -> tuple[int, int]:
    """Warm-up calls and rounds that take about ``seconds``."""
    call_seconds = 0.0
    for path in models:
        runner = open_model(path, runtime)
        prepared = runner.prepare(feed)
        runner.call(prepared)
        started = time.perf_counter()
        runner.call(prepared)
        call_seconds += time.perf_counter() - started
    if call_seconds * (FEWEST_CALLS * runs + SESSIONS * warmup) <= seconds:
        return warmup, runs
    rounds = round(seconds / call_seconds - SESSIONS) // FEWEST_CALLS
    return min(warmup, 1), min(max(rounds, FEWEST_ROUNDS), runs)


def quick_ratios(runners: Sequence[Runner], feeds: Sequence[Feeds], rounds: int) -> list[Ratio]:
    """Speed of open models relative to the first, with standard errors of the medians.

    The error holds for these sessions; others of the same files may differ by 2% more, see the module.
    """
    best = measure(runners, feeds, rounds).best
    return [_ratio(best[:, 0] / column) for column in best.T]


def file_ratios(models: Sequence[Path], runtime: Runtime, feeds: Sequence[Feeds], rounds: int) -> list[Ratio]:
    """Speed of ``models`` relative to the first, over several sessions of each, with standard errors.

    Raises:
        ModelError: the runtime refuses a model.
    """
    best = _measure_files(models, runtime, feeds, rounds, warmup=1).best
    return [_ratio(best[:, 0] / column) for column in best.T]


def _ratio(ratios: Times) -> Ratio:
    """The median, and its standard error: the greater of two estimates.

    The first uses the interquartile range, which is robust to outliers but assumes independent rounds. The
    second uses medians of consecutive rounds, which includes lasting disturbances and differences between
    sessions.
    """
    low, high = np.percentile(ratios, [25, 75])
    independent = 1.2533 * (high - low) / 1.349 / len(ratios) ** 0.5
    lasting = 0.0
    if len(ratios) >= 2 * SESSIONS:
        medians = [np.median(block) for block in np.array_split(ratios, SESSIONS)]
        lasting = float(np.std(medians, ddof=1)) / SESSIONS**0.5
    return Ratio(float(np.median(ratios)), float(max(independent, lasting)))


def _measure_files(
    models: Sequence[Path], runtime: Runtime, feeds: Sequence[Feeds], rounds: int, warmup: int
) -> Rounds:
    """Time files over several sets of sessions."""
    parts = []
    for share in np.array_split(np.arange(rounds), min(SESSIONS, rounds)):
        runners = [open_model(path, runtime) for path in models]
        for _ in range(warmup):
            for runner in runners:
                runner.call(runner.prepare(feeds[0]))
        parts.append(measure(runners, feeds, len(share), first=int(share[0])))
    calls = zip(*(part.calls for part in parts), strict=True)
    return Rounds(np.concatenate([part.best for part in parts]), tuple(np.concatenate(own) for own in calls))


def measure(runners: Sequence[Runner], feeds: Sequence[Feeds], rounds: int, *, first: int = 0) -> Rounds:
    """Time open models, interleaved; ``first`` is the number of the first round.

    The times exclude the application's preparation of inputs, such as quantizing them for a file with integer
    inputs.
    """
    clock = _clock(runners)
    turns = [_calls_per_turn(runner, feeds[0]) for runner in runners]
    best = np.zeros((rounds, len(runners)))
    calls: list[Times] = [np.zeros((rounds, turn - 1)) for turn in turns]
    for index in range(rounds):
        feed = feeds[(first + index) % len(feeds)]
        for offset in range(len(runners)):
            j = (first + index + offset) % len(runners)
            wall, own = _turn(runners[j], feed, turns[j], clock)
            calls[j][index] = wall[1:]
            best[index, j] = min(own)
    return Rounds(best, tuple(column.ravel() for column in calls))


def _turn(
    runner: Runner, feed: Feeds, calls: int, clock: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Seconds of each call, by the wall clock and by ``clock``."""
    prepared = runner.prepare(feed)
    wall, own = [], []
    for _ in range(calls):
        started, began = time.perf_counter(), clock()
        runner.call(prepared)
        ended = clock()
        wall.append(time.perf_counter() - started)
        # A call can be shorter than the clock's resolution; a ratio must not divide by zero.
        own.append(max(ended - began, 1e-9))
    return wall, own


def _clock(runners: Sequence[Runner]) -> Callable[[], float]:
    """Thread time where all models run in the calling thread only, else the wall clock."""
    return time.thread_time if all(runner.one_thread for runner in runners) else time.perf_counter


def _calls_per_turn(runner: Runner, feed: Feeds) -> int:
    wall, _ = _turn(runner, feed, 3, time.perf_counter)
    return max(FEWEST_CALLS, min(MOST_CALLS, round(TURN_SECONDS / min(wall))))


@dataclass(frozen=True, slots=True)
class ColdStart:
    """Time and memory of the first result in a new process."""

    milliseconds: float
    memory_bytes: int


def cold_start(model: Path, runtime: Runtime, feed: Feeds) -> ColdStart:
    """Open and run ``model`` once in each of several new processes.

    Raises:
        ExportError: the process fails.
    """
    with tempfile.TemporaryDirectory(prefix="edgepack-cold-") as folder:
        inputs = Path(folder) / "feed.npz"
        # By position: an input's name may be that of an argument of savez.
        np.savez(inputs, *map(plain, feed.values()))
        command = [
            sys.executable, "-P", "-m", "edgepack.benchmark.cold",
            str(model.absolute()), str(inputs), json.dumps(list(feed)), runtime.model_dump_json(),
        ]  # fmt: skip
        # The same edgepack as this process imports.
        places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
        results = []
        for _ in range(COLD_STARTS):
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                reason = _reason(done.stderr) or f"exit code {done.returncode}"
                raise ExportError(f"{model}: cannot be run in a separate process: {reason}")
            results.append(json.loads(done.stdout))
    return ColdStart(
        float(np.median([r["milliseconds"] for r in results])), int(max(r["memory_bytes"] for r in results))
    )


def _reason(stderr: str) -> str:
    """The first line of the exception in a traceback; onnxruntime's messages have several lines."""
    _, _, trace = stderr.partition("Traceback")
    return next((line for line in trace.splitlines()[1:] if line and not line[0].isspace()), "")
