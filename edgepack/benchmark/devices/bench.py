"""The benchmark on a device: sends a bundle, runs it, gets the figures, and removes it."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from edgepack.benchmark.devices.adb import open_adb
from edgepack.benchmark.devices.bundle import Job, write_bundle
from edgepack.benchmark.devices.docker import open_docker
from edgepack.benchmark.devices.local import open_local
from edgepack.benchmark.devices.protocol import LONG_S, NOT_EXECUTABLE, NOT_FOUND, Device, Done
from edgepack.benchmark.devices.ssh import open_ssh
from edgepack.config.target import Runtime
from edgepack.errors import ConfigError, DeviceError, ModelError, did_you_mean
from edgepack.ir.arrays import Array, Feeds
from edgepack.ir.files import model_bytes
from edgepack.ir.numerics import ratio_db
from edgepack.results import DeviceFigures, DeviceRun, finite

BUNDLE = "bench.pyz"
LEAST_DB = -100.0
"""SQNR of noise without any signal, since JSON has no infinity."""
KINDS = ("local", "ssh", "adb", "docker")
LACKING, NO_SPACE, REFUSED, HOST_GONE = 10, 11, 12, 13
"""Exit codes of the program in the bundle, see :mod:`edgepack.benchmark.devices.device_runner`."""


def open_device(address: str) -> Device:
    """The device at ``address``, with a new folder on it.

    Raises:
        ConfigError: an unknown kind of device, or an invalid address.
        DeviceError: it cannot be reached.
    """
    kind = address.partition(":")[0]
    if address == "local":
        return open_local(tempfile.gettempdir())
    if kind == "ssh" and address.startswith("ssh://"):
        return open_ssh(address)
    if kind == "adb":
        return open_adb(address)
    if kind == "docker":
        return open_docker(address)
    raise ConfigError(
        f"--device {address!r}: write local, ssh://user@host[:port][/folder], adb[:serial] or docker:IMAGE; "
        + did_you_mean(kind, KINDS)
    )


@contextmanager
def opened(address: str, *, keep: bool) -> Iterator[Device]:
    """A device whose folder is removed on exit, unless ``keep`` is set.

    Raises:
        ConfigError, DeviceError: see :func:`open_device`.
    """
    device = open_device(address)
    try:
        yield device
    except DeviceError:
        # Report the first error: a lost device cannot be cleaned up from here, it removes the folder itself.
        _try_to_remove(device)
        raise
    except BaseException:
        _try_to_remove(device)
        raise
    if not keep:
        device.remove()


def _try_to_remove(device: Device) -> None:
    try:
        device.remove()
    except DeviceError:
        return


def bench_on(
    address: str,
    models: Sequence[Path],
    runtime: Runtime,
    feeds: Sequence[Feeds],
    job: Job,
    *,
    python: str = "python3",
    keep: bool = False,
) -> DeviceRun:
    """Measure ``models`` on the device ``address``, interleaved, on ``feeds``.

    ``python``: the device's interpreter; ``keep``: leave the bundle and its results on the device.

    Raises:
        ConfigError: an invalid address.
        ModelError: this host's runtime or the device's refuses a model.
        DeviceError: the device cannot be reached, was lost, or cannot run the benchmark.
    """
    with tempfile.TemporaryDirectory(prefix="edgepack-device-") as scratch:
        here = Path(scratch)
        reference = write_bundle(here / BUNDLE, models, runtime, feeds, job)
        with opened(address, keep=keep) as device:
            device.push(here / BUNDLE, BUNDLE)
            words = [python, f"{device.folder}/{BUNDLE}", f"{device.folder}/work", "--watch"]
            _judge(device, device.run(words, LONG_S), python, models)
            for name in ("result.json", "outputs.npz"):
                device.pull(f"work/{name}", here / name)
        return _figures(address, here, models, runtime, reference, len(feeds))


def _judge(device: Device, done: Done, python: str, models: Sequence[Path]) -> None:
    """Raise the error of a benchmark that failed."""
    if not done.code:
        return
    reasons: Mapping[int, str] = {
        NOT_FOUND: f"there is no {python!r}; name its Python with --device-python",
        NOT_EXECUTABLE: f"{python!r} does not run on its processor: {done.reason}",
        LACKING: f"its Python lacks a library ({done.reason}); install numpy and onnxruntime on it, "
        "or ai-edge-litert for .tflite, built for its processor",
        NO_SPACE: f"no space is left in {device.folder} ({done.reason}); free some, or name another folder",
        HOST_GONE: "it lost the connection to this host and stopped",
    }
    if done.code == REFUSED:
        listed = ", ".join(map(str, models))
        raise ModelError(f"{device.name}: refuses one of {listed}: {done.reason}")
    if "exec format error" in (done.stdout + done.stderr).lower():
        raise DeviceError(f"{device.name}: {python!r} is not built for its processor")
    reason = reasons.get(done.code, f"the bench ended with exit code {done.code}: {done.reason}")
    raise DeviceError(f"{device.name}: {reason}")


def _figures(
    address: str,
    here: Path,
    models: Sequence[Path],
    runtime: Runtime,
    reference: Mapping[str, Array],
    samples: int,
) -> DeviceRun:
    """The figures in the device's JSON and outputs.

    Raises:
        DeviceError: they are broken.
    """
    try:
        result: dict[str, Any] = json.loads((here / "result.json").read_text(encoding="utf-8"))
        with np.load(here / "outputs.npz") as archive:
            outputs = dict(archive)
        rows = [
            _row(model, row, reference, outputs) for model, row in zip(models, result["models"], strict=True)
        ]
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return DeviceRun(
            device=address, threads=runtime.threads, samples=samples, date=date, models=tuple(rows),
            **result["machine"],
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, EOFError, OSError) as error:
        raise DeviceError(f"{address}: its results cannot be read ({error})") from error


def _row(
    model: Path, row: Mapping[str, Any], reference: Mapping[str, Array], outputs: Mapping[str, Array]
) -> DeviceFigures:
    values = dict(row)
    place = values.pop("id")
    own = {key: array for key, array in reference.items() if key.startswith(f"{place}-")}
    exact, sqnr_db = parity(own, outputs)
    size = model_bytes(model) if model.suffix == ".onnx" else model.stat().st_size
    return DeviceFigures(model=str(model), size_bytes=size, exact=exact, sqnr_db=finite(sqnr_db), **values)


def parity(expected: Mapping[str, Array], found: Mapping[str, Array]) -> tuple[bool, float]:
    """Whether two sets of outputs are bit-exact, and their SQNR in dB.

    Raises:
        KeyError, ValueError: an output is missing or of another shape.
    """
    exact, signal, noise = True, 0.0, 0.0
    for key, array in expected.items():
        other = found[key]
        if other.shape != array.shape:
            raise ValueError(
                f"output {key} has shape {other.shape} on the device and {array.shape} on this host"
            )
        exact &= other.dtype == array.dtype and other.tobytes() == array.tobytes()
        if array.dtype.kind not in "fiub":
            continue
        wide = array.astype(np.float64)
        if not np.array_equal(np.isfinite(wide), np.isfinite(other)):
            raise ValueError(f"output {key} has NaN or infinity in other places than on this host")
        wide, other = np.where(np.isfinite(wide), wide, 0), np.where(np.isfinite(wide), other, 0)
        signal += float((wide**2).sum())
        noise += float(((wide - other) ** 2).sum())
    return exact, max(ratio_db(signal, noise), LEAST_DB)
