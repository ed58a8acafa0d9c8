"""The bundle for a device: one file that Python runs, with the models and their inputs in it."""

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from edgepack.config.target import Runtime
from edgepack.data.feeds import plain
from edgepack.errors import ExportError
from edgepack.ir.arrays import Array, Feeds
from edgepack.ir.files import external_files
from edgepack.runtime.runner import open_model

RUNNER = "device_runner.py"


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured."""

    runs: int = 50
    warmup: int = 3
    cold: bool = True
    """Whether cold starts are measured."""
    ops: bool = False
    """Whether the time per operator type is measured."""


def write_bundle(
    path: Path, models: Sequence[Path], runtime: Runtime, feeds: Sequence[Feeds], job: Job
) -> dict[str, Array]:
    """Write the bundle ``path`` for ``models`` on ``feeds``; returns the outputs of this host's runtime.

    The outputs are keyed by ``<model>-<sample>-<output>``, all numbers from 0. The bundle has no names of the
    user: its models are called ``0/model.onnx``, ``1/model.tflite``.

    Raises:
        ModelError: the runtime refuses a model.
        ExportError: the bundle cannot be written.
    """
    listed: list[dict[str, object]] = []
    outputs: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bundle:
            bundle.writestr("__main__.py", files(__package__).joinpath(RUNNER).read_bytes())
            for place, model in enumerate(models):
                runner = open_model(model, runtime)
                names: list[str] = []
                for number, feed in enumerate(feeds):
                    prepared = runner.prepare(feed)
                    names = list(prepared)
                    arrays = io.BytesIO()
                    np.savez(arrays, *map(plain, prepared.values()))
                    bundle.writestr(f"{place}-{number}.npz", arrays.getvalue())
                    for output, array in enumerate(runner.call(prepared)):
                        outputs[f"{place}-{number}-{output}"] = np.array(array)
                file = f"{place}/model{model.suffix}"
                bundle.write(model, file)
                for beside in external_files(model) if model.suffix == ".onnx" else ():
                    bundle.write(model.parent / beside, f"{place}/{beside}")
                listed.append({"id": place, "file": file, "inputs": names, "samples": len(feeds)})
            content = {**asdict(job), "runtime": runtime.model_dump(mode="json"), "models": listed}
            bundle.writestr("job.json", json.dumps(content))
    except OSError as error:
        raise ExportError(f"{path}: the bundle cannot be written ({error.strerror})") from error
    return outputs
