"""The program of a bundle: measures the models in it and writes ``result.json``.

It runs on the device as ``python3 bench.pyz FOLDER`` and needs Python 3.8, NumPy, and onnxruntime, LiteRT or
tflite-runtime; nothing of edgepack. Models are interleaved. In a turn a model is called at least twice; the
first call is left out, since it runs with another model's data in the caches. A cold start is measured in a
new process. Where standard input ends before the measurement, the host is gone: the program removes the
folder above FOLDER and stops.

Exit codes: 0 good, 10 a library is missing, 11 no space, 12 a model is refused, 13 the host is gone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Feed = dict[str, Any]
    Job = dict[str, Any]

LACKING, NO_SPACE, REFUSED, HOST_GONE = 10, 11, 12, 13
TURN_SECONDS = 1e-3
MOST_CALLS = 50
COLD_STARTS = 3
COLD_SECONDS = 3.0
"""No further cold start is measured after this time, for slow devices."""
LITE = ("ai_edge_litert", "tflite_runtime")


class Stop(Exception):  # not an error of the program
    """Ends the program with a reason for the host."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def need(name: str) -> Any:
    """Import a library, or stop with its name."""
    try:
        return __import__(name, fromlist=["_"])
    except ImportError as error:
        raise Stop(LACKING, f"{name}: {error}")  # noqa: B904  # shown as one line


