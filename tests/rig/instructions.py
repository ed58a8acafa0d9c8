"""Instructions of one inference on an emulated ARM core: the same number every time, on any host.

Instructions are not cycles: a core does several at once, waits for memory, and a dot product of 16 bytes
counts as one like an addition. The ratio of two forms of one model on one core is a guide where there is no
board.
"""

import re
import subprocess
from pathlib import Path

from rig.arm import PYTHON, QEMU, cache_folder, guest_environment

SOURCE = Path(__file__).with_name("icount.c")
PROGRAM = Path(__file__).with_name("count_model.py")


def build_plugin() -> Path:
    """The plugin, compiled anew where its source is newer.

    Raises:
        FileNotFoundError: there is no ``gcc``.
        subprocess.CalledProcessError: it does not compile.
    """
    library = cache_folder() / "libicount.so"
    if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        library.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-O2", "-Wall", "-o", str(library), str(SOURCE)], check=True
        )
    return library


def count(root: Path, cpu: str, model: Path, inputs: Path, timeout_s: float = 600) -> int:
    """Instructions of one run of ``model`` on ``cpu``, the call from Python included (some 20,000).

    ``inputs``: an .npz with the arrays by the name of the input.

    Raises:
        subprocess.CalledProcessError: the model does not run.
        subprocess.TimeoutExpired: it takes longer than ``timeout_s`` seconds.
    """
    python = root / "usr" / "bin" / f"python{PYTHON}"
    command = [
        QEMU,
        "-plugin",
        *map(str, [build_plugin(), "-L", root, "-cpu", cpu, python, PROGRAM, model, inputs]),
    ]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=timeout_s, env=guest_environment(root)
    )
    return int(re.findall(r"^instructions (\d+)$", done.stderr, re.MULTILINE)[-1])
