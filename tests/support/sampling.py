"""Small sample data on disk, for tests."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgepack.config.recipe import Data
from edgepack.data.samples import Samples, open_samples
from edgepack.ir.inputs import InputSpec

F4, I8 = np.dtype(np.float32), np.dtype(np.int64)
X = InputSpec("x", F4, ("batch", 3, 4))
IDS = InputSpec("ids", I8, ("batch", "seq"))
MASK = InputSpec("mask", I8, ("batch", "seq"))
PICTURE = InputSpec("picture", F4, ("batch", 3, 8, 6))
ROW = np.arange(12, dtype=np.float32).reshape(3, 4)


def opened(path: Path | str, *inputs: InputSpec, **more: Any) -> Samples:
    base, images = more.pop("base", Path()), more.pop("images", {})
    return open_samples(Data(path=str(path), **more), "calibration", inputs, images, base=base)


def npz(path: Path, **arrays: Any) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def npy_folder(folder: Path, *arrays: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for index, array in enumerate(arrays):
        np.save(folder / f"{index:03}.npy", array)
    return folder


def image_folder(folder: Path, *names: str, first: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    for index, name in enumerate(names, first):
        Image.fromarray(np.full((8, 6, 3), index, np.uint8)).save(folder / name)
    return folder


def module(folder: Path, name: str, body: str) -> str:
    text = "import numpy as np\ndef samples():\n" + "".join(f"    {line}\n" for line in body.split("\n"))
    (folder / f"{name}.py").write_text(text)
    return f"{name}:samples"


def values(samples: Samples, name: str = "x") -> list[float]:
    return [float(s.feeds[name].ravel()[0]) for s in samples]
