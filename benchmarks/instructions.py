"""Instructions of one inference on ARM cores without and with dot product, float against int8.

    python tests/rig/arm.py --install                # once, as root
    python benchmarks/instructions.py SUITE_FOLDER [TASK ...] [-o FOLDER] [--core NAME ...]

Each task of the suite is built for arm-cpu with u8 and with s8 activations (`--method static`, the preset
fast, since how weights are rounded changes no count) and run on emulated cores, on its first calibration
sample. The counts are the same on every host and in every repeat. Prints a table in Markdown. FOLDER keeps
what was built for the next time.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from rig.arm import missing, root_folder
from rig.instructions import count
from suite import recipe_file

from edgepack.config.recipe import load_recipe
from edgepack.data.samples import open_samples
from edgepack.ir.files import load_model
from edgepack.ir.inputs import input_specs

TASKS = ("efficientnet_lite0", "fastestdet", "ppocrv4_rec", "minilm_sst2", "dscnn_fsdd", "dlrm_ml100k")
CORES = ("cortex-a53", "cortex-a72", "cortex-a76")
HERE = Path(__file__).parent
FORMS = ("float", "int8 u8", "int8 s8")


def signed_target(folder: Path) -> Path:
    """arm-cpu with s8 activations."""
    text = (HERE.parent / "targets" / "arm-cpu.yaml").read_text(encoding="utf-8")
    path = folder / "arm-cpu-s8.yaml"
    changed = text.replace("activation_type: uint8", "activation_type: int8")
    if not path.exists() or path.read_text(encoding="utf-8") != changed:
        path.write_text(changed, encoding="utf-8")
    return path


def built(suite: Path, task: str, target: str, folder: Path) -> Path:
    """The task's model built for ``target``, made if it is not there. A gate that is not met is no matter."""
    model = folder / task / Path(target).stem / "model.onnx"
    if not model.exists():
        call = [sys.executable, str(HERE / "suite.py"), str(suite), task, "-o", str(model.parent)]
        options = ["--target", target, "--method", "static", "--preset", "fast", "--json"]
        done = subprocess.run([*call, *options], check=False, stdout=subprocess.DEVNULL)
        if done.returncode > 1:
            raise SystemExit(f"{task}: cannot be built for {target}")
    return model


def first_sample(suite: Path, task: str, folder: Path) -> tuple[Path, Path]:
    """The original, and its first calibration sample as an .npz by input."""
    with recipe_file(suite, task) as file:
        recipe = load_recipe(file, {})
    assert recipe.calibration_data is not None
    inputs = input_specs(load_model(recipe.model))
    samples = open_samples(recipe.calibration_data, "calibration", inputs, recipe.images, base=HERE)
    path = folder / task / "feed.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **next(iter(samples)).feeds)  # type: ignore[arg-type]  # every keyword is an array
    return recipe.model, path


def rows_of(suite: Path, task: str, cores: Sequence[str], folder: Path) -> list[str]:
    """A line of the table for each core."""
    original, feed = first_sample(suite, task, folder)
    models = [
        original,
        built(suite, task, "arm-cpu", folder),
        built(suite, task, str(signed_target(folder)), folder),
    ]
    rows = []
    for core in cores:
        counts = [count(root_folder(), core, model.absolute(), feed.absolute()) for model in models]
        cells = [f"{c / 1e6:.2f}" + (f" ({counts[0] / c:.2f}×)" if i else "") for i, c in enumerate(counts)]
        rows.append(f"| {task} | {core} | {' | '.join(cells)} |")
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("tasks", nargs="*", metavar="TASK", default=TASKS)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--core", action="append", help="of qemu-aarch64 -cpu help")
    args = parser.parse_args()
    if lacking := missing():
        raise SystemExit("\n".join(lacking))
    with tempfile.TemporaryDirectory(prefix="edgepack-instructions-") as scratch:
        folder = args.output or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [r for task in args.tasks for r in rows_of(args.suite, task, args.core or CORES, folder)]
    print(f"| task | core | {' | '.join(f'{form}, millions' for form in FORMS)} |")
    print("|---|---|" + "---|" * len(FORMS))
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
