"""onnxruntime-web: downloaded once with npm, kept in the cache, and verified at every use."""

import base64
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from edgepack.errors import ConfigError, DeviceError

VERSION = "1.30.0"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""Of the package's archive, base64, as npm publishes it."""
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
FETCH_S = 300.0


def archive_path() -> Path:
    """The path of the archive, in ``$EDGEPACK_CACHE`` or ``~/.cache/edgepack``."""
    cache = Path(os.environ.get("EDGEPACK_CACHE") or Path.home() / ".cache" / "edgepack")
    return cache / f"onnxruntime-web-{VERSION}.tgz"


def runtime_files() -> dict[str, bytes]:
    """The files of onnxruntime-web that the page needs, by name; downloaded if they are missing.

    Raises:
        ConfigError: the files and npm are missing.
        DeviceError: npm cannot download the package, or its digest is wrong.
    """
    path = archive_path()
    if not path.exists():
        _fetch(path)
    content = path.read_bytes()
    _check(content, path)
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        return {name: _member(archive, f"package/dist/{name}") for name in FILES}


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    found = archive.extractfile(name)
    if found is None:
        raise DeviceError(f"onnxruntime-web {VERSION}: has no {name}")
    return found.read()


def _check(content: bytes, path: Path) -> None:
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != SHA512:
        raise DeviceError(f"{path}: is not onnxruntime-web {VERSION} (its SHA-512 differs); delete it")


def _fetch(path: Path) -> None:
    if not shutil.which("npm"):
        raise ConfigError(
            f"onnxruntime-web {VERSION} is fetched once with npm, which is not installed; install npm, or "
            f"put the package's archive at {path}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetching-") as scratch:
        command = ["npm", "pack", f"onnxruntime-web@{VERSION}", "--silent", "--pack-destination", scratch]
        try:
            done = subprocess.run(
                command, cwd=scratch, capture_output=True, text=True, timeout=FETCH_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise DeviceError(f"npm did not fetch onnxruntime-web within {FETCH_S:.0f} s") from error
        fetched = Path(scratch) / path.name
        if done.returncode or not fetched.exists():
            reason = (done.stderr.strip() or done.stdout.strip() or "no word why").splitlines()[-1]
            raise DeviceError(f"npm cannot fetch onnxruntime-web {VERSION}: {reason}")
        _check(fetched.read_bytes(), fetched)
        fetched.replace(path)
