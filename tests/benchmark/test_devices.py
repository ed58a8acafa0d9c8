"""The benchmark on a device, without a device: this machine behind a fake ssh, and all faults."""

import ast
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack.benchmark.bench import Ratio
from edgepack.benchmark.devices import device_runner, timing
from edgepack.benchmark.devices.bench import bench_on, open_device, parity
from edgepack.benchmark.devices.bundle import Job, write_bundle
from edgepack.benchmark.devices.protocol import Shell, ShellDevice
from edgepack.benchmark.devices.ssh import ssh_words
from edgepack.benchmark.devices.timing import DeviceTiming
from edgepack.cli.program import run
from edgepack.config.target import Runtime, load_target
from edgepack.errors import ConfigError, DeviceError
from edgepack.evaluation.check import Comparison
from edgepack.ir.arrays import Feeds
from edgepack.ir.scheme import QuantScheme, QuantType
from edgepack.quantization.plan.types import QuantPlan
from edgepack.selection.candidates import CandidateName, WholeModel
from edgepack.selection.trials import Trial, TrialBench

NETWORK = """\
<ir_version: 8, opset_import: ["" : 13]>
net (float[N, 4] x) => (float[N, 4] y) { a = Relu (x)  y = Add (a, x) }
"""
QUICK = Job(runs=3, warmup=1, cold=False)
FEEDS = [{"x": np.arange(4, dtype=np.float32).reshape(1, 4) - i} for i in range(2)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "it's a $(touch owned) model;.onnx"
    path.write_bytes(onnx.parser.parse_model(NETWORK).SerializeToString())
    return path


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program ``ssh`` that runs its last argument in this machine's shell, as sshd does; gives its log."""
    programs, log = tmp_path / "bin", tmp_path / "ssh.log"
    programs.mkdir()
    substituted = programs / "ssh"
    substituted.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" >> "{log}"\nfor last; do :; done\nexec sh -c "$last"\n'
    )
    substituted.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return log


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The folder on the "device", with a name that needs quoting."""
    path = tmp_path / "a b'$(touch owned);&"
    path.mkdir()
    return path


def address(place: Path) -> str:
    return f"ssh://pi@board{place}"


def program(tmp_path: Path, text: str) -> str:
    path = tmp_path / "python with a space"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_local_figures_are_whole_and_outputs_are_the_hosts(model: Path) -> None:
    found = bench_on("local", [model, model], Runtime(), FEEDS, Job(runs=3, ops=True), python=sys.executable)
    assert [m.exact for m in found.models] == [True, True]
    assert found.models[0].sha256 == found.models[1].sha256
    assert found.models[0].speedup == 1.0
    for m in found.models:
        assert 0 < m.min_ms <= m.p50_ms <= m.p90_ms
        assert m.mean_ms is not None and m.mean_ms > m.min_ms and m.mean_ms != m.p50_ms
        assert m.cold_start_ms is not None
        assert m.cold_start_ms > m.min_ms
        assert set(m.ops_us) == {"Relu", "Add"}
    assert found.onnxruntime is not None
    assert found.cores == os.cpu_count()


def test_nothing_of_the_user_reaches_a_shell_unquoted_and_nothing_is_left(
    model: Path, ssh: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    python = program(tmp_path, f'exec "{sys.executable}" "$@"')
    found = bench_on(address(place), [model], Runtime(), FEEDS, QUICK, python=python)
    assert found.models[0].exact
    assert not list(place.iterdir())
    assert not list(tmp_path.rglob("owned"))
    words = ssh.read_text().splitlines()
    assert words[words.index("-l") + 1] == "pi"
    assert words[words.index("--") + 1] == "board"


def test_keep_leaves_the_bundle_that_runs_by_itself(model: Path, ssh: Path, place: Path) -> None:
    bench_on(address(place), [model], Runtime(), FEEDS, QUICK, python=sys.executable, keep=True)
    (folder,) = place.iterdir()
    again = folder / "again"
    subprocess.run([sys.executable, "-I", folder / "bench.pyz", again], check=True, stdin=subprocess.DEVNULL)
    assert json.loads((again / "result.json").read_text())["models"][0]["p50_ms"] > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exit 127", "there is no .*--device-python"),
        ("exit 126", "does not run on its processor"),
        ("echo 'sh: 1: python3: Exec format error' >&2; exit 2", "is not built for its processor"),
        (f'exec "{sys.executable}" -I -S "$@"', "lacks a library .numpy: .*install numpy and onnxruntime"),
        ("echo 'No space left on device' >&2; exit 11", "no space is left"),
        ("kill -9 $$", "exit code"),
    ],
)
def test_missing_libraries_are_reported_and_nothing_is_left(
    model: Path, ssh: Path, place: Path, tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(DeviceError, match=message):
        bench_on(address(place), [model], Runtime(), FEEDS, QUICK, python=program(tmp_path, text))
    assert not list(place.iterdir())


def test_a_device_without_onnxruntime_is_reported(
    model: Path, ssh: Path, place: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    (site / "onnxruntime").mkdir(parents=True)
    (site / "onnxruntime" / "__init__.py").write_text("raise ImportError('wrong ELF class')")
    python = program(tmp_path, f'PYTHONPATH="{site}" exec "{sys.executable}" "$@"')
    with pytest.raises(DeviceError, match=r"onnxruntime: wrong ELF class.*built for its processor"):
        bench_on(address(place), [model], Runtime(), FEEDS, QUICK, python=python)
    assert not list(place.iterdir())


def test_a_host_that_is_down_is_exit_code_5(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edgepack.cli.common import app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["bench", str(model), "--device", f"ssh://nobody@127.0.0.1:{port}"]
    assert run(lambda: app(words)) == DeviceError.exit_code == 5
    assert "cannot be reached" in capsys.readouterr().err


def test_a_full_device_is_reported_and_cleaned(
    model: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A limit of 512 bytes per file acts as a full disk, without mounting one.
    device = ShellDevice(
        Shell("tight", ("sh", "-c", 'ulimit -f 1; trap "" XFSZ; eval "$1"', "sh")), str(place)
    )
    with pytest.raises(DeviceError, match=r"bytes could not be written to .*free some space"):
        bundle = tmp_path / "bundle"
        bundle.write_bytes(bytes(100_000))
        device.push(bundle, "bench.pyz")
    assert not place.exists()


def test_a_connection_cut_in_mid_run_leaves_nothing(model: Path, tmp_path: Path, place: Path) -> None:
    folder = place / "edgepack-x"
    folder.mkdir()
    write_bundle(folder / "bench.pyz", [model], Runtime(), FEEDS, Job(runs=10**7))
    words = [sys.executable, str(folder / "bench.pyz"), str(folder / "work"), "--watch"]
    running = subprocess.Popen(words, stdin=subprocess.PIPE)
    assert running.stdin
    wait_for((folder / "work" / "outputs.npz").exists)
    running.stdin.close()
    assert running.wait(20) == device_runner.HOST_GONE
    assert not folder.exists()


def test_a_cut_connection_is_exit_code_5_and_says_so(
    model: Path, ssh: Path, place: Path, tmp_path: Path
) -> None:
    """The connection breaks during the run: ssh ends with 255."""
    program_path = ssh.parent / "bin" / "ssh"
    text = program_path.read_text().replace(
        'exec sh -c "$last"',
        'case "$last" in *--watch*) echo "Connection reset" >&2; exit 255;; esac\nexec sh -c "$last"',
    )
    program_path.write_text(text)
    with pytest.raises(DeviceError, match="the connection broke: Connection reset"):
        bench_on(address(place), [model], Runtime(), FEEDS, QUICK, python=sys.executable)
    assert not list(place.iterdir())


def wait_for(ready: Callable[[], bool], seconds: float = 20) -> None:

    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    "wrong",
    [
        "ssh://", "ssh://-oProxyCommand=x", "ssh://-l@host", "ssh://me:secret@host", "ssh://host:port",
        "ssh://host?x", "adb:", "adb:-s", "docker:", "docker:-v", "telnet://host", "ssh:host", "lokal",
    ],
)  # fmt: skip
def test_invalid_addresses_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="--device"):
        open_device(wrong)


def test_an_address_becomes_arguments_of_ssh() -> None:
    words, folder = ssh_words("ssh://pi@My-Board:2222/var/tmp/")
    assert words[-6:] == ("-p", "2222", "-l", "pi", "--", "My-Board")
    assert folder == "/var/tmp"
    assert ssh_words("ssh://[::1]:22")[0][-1] == "::1"


@given(st.text(st.characters(exclude_characters="/\0\n", codec="utf-8"), min_size=1, max_size=40))
def test_any_name_of_a_folder_is_but_a_name(name: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        parent = Path(scratch) / f"x{name}"
        parent.mkdir()
        shell = Shell("here", ("sh", "-c"))
        device = ShellDevice(shell, shell.make_folder(str(parent)))
        (Path(scratch) / "content").write_bytes(name.encode())
        device.push(Path(scratch) / "content", "there")
        device.pull("there", Path(scratch) / "back")
        assert (Path(scratch) / "back").read_bytes() == name.encode()
        device.remove()
        assert not list(parent.iterdir())


def test_parity_distinguishes_bits_from_values() -> None:
    ones = {"0-0-0": np.ones(4, np.float32)}
    assert parity(ones, ones) == (True, np.inf)
    exact, db = parity(ones, {"0-0-0": np.full(4, 1.01, np.float32)})
    assert not exact
    assert db == pytest.approx(40, abs=0.1)
    assert parity({"0-0-0": np.zeros(4, np.float32)}, ones)[1] == -100
    with pytest.raises(ValueError, match="NaN"):
        parity(ones, {"0-0-0": np.full(4, np.nan, np.float32)})


def test_the_runner_needs_only_python_3_8() -> None:
    source = Path(device_runner.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    names = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    names |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert names <= {*sys.stdlib_module_names}


def test_figures_of_a_device_go_into_the_package_they_are_of(
    model: Path, ssh: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgepack.cli.common import app
    from edgepack.report.html.reading import read_report

    package, data = tmp_path / "dist", tmp_path / "x.npy"
    np.save(data, np.ones((8, 4), np.float32))
    build = ["build", str(model), "-t", "x86-cpu", "--calibration-data", str(data), "-o", str(package)]
    assert run(lambda: app([*build, "--method", "float"])) == 0
    bench = ["bench", str(model), str(package), "--runs", "3", "--device-python", sys.executable]
    for device in ("local", address(place), "local"):
        capsys.readouterr()
        assert run(partial(app, [*bench, "--device", device])) == 0
        assert f"added to the report in {package}" in capsys.readouterr().out
    report = read_report(package)
    assert [found.device for found in report.devices] == [address(place), "local"]
    assert [m.model for m in report.devices[0].models] == [m.name for m in report.models[:2]]
    assert run(lambda: app(["report", str(package)])) == 0
    assert "on local:" in capsys.readouterr().out
    assert "On devices" in (package / "report.html").read_text()


def test_a_build_is_timed_on_its_device(
    model: Path, ssh: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgepack.cli.common import app
    from edgepack.report.html.reading import read_report

    package, data = tmp_path / "dist", tmp_path / "x.npy"
    np.save(data, np.ones((8, 4), np.float32))
    words = ["build", str(model), "-t", "x86-cpu", "--calibration-data", str(data), "-o", str(package)]
    where = ["--device", address(place), "--device-python", sys.executable]
    assert run(lambda: app([*words, *where])) == 0
    report = read_report(package)
    (found,) = report.devices
    assert found.device == address(place)
    assert [m.latency_ms_p50 for m in report.models] == [m.p50_ms for m in found.models]
    assert ssh.read_text().count("--watch") == 2, "candidates once, artifacts once"
    assert run(lambda: app([*words, "--device", "adb:-x"])) == 2


def test_figures_that_a_device_does_not_report_are_none(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean is not the median; a cold start or memory that was not measured is not zero."""
    run = bench_on("local", [model], Runtime(), FEEDS, QUICK, python=sys.executable)
    reported = replace(run, models=(replace(run.models[0], p50_ms=2.0, mean_ms=3.0),))
    monkeypatch.setattr(timing, "bench_on", lambda *_, **__: reported)
    found, _ = DeviceTiming("local").latencies({"original": model}, Runtime(), FEEDS, 3)
    latency = found["original"]
    assert (latency.p50_ms, latency.mean_ms) == (2.0, 3.0)
    assert latency.cold_start_ms is None and latency.peak_memory_bytes is None


