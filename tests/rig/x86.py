"""Run a model as an x86 processor without VNNI computes it: onnxruntime under qemu-user's Haswell."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from edgepack.runtime.host import overflows

EMULATOR = "qemu-x86_64"
PROCESSOR = "Haswell"
"""AVX2, no VNNI: its kernels add pairs in 16 bits. Emulated with all that saturates."""
SCRIPT = Path(__file__).parent / "run_model.py"


def missing() -> list[str]:
    """What this host lacks."""
    lacks = [] if shutil.which(EMULATOR) else [f"{EMULATOR} (Debian's qemu-user)"]
    if os.uname().machine != "x86_64":
        return [*lacks, "an x86-64 host, whose Python is emulated"]
    return [*lacks, "VNNI, which the host's own run stands for"] if overflows() else lacks


def run_x86(model: Path, inputs: Path, outputs: Path, *, vnni: bool) -> None:
    """Save the outputs of ``model`` on ``inputs`` (see :mod:`rig.run_model`), on the host or emulated."""
    emulated = [] if vnni else [EMULATOR, "-cpu", PROCESSOR]
    python = str(Path(sys.executable).resolve())
    subprocess.run(
        [*emulated, python, str(SCRIPT), str(model), str(inputs), str(outputs)],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"], "OMP_NUM_THREADS": "1"},
    )
