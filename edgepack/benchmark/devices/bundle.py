"""The bundle that goes to a device: one file that Python runs, with the models and their inputs in it."""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
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
Answers = Mapping[str, Array]
"""Outputs by ``<model>-<sample>-<output>``, all numbers that count from 0."""


@dataclass(frozen=True, slots=True)
class Job:
    """How much is measured."""

    runs: int = 50
    warmup: int = 3
    cold: bool = True
    """Whether cold starts are measured, too."""
    ops: bool = False
    """Whether time is told by type of operator, too."""


def write_bundle(
    path: Path, models: Sequence[Path], runtime: Runtime, feeds: Sequence[Feeds], job: Job
) -> dict[str, Array]:
    """Write the bundle ``path`` for ``models`` on ``feeds``; returns what this host's runtime answers.

    Names of the user stay here: in the bundle models are called ``0/model.onnx``, ``1/model.tflite``.

    Raises:
        ModelError: the runtime refuses a model.
        ExportError: the bundle cannot be written.
    """
    listed: list[dict[str, object]] = []
    answers: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bundle:
            bundle.writestr("__main__.py", files(__package__).joinpath(RUNNER).read_bytes())
            for place, model in enumerate(models):
                runner = open_model(model, runtime)
                names: list[str] = []
                for number, feed in enumerate(feeds):
                    prepared = runner.prepare(feed)
                    names = list(prepared)
                    content = io.BytesIO()
                    np.savez(content, *map(plain, prepared.values()))
                    bundle.writestr(f"{place}-{number}.npz", content.getvalue())
                    for output, array in enumerate(runner.call(prepared)):
                        answers[f"{place}-{number}-{output}"] = np.array(array)
                file = f"{place}/model{model.suffix}"
                bundle.write(model, file)
                for beside in external_files(model) if model.suffix == ".onnx" else ():
                    bundle.write(model.parent / beside, f"{place}/{beside}")
                listed.append({"id": place, "file": file, "inputs": names, "samples": len(feeds)})
            told = {**asdict(job), "runtime": runtime.model_dump(mode="json"), "models": listed}
            bundle.writestr("job.json", json.dumps(told))
    except OSError as error:
        raise ExportError(f"{path}: the bundle cannot be written ({error.strerror})") from error
    return answers
