"""The benchmark in a browser, without a browser: the server, refusals, and the page's response."""

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny

from edgepack.benchmark.web import assets
from edgepack.benchmark.web.bench import Web, bench_in_browser, read_answer
from edgepack.benchmark.web.server import Exchange, Server
from edgepack.config.target import load_target
from edgepack.errors import ConfigError, DeviceError

RUNTIME = load_target("x86-cpu").runtime
Y = np.array([[1.0, -2.0, 3.0]], np.float32)


@pytest.fixture
def served() -> Iterator[tuple[Exchange, int]]:
    exchange = Exchange({"": b"page", "job.json": b"{}", "ort/a.wasm": b"\0asm"}, 100)
    with Server("127.0.0.1", 0, exchange) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield exchange, server.server_address[1]
        server.shutdown()
        thread.join()


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


def test_files_are_served_isolated(served: tuple[Exchange, int]) -> None:
    exchange, port = served
    status, body, headers = ask(port, "GET", f"/{exchange.token}/")
    assert (status, body, headers["Content-Type"]) == (200, b"page", "text/html; charset=utf-8")
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert ask(port, "GET", f"/{exchange.token}/ort/a.wasm")[2]["Content-Type"] == "application/wasm"
    assert ask(port, "GET", f"/{exchange.token}/../job.json")[0] == 404


@pytest.mark.parametrize("path", ["/", "/wrong/", "/wrong/job.json", "/wrong/answer", "//job.json"])
def test_without_the_token_nothing_is_served(served: tuple[Exchange, int], path: str) -> None:
    exchange, port = served
    assert ask(port, "GET", path)[0] == 403
    assert ask(port, "POST", path, b"x")[0] == 403
    assert not exchange.done.is_set() and not exchange.opened


def test_one_answer_of_limited_size(served: tuple[Exchange, int]) -> None:
    exchange, port = served
    path = f"/{exchange.token}/answer"
    assert ask(port, "POST", path, b"x" * 101)[0] == 413
    assert ask(port, "POST", path, None, **{"Content-Length": "minus"})[0] == 411
    assert not exchange.done.is_set()
    assert ask(port, "POST", path, b"x" * 100)[0] == 200
    assert ask(port, "POST", path, b"y")[0] == 409
    assert exchange.answer == b"x" * 100


def answer(**changes: Any) -> bytes:
    """A page's response for two models."""
    outputs = [
        {"model": i, "sample": 0, "name": "y", "type": "float32", "dims": [1, 3], "bytes": 12} for i in (0, 1)
    ]
    head = {
        "browser": "Chrome 1", "agent": "Agent\n1", "system": "Linux", "cores": 4, "threads": 2,
        "times": [[4.0, 6.0], [2.0, 2.0]], "cold": [30.0, 20.0], "outputs": outputs,
    }  # fmt: skip
    written = json.dumps({**head, **changes}).encode()
    return len(written).to_bytes(4, "little") + written + Y.tobytes() + (Y * 1.01).tobytes()


MODELS = (Path("a/model.onnx"), Path("b/model.onnx"))
EXPECTED = {"0-0-y": Y, "1-0-y": Y}


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, ...]:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"12345678")
    return tmp_path / "a", tmp_path / "b"


def test_an_answer_as_figures(models: tuple[Path, ...]) -> None:
    run = read_answer(answer(), models, EXPECTED, 1, 2)
    first, second = run.models
    assert (run.device, run.threads, run.cpu) == ("web, Chrome 1", 2, "Agent1")
    assert first.mean_ms == 5.0
    assert (first.p50_ms, first.speedup, first.exact, first.sqnr_db) == (5.0, 1.0, True, None)
    assert (second.p50_ms, second.speedup, second.exact, second.cold_start_ms) == (2.0, 2.5, False, 20.0)
    assert second.sqnr_db == pytest.approx(40.0, abs=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"times": [[1.0, 2.0]]},
        {"times": [[1.0, 0.0], [1.0, 1.0]]},
        {"times": [[1.0, float("nan")], [1.0, 1.0]]},
        {"cold": [1.0]},
        {"cores": "many"},
        {"outputs": []},
        {"outputs": [{"model": 0, "sample": 0, "name": "y", "type": "O", "dims": [1], "bytes": 8}]},
        {"outputs": [{"model": 0, "sample": 0, "name": "y", "type": "float32", "dims": [1, 9], "bytes": 12}]},
    ],
)
def test_a_broken_answer_is_an_error(changes: dict[str, Any], models: tuple[Path, ...]) -> None:
    with pytest.raises(DeviceError, match="cannot be read"):
        read_answer(answer(**changes), models, EXPECTED, 1, 2)


def test_noise_instead_of_an_answer(models: tuple[Path, ...]) -> None:
    for body in (b"", b"\xff\xff\xff\xff", b"\x02\0\0\0[]", b"\x04\0\0\0null"):
        with pytest.raises(DeviceError, match="cannot be read"):
            read_answer(body, models, EXPECTED, 1, 2)


def test_a_page_that_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.project(tmp_path / "project")
    monkeypatch.setattr("edgepack.benchmark.web.bench.runtime_files", dict)
    shown: list[str] = []
    web = Web(wait_s=0.01)
    feeds = [{"x": tiny.samples(1, 0)[0]}]
    with pytest.raises(DeviceError, match="was not opened within"):
        bench_in_browser(web, [folder / "model.onnx"], RUNTIME, feeds, 3, shown.append)
    assert shown[0].startswith("http://127.0.0.1:")
    with pytest.raises(ConfigError, match=r"--host 192\.0\.2\.1"):
        bench_in_browser(Web("192.0.2.1"), [folder / "model.onnx"], RUNTIME, feeds, 3, shown.append)


def test_models_that_a_browser_cannot_run_are_refused(tmp_path: Path) -> None:
    refusals = (("model.tflite", r"--web measures \.onnx models only"), ("none.onnx", "does not exist"))
    for name, message in refusals:
        with pytest.raises(ConfigError, match=message):
            bench_in_browser(Web(), [tmp_path / name], RUNTIME, [], 3, print)


def test_a_runtime_that_is_not_the_pinned_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="fetched once with npm"):
        assets.runtime_files()
    assets.archive_path().write_bytes(b"another")
    with pytest.raises(DeviceError, match="SHA-512 differs"):
        assets.runtime_files()


def test_npm_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "npm").write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(DeviceError, match="no network"):
        assets.runtime_files()
    assert list((tmp_path / "cache").iterdir()) == []


def test_web_at_the_command_line(tmp_path: Path) -> None:
    done = tiny.run(tmp_path, "bench", "m.onnx", "--web", "--ops")
    assert done.returncode == 2 and "without --ops" in done.stderr