def test_a_system_without_proc_reports_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_runner, "read", lambda path: "")
    assert device_runner.memory_bytes() is None
    done = subprocess.CompletedProcess([], 0, b'{"milliseconds": 5.0, "memory_bytes": null}', b"")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert device_runner.cold(tmp_path, {"models": [{"file": "m.onnx"}]}, 0) == (5.0, None)


def test_the_devices_speeds_take_the_place_of_the_hosts(tmp_path: Path) -> None:
    """Candidates are compared by the device's times, not by this host's."""

    class Slow(DeviceTiming):
        def ratios(self, models: Sequence[Path], runtime: Runtime, feeds: Sequence[Feeds]) -> list[Ratio]:
            return [Ratio(1.0, 0.0), *(Ratio(0.5, 0.01) for _ in models[1:])]

    original = tmp_path / "model.onnx"
    original.write_bytes(onnx.parser.parse_model(NETWORK).SerializeToString())
    target = load_target("x86-cpu")
    scheme = QuantScheme(QuantType.UINT8, symmetric=False)
    bench = TrialBench(original, target, FEEDS, tmp_path, set(), timing=Slow("local"))
    trial = Trial(
        CandidateName(WholeModel.FLOAT),
        {},
        QuantPlan((), {}, scheme, scheme),
        original,
        1,
        2.0,
        0.0,
        Comparison(),
    )
    assert [t.speedup for t in bench.as_on_device([trial])] == [0.5]
    bench.timing = None
    assert [t.speedup for t in bench.as_on_device([trial])] == [2.0]
