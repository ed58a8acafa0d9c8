"""Runs as a separate process: measures one cold start of a model, and prints it as JSON."""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

from edgepack.config.target import Runtime
from edgepack.runtime.runner import load_library, open_model


def main(model: str, inputs: str, names: str, runtime: str) -> None:
    """Open ``model``, run it once, and print time and memory.

    ``inputs``: an .npz with the arrays of the feed; ``names``: their names, a JSON list; ``runtime``: JSON.
    """
    settings = Runtime.model_validate_json(runtime)
    with np.load(inputs) as arrays:
        feed = dict(zip(json.loads(names), (arrays[key] for key in arrays.files), strict=True))
    load_library(Path(model))  # loading the library is not part of the model's time
    _forget_peak()
    before = _peak_bytes()
    started = time.perf_counter()
    runner = open_model(Path(model), settings)
    runner.call(runner.prepare(feed))
    milliseconds = (time.perf_counter() - started) * 1e3
    result = {"milliseconds": milliseconds, "memory_bytes": max(_peak_bytes() - before, 0)}
    sys.stdout.write(json.dumps(result) + "\n")


def _forget_peak() -> None:
    """Reset the peak to the present resident memory: the peak of the imports would hide a small model's."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5", encoding="ascii")


def _peak_bytes() -> int:
    # Not getrusage: its maximum is inherited from the parent process.
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main(*sys.argv[1:])
