"""An aarch64 machine without a board: a Debian root, aarch64 wheels, and qemu to run its programs.

``python tests/rig/arm.py --install`` installs the two Debian packages that are needed (as root) and makes the
root; without ``--install`` nothing outside of the cache folder is touched. The root is made once per version
of onnxruntime, which is the host's, so that outputs can be compared.

It shows what the integer kernels compute on a core, not how fast: emulated time means nothing.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path

QEMU = "qemu-aarch64"
PACKAGES = {QEMU: "qemu-user", "mmdebstrap": "mmdebstrap"}
"""The program that is needed, and the Debian package that has it."""

SUITE = "bookworm"
PYTHON = "3.11"
"""The Python of that suite; the host may have another."""
INCLUDE = (
    *("libc6", "libstdc++6", "libgcc-s1", "zlib1g", "libssl3", "libffi8"),
    *("python3.11-minimal", "libpython3.11-stdlib"),
)
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")


def cache_folder() -> Path:
    """``$EDGEPACK_RIG``, or ``~/.cache/edgepack-rig``."""
    return Path(os.environ.get("EDGEPACK_RIG") or Path.home() / ".cache" / "edgepack-rig").absolute()


def root_folder() -> Path:
    """Where the root for the host's onnxruntime is, or will be."""
    return cache_folder() / f"{SUITE}-arm64-onnxruntime-{version('onnxruntime')}"


def missing() -> list[str]:
    """What a test needs and is not there, with the command that brings it; empty when the rig can run."""
    lacking = [f"the program {program} (Debian: {package})" for program, package in _absent().items()]
    if not root_folder().is_dir():
        lacking.append(f"the aarch64 root {root_folder()}")
    return [f"{what} is missing: run `python tests/rig/arm.py --install`" for what in lacking]


def _absent() -> dict[str, str]:
    """The part of ``PACKAGES`` that this machine lacks."""
    return {program: package for program, package in PACKAGES.items() if not shutil.which(program)}


def install_packages() -> None:
    """``apt-get install`` of the programs that are missing; needs root."""
    install_debian(_absent().values())


def install_debian(wanted: Collection[str]) -> None:
    """``apt-get install`` of Debian packages; needs root unless there is nothing to do."""
    if wanted:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-q"], check=True, stdout=sys.stderr, env=environment)
        install = ["apt-get", "install", "-q", "-y", "--no-install-recommends", *wanted]
        subprocess.run(install, check=True, stdout=sys.stderr, env=environment)


def make_root() -> Path:
    """The root, made if it is not there: about 10 s and 200 MB. A failed attempt leaves nothing behind."""
    root = root_folder()
    if root.is_dir():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix="making-") as scratch:
        made = Path(scratch) / "root"
        _unpack_debian(made)
        _unpack_wheels(made / "opt" / "site")
        _describe_processor(made)
        run_arm(made, "cortex-a76", Path(__file__).with_name("run_model.py"), ["--help"])
        made.rename(root)
    return root


def _unpack_debian(root: Path) -> None:
    """C library and Python, unpacked and not configured: nothing of arm64 has to run for that."""
    subprocess.run(
        [
            *("mmdebstrap", "--quiet", "--variant=extract", "--architectures=arm64"),
            *(f"--include={','.join(INCLUDE)}", SUITE, str(root)),
        ],
        check=True,
        stdout=sys.stderr,
    )


def _unpack_wheels(site: Path) -> None:
    """The host's version of onnxruntime for aarch64, and what it depends on."""
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", str(site)),
            *("--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}"),
            *(f"--platform={platform}" for platform in PLATFORMS),
            f"onnxruntime=={version('onnxruntime')}",
        ],
        check=True,
        stdout=sys.stderr,
    )


def _describe_processor(root: Path) -> None:
    """Files that programs in the root find before the host's.

    onnxruntime for aarch64 crashes at import where ``/proc/cpuinfo`` describes an x86 processor.
    """
    (root / "proc").mkdir(exist_ok=True)
    shutil.copyfile(Path(__file__).with_name("cpuinfo"), root / "proc" / "cpuinfo")
    processors = root / "sys" / "devices" / "system" / "cpu"
    processors.mkdir(parents=True)
    for name in ("possible", "present", "online"):
        (processors / name).write_text("0-1\n")


def run_arm(
    root: Path, cpu: str, script: Path, args: Sequence[str | Path], timeout_s: float = 300
) -> "subprocess.CompletedProcess[str]":
    """Run a Python script on an emulated core.

    ``cpu`` is a name of ``qemu-aarch64 -cpu help``: cortex-a53 and cortex-a72 have no dot product, cortex-a76
    has one, ``max,sme=off,sve=off`` has i8mm too. The script sees the host's files and the root's packages.

    Raises:
        subprocess.CalledProcessError: the script failed; ``stderr`` says why.
        subprocess.TimeoutExpired: it took longer than ``timeout_s`` seconds.
    """
    python = root / "usr" / "bin" / f"python{PYTHON}"
    return subprocess.run(
        [QEMU, "-L", root, "-cpu", cpu, python, script, *args],
        check=True,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=guest_environment(root),
    )


def guest_environment(root: Path) -> dict[str, str]:
    """Variables of a program in the root: its own Python and packages, one thread, the same each time."""
    return {
        "PYTHONHOME": str(root / "usr"),
        "PYTHONPATH": str(root / "opt" / "site"),
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
        "HOME": "/tmp",
    }


def main() -> int:
    """Make the rig, and write the path of its root to standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--install", action="store_true", help="apt-get install what is missing (as root)")
    if parser.parse_args().install:
        install_packages()
    if absent := _absent().values():
        sys.stderr.write(f"missing: {' '.join(absent)}; install them, or run this as root with --install\n")
        return 1
    root = make_root()
    sys.stdout.write(f"{root}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
