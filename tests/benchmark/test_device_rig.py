"""A package measured on emulated ARM devices, by ssh and by adb, and what goes wrong on the way.

Run with ``pytest -m rig`` after ``python tests/rig/arm.py --install`` and
``python tests/rig/ssh_device.py --install`` (as root, once).
"""

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rig.adb_device import adb_device
from rig.arm import missing as no_root
from rig.ssh_device import SshDevice, emulated_python, ssh_device
from rig.ssh_device import missing as no_ssh
from support.arm_network import build, network, samples

from edgepack.benchmark.devices.bench import bench_on
from edgepack.benchmark.devices.bundle import Job
from edgepack.cli.common import app
from edgepack.cli.program import run
from edgepack.config.target import load_target
from edgepack.errors import DeviceError
from edgepack.report.html.reading import read_report

__all__ = ["network"]  # a fixture

pytestmark = [
    pytest.mark.rig,
    pytest.mark.skipif(bool(no_root()), reason="no aarch64 rig: " + "; ".join(no_root())),
]
by_ssh = pytest.mark.skipif(bool(no_ssh()), reason=no_ssh())
HOST_FLOOR_DB = 30.0
QUICK = Job(runs=2, warmup=1, cold=False)
RUNTIME = load_target("arm-cpu").runtime
FEEDS = [{"x": x} for x in samples(3, 2)]


@pytest.fixture(scope="module")
def package(network: Path) -> Path:
    """The network built for arm-cpu."""
    return build(network, "arm-cpu", network.with_name("dist")).parent


def device_of(core: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshDevice]:
    with ssh_device(folder, core) as found:
        monkeypatch.setenv("PATH", f"{found.programs}:{os.environ['PATH']}")
        yield found


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshDevice]:
    yield from device_of("cortex-a76", tmp_path, monkeypatch)


@by_ssh
def test_both_cores_are_in_the_report_and_bit_exact(
    network: Path,
    package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs, addresses = [], []
    data = tmp_path / "x.npz"
    np.savez(data, x=np.concatenate(samples(3, 2)))
    for core in ("cortex-a53", "cortex-a76"):
        folder = tmp_path / core
        folder.mkdir()
        for found in device_of(core, folder, monkeypatch):
            words = ["bench", str(network), str(package), "--device", found.address, "--target", "arm-cpu"]
            options = ["--json", "--runs", "3", "--data", str(data)]
            assert run(partial(app, [*words, *options])) == 0
            runs.append(json.loads(capsys.readouterr().out))
            addresses.append(found.address)
            assert not list(found.folder.iterdir())
    float_runs, built = zip(*(r["models"] for r in runs), strict=True)
    assert {r["machine"] for r in runs} == {"aarch64"}
    assert built[0]["sha256"] == built[1]["sha256"], "cores differ"
    assert all(m["exact"] or m["sqnr_db"] >= HOST_FLOOR_DB for m in (*built, *float_runs))
    assert all(m["cold_start_ms"] > 0 for m in built)
    report = read_report(package)
    assert [found.device for found in report.devices] == addresses
    assert [m.model for m in report.devices[0].models] == [m.name for m in report.models[:2]]
    page = (package / "report.html").read_text()
    assert all(address in page for address in addresses)


@by_ssh
def test_a_full_disk_is_reported(
    package: Path, device: SshDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    full = device.address.replace(str(device.folder), str(device.folder.with_name("full")))
    words = ["bench", str(package), "--device", full, "--target", "arm-cpu"]
    assert run(lambda: app(words)) == 5
    assert "No space left" in capsys.readouterr().err


@by_ssh
def test_a_device_without_onnxruntime_says_what_to_install(
    package: Path, device: SshDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", str(package), "--device", device.address, "--target", "arm-cpu"]
    assert run(lambda: app([*words, "--device-python", device.bare_python])) == 5
    assert "install numpy and onnxruntime" in capsys.readouterr().err
    assert not list(device.folder.iterdir())


@by_ssh
def test_a_cut_connection_leaves_nothing(package: Path, device: SshDevice) -> None:
    def cut_in_mid_run() -> None:
        wait_for(lambda: bool(list(device.folder.glob("*/work/outputs.npz"))))
        device.cut()

    cutter = threading.Thread(target=cut_in_mid_run)
    cutter.start()
    with pytest.raises(DeviceError, match="the connection broke"):
        bench_on(device.address, [package / "model.onnx"], RUNTIME, FEEDS, replace(QUICK, runs=10**6))
    cutter.join()
    wait_for(lambda: not list(device.folder.iterdir()))


@pytest.mark.skipif(not shutil.which("adb"), reason="no adb (Debian: adb)")
def test_adb_runs_the_bundle(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    python = emulated_python(tmp_path)
    environment = {"PATH": f"{python.parent}:/usr/bin:/bin", "QEMU_CPU": "cortex-a53"}
    with socket.socket() as free:  # a separate adb server: another one may run here
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("HOME", str(tmp_path))
    with adb_device(folder, environment) as port:
        serial = f"127.0.0.1:{port}"
        try:
            subprocess.run(["adb", "connect", serial], check=True)
            found = bench_on(f"adb:{serial}", [package / "model.onnx"], RUNTIME, FEEDS, QUICK)
            with pytest.raises(DeviceError, match="cannot be reached"):
                bench_on("adb:nobody", [package / "model.onnx"], RUNTIME, FEEDS, QUICK)
        finally:
            subprocess.run(["adb", "kill-server"], check=False)
    assert found.machine == "aarch64"
    assert found.models[0].exact or (found.models[0].sqnr_db or 0) >= HOST_FLOOR_DB
    assert not list(folder.iterdir())


def wait_for(ready: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.05)
