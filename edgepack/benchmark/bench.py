"""Bench: latency of several models that take turns, so that what disturbs one disturbs all.

In a round every model has a turn on the same feed, and each round begins with another model. In a turn the
model is called several times, each call clocked by itself; a mean over the turn would take in whatever else
the machine did. The fastest call of a turn stands for the turn, the ratio of two models is taken within a
round, and the median over the rounds is reported.

A model on one thread is compared by the time that this thread was running, so that what other programs take
of the machine is not counted as the model's. What is left between two sessions of one file, measured on two
busy cores with onnxruntime 1.32 (95% of repeats are nearer)::

    rounds                              10      25      50      100
    5 ms a call, wall clock, mean      31%     19%      10%      3%
    5 ms a call, as here              3.4%    1.5%    1.2%     0.5%
    20 µs a call, wall clock, mean     21%    7.6%    1.2%     0.8%
    20 µs a call, as here             0.8%    0.4%    0.3%     0.2%

Sessions of one file differ however long they are measured, by where their memory lies: the speed-up of a
20 µs model has a standard deviation of 1.5% from one pair of sessions to the next, after 10 rounds and after
50. Files are therefore measured in five sets of sessions, one after another: 0.7%, and 0.4% for a 5 ms model,
at 25 rounds. That is within 1.5% and 1% in 95% of repeats; more rounds gain little.
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
"""The first call of a turn finds the caches filled by another model, and is up to four times as slow."""
MOST_CALLS = 50
FEWEST_ROUNDS = 10
"""However slow the models are."""
SESSIONS = 5
"""Sets of sessions that the rounds on files are shared among."""
COLD_STARTS = 3


@dataclass(frozen=True, slots=True)
class Latency:
    """Times of one model, milliseconds per call by the wall clock; the first call of a turn is left out."""

    p50_ms: float
    p90_ms: float
    min_ms: float
    mean_ms: float | None
    runs: int
    """Rounds; a fast model is called many times in each."""
    speedup: float
    """Median over rounds of the first model's time by this one's."""
    speedup_error: float
    """Standard error of ``speedup``."""
    cold_start_ms: float | None
    """Opening a session and the first call, in a new process; median of three, the file in the page cache.
    ``None``, like the memory, where a device did not tell."""
    peak_memory_bytes: int | None
    """Resident memory that opening and running the model adds to a process, at its peak."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """How much faster than the first model, with what a repeat may differ by."""

    speedup: float
    standard_error: float


@dataclass(frozen=True, slots=True, eq=False)
class Rounds:
    """Seconds of every round."""

    best: Times
    """``[rounds, models]``: the fastest call of each turn, by the clock that ratios are taken with."""
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

    With ``seconds``, slow models take fewer rounds and one call of warming up, so that it takes about that;
    not fewer than ``FEWEST_ROUNDS``.

    Raises:
        ModelError: the runtime refuses a model.
        ExportError: a model cannot be run in a process of its own.
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
    """Calls of warming up and rounds that take about so long."""
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

    The error is that of these sessions: others of the same files may differ by 2% more, see the module.
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

    One is from the spread between quartiles, which outliers do not move, but takes rounds to be independent;
    the other from medians of consecutive rounds, which sees a disturbance that lasts, and the difference of
    one session from another where the rounds are of several.
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
    """Time files, in one set of sessions after another."""
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
    """Time open models, which take turns; ``first`` is the number of the first round.

    What an application does to its data before it calls, as quantizing them for a file with integer inputs,
    is not in the times.
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
        # A clock may stand still for a call shorter than its step; a ratio must not divide by zero.
        own.append(max(ended - began, 1e-9))
    return wall, own


def _clock(runners: Sequence[Runner]) -> Callable[[], float]:
    """This thread's running time where all work is done in this thread, else the wall clock."""
    return time.thread_time if all(runner.one_thread for runner in runners) else time.perf_counter


def _calls_per_turn(runner: Runner, feed: Feeds) -> int:
    wall, _ = _turn(runner, feed, 3, time.perf_counter)
    return max(FEWEST_CALLS, min(MOST_CALLS, round(TURN_SECONDS / min(wall))))


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
        # By position: an input may be called like an argument of savez.
        np.savez(inputs, *map(plain, feed.values()))
        command = [
            sys.executable, "-P", "-m", "edgepack.benchmark.cold",
            str(model.absolute()), str(inputs), json.dumps(list(feed)), runtime.model_dump_json(),
        ]  # fmt: skip
        # The same edgepack, however it came to be on the import path of this process.
        places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
        results = []
        for _ in range(COLD_STARTS):
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                reason = _reason(done.stderr) or f"exit code {done.returncode}"
                raise ExportError(f"{model}: cannot be run in a process of its own: {reason}")
            results.append(json.loads(done.stdout))
    return ColdStart(
        float(np.median([r["milliseconds"] for r in results])), int(max(r["memory_bytes"] for r in results))
    )


def _reason(stderr: str) -> str:
    """The first line of the exception in a traceback: onnxruntime's have several, and advice at the end."""
    _, _, trace = stderr.partition("Traceback")
    return next((line for line in trace.splitlines()[1:] if line and not line[0].isspace()), "")
