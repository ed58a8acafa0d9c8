"""A device of some years ago: tflite-runtime 2.14 and NumPy 1, in a virtual environment of their own.

``python tests/rig/old_tflite.py`` makes it once, in about 10 s, in the cache folder.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
from rig.arm import cache_folder

RUNTIME = "tflite-runtime==2.14.0"
PYTHON = "python3.11"
"""The last one that it has a wheel for."""
PROGRAM = Path(__file__).with_name("run_tflite.py")


def place() -> Path:
    """Where the environment is, or will be."""
    return cache_folder() / RUNTIME.replace("==", "-")


def missing() -> str:
    """What to do before it can be used; empty when it can."""
    return "" if place().is_dir() else f"no {place()}: run `python tests/rig/old_tflite.py`"


def make() -> Path:
    """The environment, made if it is not there. A failed attempt leaves nothing behind."""
    if not place().is_dir():
        place().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place().parent, prefix="making-") as scratch:
            made = Path(scratch) / "environment"
            subprocess.run([PYTHON, "-m", "venv", str(made)], check=True)
            # Called by module: the programs of an environment that was moved no longer find it.
            install = [str(made / "bin/python"), "-m", "pip", "install", "--quiet", RUNTIME, "numpy<2"]
            subprocess.run(install, check=True, stdout=sys.stderr)
            made.rename(place())
    return place()


def run_old(model: Path, feed: Path, outputs: Path) -> None:
    """Run ``model`` on the arrays in ``feed`` (.npz, by tensor name) and write those it gives.

    Raises:
        subprocess.CalledProcessError: the runtime refuses the file; the reason is on standard error.
    """
    command = [str(place() / "bin/python"), "-I", str(PROGRAM), str(model), str(feed), str(outputs)]
    subprocess.run(command, check=True)


def main() -> int:
    """Make the environment, and write its path to standard output."""
    if not shutil.which(PYTHON):
        sys.stderr.write(f"{RUNTIME} has no wheel for other Pythons than {PYTHON}, which is not here\n")
        return 1
    sys.stdout.write(f"{make()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
