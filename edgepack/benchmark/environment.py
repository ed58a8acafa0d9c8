"""Where a measurement was made, so that nobody compares what cannot be compared."""

import os
import platform
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgepack import __version__
from edgepack.runtime.litert import litert_version

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "asimd", "asimddp", "i8mm", "sve")


def environment() -> dict[str, Any]:
    """CPU, cores, instruction sets that matter for int8, versions, load and time; no names, no paths."""
    cpu, flags = _cpu()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "flags": [f for f in _FLAGS if f in flags],
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "onnxruntime": version("onnxruntime"),
        "litert": litert_version(),
        "numpy": version("numpy"),
        "edgepack": __version__,
        "load_average": round(os.getloadavg()[0], 2),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine() -> dict[str, str]:
    """What measurements of one machine have in common: the CPU and the versions that run on it."""
    return {"cpu": _cpu()[0], "onnxruntime": version("onnxruntime"), "edgepack": __version__}


def has_vnni() -> bool:
    """Whether this CPU adds u8 × s8 products without saturating at 16 bits."""
    return bool({"avx512_vnni", "avx_vnni"} & _cpu()[1])


@lru_cache
def _cpu() -> tuple[str, frozenset[str]]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine(), frozenset()
    fields: dict[str, str] = {}
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = frozenset((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name") or platform.machine(), flags
