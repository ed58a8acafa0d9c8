"""Run a model on saved inputs with onnxruntime and save the outputs, on the host and in the rig alike.

``python run_model.py model.onnx inputs.npz outputs.npz [--set session.qdqisint8allowed=1] [--disable NAME]``

Arrays of both archives are named ``<sample>/<name of the input or output>``. Standard output gets one JSON
object: ``machine``, ``onnxruntime``, ``samples``, and ``sha256`` over names, types, shapes and bytes of all
outputs, so that two runs can be compared without the files. It needs numpy and onnxruntime, not edgepack.
"""

import argparse
import hashlib
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

Arrays = Mapping[str, npt.NDArray[Any]]


def by_sample(arrays: Arrays) -> list[dict[str, npt.NDArray[Any]]]:
    """``{"0/x": a, "1/x": b}`` as ``[{"x": a}, {"x": b}]``."""
    samples: dict[int, dict[str, npt.NDArray[Any]]] = {}
    for key, array in arrays.items():
        index, name = key.split("/", 1)
        samples.setdefault(int(index), {})[name] = array
    return [samples[index] for index in sorted(samples)]


def digest(arrays: Arrays) -> str:
    """Changes with any bit of any array."""
    total = hashlib.sha256()
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key])
        total.update(f"{key} {array.dtype} {array.shape}\n".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def run(
    model: Path, inputs: Path, settings: Mapping[str, str], disabled: Sequence[str]
) -> dict[str, npt.NDArray[Any]]:
    """Outputs of all samples, on one thread of the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(
        str(model), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
    )
    names = [output.name for output in session.get_outputs()]
    with np.load(inputs) as archive:
        samples = by_sample(archive)
    return {
        f"{index}/{name}": np.asarray(output)
        for index, feeds in enumerate(samples)
        for name, output in zip(names, session.run(names, feeds), strict=True)
    }


def main() -> None:
    """Run, save, tell."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("outputs", type=Path)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="session configuration"
    )
    parser.add_argument("--disable", action="append", default=[], metavar="NAME", help="graph optimizer")
    args = parser.parse_args()
    settings = dict(item.split("=", 1) for item in args.set)
    outputs = run(args.model, args.inputs, settings, args.disable)
    np.savez(args.outputs, **outputs)  # type: ignore[arg-type]  # every keyword is an array
    told = {
        "machine": platform.machine(),
        "onnxruntime": ort.__version__,
        "samples": len({key.split("/", 1)[0] for key in outputs}),
        "sha256": digest(outputs),
    }
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
