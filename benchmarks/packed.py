"""Sizes of models raw, zipped, by zstd, by xz and as .epk, with the time and memory that packing takes.

python benchmarks/packed.py MODEL...
"""

import lzma
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

from edgepack.pack.epk import pack, unpack


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
    """By the zstd program at level 19, if it is here."""
    if shutil.which("zstd") is None:
        return "-"
    found = subprocess.run(["zstd", "-19", "-q", "-c", str(model)], capture_output=True, check=True)
    return f"{len(found.stdout):,}"


def main(models: list[str]) -> None:
    print("| model | raw | zip -9 | zstd -19 | xz -9e | .epk | pack s | unpack s | peak MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in models:
        raw = Path(name).read_bytes()
        xz = len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
        with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
            size, packing, unpacking, peak = pool.apply(pack_once, (name, folder))
        print(
            f"| {Path(name).parent.name}/{Path(name).name} | {len(raw):,} | {len(zlib.compress(raw, 9)):,} "
            f"| {zstd_bytes(Path(name))} | {xz:,} | {size:,} | {packing:.2f} | {unpacking:.2f} | {peak} |"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
