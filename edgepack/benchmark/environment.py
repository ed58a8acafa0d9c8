"""The machine and the versions of a measurement."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from edgepack import __version__
from edgepack.runtime.host import cpu
from edgepack.runtime.litert import litert_version

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "asimd", "asimddp", "i8mm", "sve")


def environment() -> dict[str, Any]:
    """CPU, cores, instruction sets for int8, versions, load and date; no host name, no paths."""
    name, flags = cpu()
    return {
        "cpu": name,
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
    """The CPU and the versions: measurements with equal values are comparable."""
    return {"cpu": cpu()[0], "onnxruntime": version("onnxruntime"), "edgepack": __version__}
