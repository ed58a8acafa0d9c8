"""CIFAR-10 as the benchmarks read it: a .zip of ``train/CLASS/NAME.jpg`` and ``test/CLASS/NAME.jpg``."""

import io
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image


def read(archive: Path, part: str, step: int = 1) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Every ``step``-th picture of a part, ``[N, 3, 32, 32]`` of 0 to 255, red first, and classes ``[N]``.

    Classes are numbered in the order of their names.
    """
    pictures, kinds = [], []
    with zipfile.ZipFile(archive) as opened:
        names = sorted(n for n in opened.namelist() if n.startswith(f"{part}/") and n.endswith(".jpg"))
        classes = sorted({n.split("/")[1] for n in names})
        for name in names[::step]:
            pictures.append(np.asarray(Image.open(io.BytesIO(opened.read(name))).convert("RGB"), np.float32))
            kinds.append(classes.index(name.split("/")[1]))
    return np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2)), np.array(kinds, np.int64)


def standardized(pictures: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """``pictures`` as the network of ``train_cifar10.py`` takes them."""
    return (pictures - np.float32(125)) / np.float32(63)
