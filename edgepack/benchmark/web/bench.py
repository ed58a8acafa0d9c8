"""The benchmark in a browser: the files for the page, and the figures in its response."""

import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from edgepack.benchmark.devices.bench import parity
from edgepack.benchmark.web.assets import VERSION, runtime_files
from edgepack.benchmark.web.server import Exchange, Server
from edgepack.config.target import Runtime
from edgepack.errors import ConfigError, DeviceError
from edgepack.ir.arrays import Array, Feeds
from edgepack.ir.files import model_bytes
from edgepack.results import DeviceFigures, DeviceRun, finite
from edgepack.runtime.runner import open_model

WAIT_S = 1800.0
"""Timeout in seconds for opening the page and running the benchmark."""
HEAD_BYTES = 4_000_000
"""Most bytes of a response besides the outputs: times and facts."""
MOST_MODEL_BYTES = 1_000_000_000
"""WebAssembly has 4 GB of memory, and a page needs several copies of a model."""
MOST_CHARACTERS = 200
TYPES = {np.dtype(np.bool_): "bool"}
Show = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Web:
    """The address of the page, and the timeout."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: any free port."""
    wait_s: float = WAIT_S


def bench_in_browser(
    web: Web, models: Sequence[Path], runtime: Runtime, feeds: Sequence[Feeds], runs: int, show: Show
) -> DeviceRun:
    """Serve a page that measures ``models`` on ``feeds``, and await its response; ``show`` gets the address.

    Raises:
        ConfigError: a model that browsers cannot run, or an address that this host does not have.
        ModelError: this host's runtime refuses a model.
        DeviceError: the page was not opened, it failed, or its response is broken.
    """
    _check_models(models)
    reference = _reference(models, runtime, feeds)
    room = sum(array.nbytes for array in reference.values()) + HEAD_BYTES
    exchange = Exchange(_files(models, runtime, feeds, runs), room)
    try:
        server = Server(web.host, web.port, exchange)
    except OSError as error:
        raise ConfigError(f"--host {web.host}, port {web.port}: cannot listen there ({error})") from error
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            show(_address(web.host, server.server_address[1], exchange.token))
            exchange.done.wait(web.wait_s)
        finally:
            server.shutdown()
            thread.join()
    if exchange.failure is not None:
        raise DeviceError(f"the page failed: {exchange.failure}")
    if exchange.answer is None:
        how = "was opened, but sent no response" if exchange.opened else "was not opened"
        raise DeviceError(f"the page {how} within {web.wait_s:.0f} s")
    return read_answer(exchange.answer, models, reference, len(feeds), runs)


def _check_models(models: Sequence[Path]) -> None:
    for path in models:
        if path.suffix != ".onnx":
            raise ConfigError(f"{path}: --web measures .onnx models only")
        if not path.is_file():
            raise ConfigError(f"{path}: does not exist")
        size = model_bytes(path)
        if size != path.stat().st_size:
            raise ConfigError(f"{path}: has external data; --web needs each model in one file")
        if size > MOST_MODEL_BYTES:
            raise ConfigError(f"{path}: {size} bytes are too many for a browser")


def _address(host: str, port: int, token: str) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/{token}/"


def _reference(models: Sequence[Path], runtime: Runtime, feeds: Sequence[Feeds]) -> dict[str, Array]:
    """This host's outputs, by model, sample and output."""
    found = {}
    for i, path in enumerate(models):
        runner = open_model(path, runtime)
        for s, feed in enumerate(feeds):
            found.update({f"{i}-{s}-{name}": array for name, array in runner.run(feed).items()})
    return found


def _files(models: Sequence[Path], runtime: Runtime, feeds: Sequence[Feeds], runs: int) -> dict[str, bytes]:
    """All files that the page may request, by path."""
    own, style = files("edgepack.benchmark.web"), files("edgepack.report.html").joinpath("style.css")
    found = {name: own.joinpath(name).read_bytes() for name in ("bench.js", "bench.css")}
    found[""] = own.joinpath("page.html").read_bytes()
    found["style.css"] = style.read_bytes()
    found |= {f"ort/{name}": content for name, content in runtime_files().items()}
    found |= {f"model/{i}": path.read_bytes() for i, path in enumerate(models)}
    described: list[list[dict[str, Any]]] = []
    for s, feed in enumerate(feeds):
        described.append([])
        for k, (name, array) in enumerate(feed.items()):
            file = f"feed/{s}-{k}"
            kind = TYPES.get(array.dtype, array.dtype.name)
            described[-1].append({"name": name, "type": kind, "dims": list(array.shape), "file": file})
            found[file] = np.ascontiguousarray(array).tobytes()
    listed = [{"name": _label(path, models), "bytes": path.stat().st_size} for path in models]
    job = {"runs": runs, "threads": runtime.threads, "models": listed, "feeds": described}
    return {**found, "job.json": json.dumps(job).encode()}