class Ort:
    """A model file opened by onnxruntime."""

    def __init__(self, path: Path, runtime: Job, profile: Path | None = None) -> None:
        ort = need("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = runtime["threads"]
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        for key, value in runtime["session_config"].items():
            options.add_session_config_entry(key, value)
        if profile:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        self.session = ort.InferenceSession(str(path), options, providers=[runtime["provider"]],
            disabled_optimizers=list(runtime["disabled_optimizers"]) or None,
        )  # fmt: skip

    def call(self, feed: Feed) -> list[Any]:
        """One run: the outputs in the model's order."""
        outputs: list[Any] = self.session.run(None, feed)
        return outputs


class Lite:
    """A ``.tflite`` opened by LiteRT or tflite-runtime."""

    def __init__(self, path: Path, runtime: Job) -> None:
        self.interpreter = lite().Interpreter(str(path), num_threads=runtime["threads"])
        self.interpreter.allocate_tensors()
        self.entries = self.interpreter.get_input_details()
        self.results = self.interpreter.get_output_details()

    def call(self, feed: Feed) -> list[Any]:
        """One run: the outputs in the file's order."""
        for entry in self.entries:
            self.interpreter.set_tensor(entry["index"], feed[entry["name"]])
        self.interpreter.invoke()
        return [self.interpreter.get_tensor(result["index"]) for result in self.results]


def lite() -> Any:
    """The module with the LiteRT interpreter."""
    for name in LITE:
        try:
            return __import__(name + ".interpreter", fromlist=["_"])
        except ImportError:
            continue
    raise Stop(LACKING, "neither ai_edge_litert nor tflite_runtime")


def open_model(path: Path, runtime: Job) -> Any:
    """The model ``path`` in the runtime of its format."""
    try:
        return Lite(path, runtime) if path.suffix == ".tflite" else Ort(path, runtime)
    except Stop:
        raise
    except Exception as error:  # noqa: BLE001  # the runtimes' errors have no common base class
        raise Stop(REFUSED, f"{path.name}: {str(error).splitlines()[0]}")  # noqa: B904


def feeds_of(folder: Path, model: Job) -> list[Feed]:
    """The samples of a model, arrays by input."""
    np = need("numpy")
    found = []
    for place in range(model["samples"]):
        with np.load(folder / f"{model['id']}-{place}.npz") as arrays:
            found.append({name: arrays[f"arr_{i}"] for i, name in enumerate(model["inputs"])})
    return found


def measure(
    runners: list[Any], feeds: list[list[Feed]], job: Job
) -> tuple[list[list[float]], list[list[float]]]:
    """Milliseconds of each call by model, and of the fastest call of each turn."""
    turns = []
    for runner, own in zip(runners, feeds):  # noqa: B905  # Python 3.8
        for _ in range(job["warmup"]):
            runner.call(own[0])
        turns.append(max(2, min(MOST_CALLS, round(TURN_SECONDS / clocked(runner, own[0])))))
    calls: list[list[float]] = [[] for _ in runners]
    best: list[list[float]] = [[] for _ in runners]
    for index in range(job["runs"]):
        for offset in range(len(runners)):
            place = (index + offset) % len(runners)
            feed = feeds[place][index % len(feeds[place])]
            times = [clocked(runners[place], feed) for _ in range(turns[place])]
            calls[place] += [1e3 * seconds for seconds in times[1:]]
            best[place].append(1e3 * min(times))
    return calls, best


def clocked(runner: Any, feed: Feed) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    runner.call(feed)
    return max(time.perf_counter() - started, 1e-9)


def cold(folder: Path, job: Job, place: int) -> tuple[float, int | None]:
    """Median milliseconds and peak memory of the first result in new processes.

    The memory is ``None`` where the system does not report it.
    """
    command = [sys.executable, str(Path(sys.argv[0]).absolute()), str(folder), "--cold", str(place)]
    results: list[dict[str, Any]] = []
    started = time.perf_counter()
    while len(results) < COLD_STARTS and (not results or time.perf_counter() - started < COLD_SECONDS):
        done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            reason = done.stderr.decode("utf-8", "replace").strip().splitlines() or [
                f"exit {done.returncode}"
            ]
            raise Stop(REFUSED, f"{job['models'][place]['file']} in a separate process: {reason[-1]}")
        results.append(json.loads(done.stdout))
    times = sorted(r["milliseconds"] for r in results)
    known = [r["memory_bytes"] for r in results if r["memory_bytes"] is not None]
    return times[len(times) // 2], max(known) if known else None


def cold_once(folder: Path, job: Job, place: int) -> dict[str, float | None]:
    """Open a model and run it once, in a new process."""
    model = job["models"][place]
    feed = feeds_of(folder, dict(model, samples=1))[0]
    lite() if model["file"].endswith(".tflite") else need("onnxruntime")
    before = memory_bytes()
    started = time.perf_counter()
    open_model(folder / model["file"], job["runtime"]).call(feed)
    milliseconds = 1e3 * (time.perf_counter() - started)
    after = memory_bytes()
    grown = None if before is None or after is None else max(after - before, 0)
    return {"milliseconds": milliseconds, "memory_bytes": grown}


def memory_bytes() -> int | None:
    """Peak resident memory; ``None`` where the system does not report it."""
    found = [line for line in read("/proc/self/status").splitlines() if line.startswith("VmHWM")]
    return int(found[0].split()[1]) * 1024 if found else None


def operator_us(folder: Path, model: Job, feed: Feed, job: Job) -> dict[str, float]:
    """Microseconds per run by operator type; empty for LiteRT."""
    if model["file"].endswith(".tflite") or not job["ops"]:
        return {}
    runner = Ort(folder / model["file"], job["runtime"], folder / "profile")
    for _ in range(10):
        runner.call(feed)
    events = json.loads(read(runner.session.end_profiling()))
    total: dict[str, float] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kind = event["args"]["op_name"]
            total[kind] = total.get(kind, 0.0) + event["dur"] / 10
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def read(path: Any) -> str:
    """A system file as text; empty where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def temperature_c() -> float | None:
    """Degrees Celsius of the warmest sensor; ``None`` without sensors."""
    found = [read(path).strip() for path in Path("/sys/class/thermal").glob("thermal_zone*/temp")]
    values = [int(text) / 1000 for text in found if text.lstrip("-").isdigit()]
    return max(values) if values else None


def clock_mhz() -> float | None:
    """Clock of the first core; ``None`` where the system does not report it."""
    text = read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq").strip()
    return int(text) / 1000 if text.isdigit() else None


def machine() -> dict[str, Any]:
    """The machine and its versions, without host name or paths."""
    fields: dict[str, str] = {}
    for line in read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    part = " ".join(fields[k] for k in ("CPU implementer", "CPU part") if k in fields)
    versions = {
        name: getattr(sys.modules.get(name), "__version__", None) for name in ("numpy", "onnxruntime")
    }
    loaded = [name for name in LITE if name in sys.modules]
    version = [v for name in loaded[:1] if (v := getattr(sys.modules[name], "__version__", None))]
    return {
        "machine": platform.machine(),
        "cpu": fields.get("model name") or fields.get("Model") or part or platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": versions["numpy"],
        "onnxruntime": versions["onnxruntime"],
        "litert": " ".join((loaded[0].replace("_", "-"), *version)) if loaded else None,
    }


def bench(folder: Path, job: Job) -> dict[str, Any]:
    """All figures of a job."""
    np = need("numpy")
    warm = temperature_c()
    models = job["models"]
    runners = [open_model(folder / model["file"], job["runtime"]) for model in models]
    feeds = [feeds_of(folder, model) for model in models]
    outputs: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for model, runner, own in zip(models, runners, feeds):  # noqa: B905
        digest = hashlib.sha256()
        for place, feed in enumerate(own):
            for number, output in enumerate(runner.call(feed)):
                array = np.ascontiguousarray(output)
                outputs[f"{model['id']}-{place}-{number}"] = array
                digest.update(f"{array.dtype} {array.shape}\n".encode() + array.tobytes())
        rows.append({"sha256": digest.hexdigest()})
    np.savez(folder / "outputs.npz", **outputs)
    calls, best = measure(runners, feeds, job)
    clock = clock_mhz()
    for place, row in enumerate(rows):
        ratios = np.array(best[0]) / np.array(best[place])
        own = np.array(calls[place])
        start_ms, peak = cold(folder, job, place) if job["cold"] else (None, None)
        low, high = np.percentile(ratios, [25, 75])
        row.update(
            id=models[place]["id"], p50_ms=float(np.median(own)), p90_ms=float(np.percentile(own, 90)),
            min_ms=float(own.min()), mean_ms=float(own.mean()), speedup=float(np.median(ratios)),
            speedup_error=float(1.2533 * (high - low) / 1.349 / len(ratios) ** 0.5),
            cold_start_ms=start_ms, peak_memory_bytes=peak,
            ops_us=operator_us(folder, models[place], feeds[place][0], job),
        )  # fmt: skip
    state = {"clock_mhz": clock, "temperature_before_c": warm, "temperature_after_c": temperature_c()}
    return {"machine": dict(machine(), **state), "models": rows}


def watch_host(folder: Path) -> None:
    """Remove the folder and stop when standard input ends: the host is gone."""
    while sys.stdin.buffer.read(1):
        pass
    shutil.rmtree(str(folder.parent), ignore_errors=True)
    os._exit(HOST_GONE)


def main() -> int:
    """Unpack, measure, write ``result.json``; print the reason of a failure on standard error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cold", type=int)
    parser.add_argument(
        "--watch", action="store_true", help="stop, and remove the folder around it, when stdin ends"
    )
    args = parser.parse_args()
    try:
        if args.cold is None:
            if args.watch:
                threading.Thread(target=watch_host, args=(args.folder,), daemon=True).start()
            with zipfile.ZipFile(sys.argv[0]) as bundle:
                bundle.extractall(args.folder)
        job = json.loads(read(args.folder / "job.json"))
        if args.cold is not None:
            sys.stdout.write(json.dumps(cold_once(args.folder, job, args.cold)) + "\n")
            return 0
        result = bench(args.folder, job)
        (args.folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    except Stop as stop:
        sys.stderr.write(f"{stop}\n")
        return int(stop.code)
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT):
            raise
        sys.stderr.write(f"{error}\n")
        return NO_SPACE
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the thread that waits for standard input would block the exit
