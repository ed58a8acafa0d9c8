"""Sizes of models raw, zipped, by zstd, by xz and as .epk, with the time and memory that packing takes.

    python benchmarks/packed.py MODEL... [--zeros SHARE] [--values N]

"By kind" is what the standard library has: text and planes of numbers by LZMA, each int8 tensor by Huffman
alone or by LZMA, whichever is smaller. With --zeros and --values the int8 weights of a model are changed
first: that share of the smallest becomes zero, the others take N quantiles of their values. brotli is left
out where it is not installed, zstd where neither the program nor the package is.
"""

import argparse
import lzma
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from edgepack.pack.epk import pack, unpack
from edgepack.pack.wire import INT8, raw_tensors

LEAST_BYTES = 512
"""Smaller int8 tensors are no weights to prune."""
FEW_BYTES = 1 << 15
"""Numbers of several bytes in less than this are coded together."""


def pack_once(model: str, folder: str) -> tuple[int, float, float, int]:
    """Bytes, seconds to pack and check, seconds to unpack, and MB at the peak of this process."""
    started = time.perf_counter()
    packed = pack(Path(model), Path(folder) / "m.epk")
    middle = time.perf_counter()
    (back, *_) = unpack(packed.path, Path(folder) / "back")
    ended = time.perf_counter()
    if back.read_bytes() != Path(model).read_bytes():
        sys.exit(f"{model}: does not come back")
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    peak_kb = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return packed.packed_bytes, middle - started, ended - middle, peak_kb // 1024


def zstd_bytes(model: Path) -> str:
    """By zstd at level 19, the program or the package, if one is here."""
    if find_spec("zstandard"):
        packer = import_module("zstandard").ZstdCompressor(level=19)
        return f"{len(packer.compress(model.read_bytes())):,}"
    if shutil.which("zstd") is None:
        return "-"
    found = subprocess.run(["zstd", "-19", "-q", "-c", str(model)], capture_output=True, check=True)
    return f"{len(found.stdout):,}"


def brotli_bytes(raw: bytes) -> str:
    """By brotli at its best level, if it is here."""
    return f"{len(import_module('brotli').compress(raw)):,}" if find_spec("brotli") else "-"


def _lzma(raw: bytes) -> int:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 0, "pb": 0, "dict_size": 1 << 24}]
    return len(lzma.compress(raw, lzma.FORMAT_RAW, filters=filters))


def _planes(raw: bytes, item_bytes: int) -> bytes:
    return b"".join(raw[i::item_bytes] for i in range(item_bytes))


def by_kind(raw: bytes) -> int:
    """Bytes of the model's own file, tensors apart, by zlib and LZMA; no header is counted."""
    found = (t for t in raw_tensors(memoryview(raw)) if t.location is None and t.length >= 32)
    at = total = 0
    text = b""
    few: dict[int, bytes] = {}
    for tensor in sorted(found, key=lambda t: t.offset):
        text += raw[at : tensor.offset]
        at = tensor.offset + tensor.length
        content, size = raw[tensor.offset : at], tensor.item_bytes
        if size > 1 and len(content) < FEW_BYTES:
            few[size] = few.get(size, b"") + content
            continue
        content = _planes(content, size)
        huffman = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        total += min(len(huffman.compress(content) + huffman.flush()), _lzma(content))
    together = [_planes(content, size) for size, content in few.items()]
    return total + sum(map(_lzma, together)) + len(lzma.compress(text + raw[at:], lzma.FORMAT_ALONE))


def sparse(weights: npt.NDArray[np.int8], zeros: float, values: int) -> npt.NDArray[np.int8]:
    """The weights with that share of zeros, the others on so many quantiles (0: as they are)."""
    size = np.abs(weights.astype(np.int16))
    kept = size > (np.quantile(size, zeros) if zeros else -1)
    if values and kept.any():
        levels = np.unique(np.rint(np.quantile(weights[kept], (np.arange(values) + 0.5) / values)))
        near = np.abs(weights.astype(np.float32)[..., None] - levels).argmin(-1)
        weights = levels[near].astype(np.int8)
    return np.where(kept, weights, 0).astype(np.int8)


def changed(model: Path, folder: str, zeros: float, values: int) -> Path:
    """The model with sparse weights, in ``folder``."""
    proto = onnx.load_model(str(model))
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if tensor.data_type == INT8 and array.nbytes >= LEAST_BYTES:
            tensor.CopyFrom(numpy_helper.from_array(sparse(array, zeros, values), tensor.name))
    path = Path(folder) / model.name
    onnx.save_model(proto, str(path))
    return path


def row(model: Path, label: str) -> str:
    raw = model.read_bytes()
    xz = len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
    kinds = by_kind(raw) if model.suffix == ".onnx" else 0
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
        size, packing, unpacking, peak = pool.apply(pack_once, (str(model), folder))
    return (
        f"| {label} | {len(raw):,} | {len(zlib.compress(raw, 9)):,} | {zstd_bytes(model)} | {xz:,} "
        f"| {brotli_bytes(raw)} | {kinds:,} | {size:,} | {packing:.2f} | {unpacking:.2f} | {peak} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--zeros", type=float, default=0.0)
    parser.add_argument("--values", type=int, default=0)
    known = parser.parse_args()
    print(
        "| model | raw | zip -9 | zstd -19 | xz -9e | brotli | by kind | .epk | pack s | unpack s | peak MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for model in known.models:
        label = f"{model.parent.name}/{model.name}"
        with tempfile.TemporaryDirectory() as folder:
            alters = known.zeros or known.values
            taken = changed(model, folder, known.zeros, known.values) if alters else model
            print(row(taken, label), flush=True)


if __name__ == "__main__":
    main()
