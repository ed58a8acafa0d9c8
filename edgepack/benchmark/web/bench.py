"""The bench in a browser: what the page is given, and what its answer says."""

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
"""How long a browser has to open the page, run and answer."""
HEAD_BYTES = 4_000_000
"""Room in an answer for what is not outputs: times and facts."""
MOST_MODEL_BYTES = 1_000_000_000
"""Memory of wasm ends at 4 GB, and a page needs a model more than once."""
MOST_TOLD = 200
TYPES = {np.dtype(np.bool_): "bool"}
Show = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Web:
    """Where the page is served."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: any that is free."""
    wait_s: float = WAIT_S


def bench_in_browser(
    web: Web, models: Sequence[Path], runtime: Runtime, feeds: Sequence[Feeds], runs: int, show: Show
) -> DeviceRun:
    """Serve a page that measures ``models`` on ``feeds``, and wait for its answer; ``show`` gets the address.

    Raises:
        ConfigError: a model that browsers cannot run, or an address that this host has not.
        ModelError: this host's runtime refuses a model.
        DeviceError: nobody opened the page, it failed, or its answer is broken.
    """
    _check_models(models)
    answers = _answers(models, runtime, feeds)
    room = sum(array.nbytes for array in answers.values()) + HEAD_BYTES
    exchange = Exchange(_files(models, runtime, feeds, runs), room)
    try:
        server = Server(web.host, web.port, exchange)
    except OSError as error:
        raise ConfigError(f"--host {web.host}, port {web.port}: cannot be listened at ({error})") from error
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
        how = "was opened, but sent no answer" if exchange.opened else "was not opened"
        raise DeviceError(f"the page {how} within {web.wait_s:.0f} s")
    return read_answer(exchange.answer, models, answers, len(feeds), runs)


def _check_models(models: Sequence[Path]) -> None:
    for path in models:
        if path.suffix != ".onnx":
            raise ConfigError(f"{path}: browsers run .onnx here; leave it out with --web")
        if not path.is_file():
            raise ConfigError(f"{path}: does not exist")
        size = model_bytes(path)
        if size != path.stat().st_size:
            raise ConfigError(f"{path}: its weights lie in other files; a page takes one file a model")
        if size > MOST_MODEL_BYTES:
            raise ConfigError(f"{path}: {size} bytes are too many for a browser")


def _address(host: str, port: int, token: str) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/{token}/"


def _answers(models: Sequence[Path], runtime: Runtime, feeds: Sequence[Feeds]) -> dict[str, Array]:
    """What this host computes, by model, sample and output."""
    found = {}
    for i, path in enumerate(models):
        runner = open_model(path, runtime)
        for s, feed in enumerate(feeds):
            found.update({f"{i}-{s}-{name}": array for name, array in runner.run(feed).items()})
    return found


def _files(models: Sequence[Path], runtime: Runtime, feeds: Sequence[Feeds], runs: int) -> dict[str, bytes]:
    """Everything that the page may ask for."""
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
    """The file's name, with its folder where another has the same."""
    unique = sum(other.name == path.name for other in models) == 1
    return path.name if unique else f"{path.parent.name}/{path.name}"


def read_answer(
    body: bytes, models: Sequence[Path], answers: Mapping[str, Array], samples: int, runs: int
) -> DeviceRun:
    """The page's answer as figures: a length, JSON, and the bytes of all outputs.

    Raises:
        DeviceError: it is broken, or not of this bench.
    """
    try:
        length = int.from_bytes(body[:4], "little")
        head: dict[str, Any] = json.loads(body[4 : 4 + length])
        outputs = dict(_outputs(head["outputs"], memoryview(body)[4 + length :]))
        times = np.array(head["times"], np.float64)
        if times.shape != (len(models), runs) or not (np.isfinite(times).all() and (times > 0).all()):
            raise ValueError("times are missing or no times")
        rows = []
        for i, path in enumerate(models):
            own = {key: array for key, array in answers.items() if key.startswith(f"{i}-")}
            rows.append(_row(path, times[[0, i]], float(head["cold"][i]), own, outputs))
        browser = _told(head["browser"])
        return DeviceRun(
            device=f"web, {browser}", machine="wasm", cpu=_told(head["agent"]), cores=int(head["cores"]),
            system=_told(head["system"]), python="", numpy=None, onnxruntime=f"web {VERSION}", litert=None,
            clock_mhz=None, temperature_before_c=None, temperature_after_c=None,
            threads=int(head["threads"]), samples=samples,
            date=datetime.now(UTC).isoformat(timespec="seconds"), models=tuple(rows),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DeviceError(f"the page's answer cannot be read ({error!r})") from error


def _told(text: object) -> str:
    """What a browser says of itself, one short line."""
    return "".join(c for c in str(text) if c.isprintable())[:MOST_TOLD]


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
    """``pair``: milliseconds of every round, of the yardstick and of this model."""
    exact, sqnr_db = parity(expected, outputs)
    ratios = pair[0] / pair[1]
    digest = hashlib.sha256()
    for key in sorted(expected):
        array = outputs[key]
        digest.update(f"{array.dtype.str} {array.shape}".encode() + array.tobytes())
    if not math.isfinite(cold_ms):
        raise ValueError("a cold start is no time")
    return DeviceFigures(
        model=str(path), size_bytes=path.stat().st_size,
        p50_ms=float(np.median(pair[1])), p90_ms=float(np.quantile(pair[1], 0.9)),
        min_ms=float(pair[1].min()), speedup=float(np.median(ratios)),
        speedup_error=float(1.2533 * ratios.std() / math.sqrt(len(ratios))),
        cold_start_ms=cold_ms, peak_memory_bytes=None, sha256=digest.hexdigest(),
        exact=exact, sqnr_db=finite(sqnr_db), ops_us={}, mean_ms=float(pair[1].mean()),
    )  # fmt: skip
