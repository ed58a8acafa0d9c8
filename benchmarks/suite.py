"""Build one task of a suite with one call of the command line.

    python benchmarks/suite.py SUITE_FOLDER TASK -o DIR [--target x86-cpu] [--preset NAME]

SUITE_FOLDER holds a folder per task with model.onnx, calibration and evaluation data; how they are read is
in benchmarks/recipes/TASK.yaml. Leaves DIR/model.onnx and the report. More arguments go to edgepack.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent


def recipe_for(suite: Path, task: str) -> str:
    """The task's recipe with the suite's folder written into it."""
    template = HERE / "recipes" / f"{task}.yaml"
    if not template.exists():
        known = ", ".join(sorted(p.stem for p in template.parent.glob("*.yaml")))
        raise SystemExit(f"no recipe for {task}; known: {known}")
    return template.read_text(encoding="utf-8").replace("$SUITE", str(suite.absolute()))


@contextmanager
def recipe_file(suite: Path, task: str) -> Iterator[Path]:
    """The task's recipe as a file in a temporary folder, beside the metrics that it names."""
    with tempfile.TemporaryDirectory(prefix="edgepack-suite-") as folder:
        # References in a recipe are relative to its folder.
        shutil.copy(HERE / "suite_metrics.py", folder)
        path = Path(folder) / f"{task}.yaml"
        path.write_text(recipe_for(suite, task), encoding="utf-8")
        yield path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("task")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--target", default="x86-cpu")
    known, more = parser.parse_known_args()
    with recipe_file(known.suite, known.task) as recipe:
        call = [
            sys.executable, "-m", "edgepack", "build", "--recipe", str(recipe), "--target", known.target,
            "--output", str(known.output), *more,
        ]  # fmt: skip
        return subprocess.run(
            call, check=False, env={**os.environ, "EDGEPACK_SUITE": str(known.suite.absolute())}
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
