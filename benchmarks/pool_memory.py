"""Memory of two processes that each run one of two models: as they are, and from one pool.

python benchmarks/pool_memory.py ONE.onnx TWO.onnx

Counted is the proportional set size (Linux): a page that two processes share counts half in each. What a
process has before it opens its model is taken off.
"""

import multiprocessing as mp
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgepack.config.target import Runtime
from edgepack.ir.files import load_model
from edgepack.ir.inputs import input_specs
from edgepack.pack.pool import make_pool
from edgepack.pipeline.measuring import random_feed
from edgepack.runtime.session import open_session, run


def pss_bytes() -> int:
    """Of this process."""
    rows = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith("Pss:"))


def open_and_run(path: str, settings: str, ready: Any, results: Any) -> None:
    """Open a model, run it once, and say what it takes when all others have done the same."""
    import onnxruntime  # noqa: F401, PLC0415

    runtime = Runtime.model_validate_json(settings)
    feed = random_feed(input_specs(load_model(Path(path))))
    ready.wait()
    before = pss_bytes()
    ready.wait()
    session = open_session(Path(path), runtime)
    run(session, feed)
    ready.wait()
    results.put(pss_bytes() - before)
    ready.wait()


def together(models: Sequence[Path], runtime: Runtime) -> int:
    """Bytes that the models add to as many processes, all running."""
    spawn = mp.get_context("spawn")
    ready, results = spawn.Barrier(len(models)), spawn.Queue()
    processes = [
        spawn.Process(target=open_and_run, args=(str(path), runtime.model_dump_json(), ready, results))
        for path in models
    ]
    for process in processes:
        process.start()
    total = sum(int(results.get()) for _ in processes)
    for process in processes:
        process.join()
    return total


def main(one: str, two: str) -> None:
    models = [Path(one), Path(two)]
    print("| model | on disk | resident, two processes | the same, without prepacking |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        pool = make_pool(models, Path(folder) / "pool")
        pooled = [pool.folder / model.file for model in pool.models]
        for name, paths, size in (("apart", models, pool.raw_bytes), ("pool", pooled, pool.pool_bytes)):
            figures = [together(paths, runtime) for runtime in (Runtime(), Runtime().sparing())]
            cells = " | ".join(f"{figure / 1e6:.1f} MB" for figure in figures)
            print(f"| {name} | {size / 1e6:.1f} MB | {cells} |")


if __name__ == "__main__":
    main(*sys.argv[1:3])