def _label(path: Path, models: Sequence[Path]) -> str:
    """The file's name, with its folder where another model has the same name."""
    unique = sum(other.name == path.name for other in models) == 1
    return path.name if unique else f"{path.parent.name}/{path.name}"


def read_answer(
    body: bytes, models: Sequence[Path], reference: Mapping[str, Array], samples: int, runs: int
) -> DeviceRun:
    """The figures in the page's response, which is a length, JSON, and the bytes of all outputs.

    Raises:
        DeviceError: it is broken, or of another benchmark.
    """
    try:
        length = int.from_bytes(body[:4], "little")
        head: dict[str, Any] = json.loads(body[4 : 4 + length])
        outputs = dict(_outputs(head["outputs"], memoryview(body)[4 + length :]))
        times = np.array(head["times"], np.float64)
        if times.shape != (len(models), runs) or not (np.isfinite(times).all() and (times > 0).all()):
            raise ValueError("times are missing or invalid")
        rows = []
        for i, path in enumerate(models):
            own = {key: array for key, array in reference.items() if key.startswith(f"{i}-")}
            rows.append(_row(path, times[[0, i]], float(head["cold"][i]), own, outputs))
        browser = _printable(head["browser"])
        return DeviceRun(
            device=f"web, {browser}", machine="wasm", cpu=_printable(head["agent"]),
            cores=int(head["cores"]),
            system=_printable(head["system"]), python="", numpy=None,
            onnxruntime=f"web {VERSION}", litert=None,
            clock_mhz=None, temperature_before_c=None, temperature_after_c=None,
            threads=int(head["threads"]), samples=samples,
            date=datetime.now(UTC).isoformat(timespec="seconds"), models=tuple(rows),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DeviceError(f"the page's response cannot be read ({error!r})") from error


def _printable(text: object) -> str:
    """A browser's text as one short line."""
    return "".join(c for c in str(text) if c.isprintable())[:MOST_CHARACTERS]


def _outputs(described: Sequence[Mapping[str, Any]], data: memoryview) -> Iterator[tuple[str, Array]]:
    place = 0
    for row in described:
        kind = np.dtype("bool" if row["type"] == "bool" else str(row["type"]))
        if kind.hasobject:
            raise ValueError(f"type {row['type']}")
        size = int(row["bytes"])
        array = np.frombuffer(data[place : place + size], kind).reshape(row["dims"])
        yield f"{int(row['model'])}-{int(row['sample'])}-{row['name']}", array
        place += size


def _row(
    path: Path, pair: Array, cold_ms: float, expected: Mapping[str, Array], outputs: Mapping[str, Array]
) -> DeviceFigures:
    """``pair``: milliseconds of each round, of the first model and of this one."""
    exact, sqnr_db = parity(expected, outputs)
    ratios = pair[0] / pair[1]
    digest = hashlib.sha256()
    for key in sorted(expected):
        array = outputs[key]
        digest.update(f"{array.dtype.str} {array.shape}".encode() + array.tobytes())
    if not math.isfinite(cold_ms):
        raise ValueError("a cold start is invalid")
    return DeviceFigures(
        model=str(path), size_bytes=path.stat().st_size,
        p50_ms=float(np.median(pair[1])), p90_ms=float(np.quantile(pair[1], 0.9)),
        min_ms=float(pair[1].min()), speedup=float(np.median(ratios)),
        speedup_error=float(1.2533 * ratios.std() / math.sqrt(len(ratios))),
        cold_start_ms=cold_ms, peak_memory_bytes=None, sha256=digest.hexdigest(),
        exact=exact, sqnr_db=finite(sqnr_db), ops_us={}, mean_ms=float(pair[1].mean()),
    )  # fmt: skip
