"""Whether integer kernels saturate on this host, and how to measure accuracy for a device where they do not.

x86 without VNNI adds pairs of u8 × s8 products in int16 with saturation: docs/decisions/host_arithmetic.md.
"""

import platform
from functools import lru_cache
from pathlib import Path

from edgepack.config.target import Runtime, Target

X86 = ("x86_64", "AMD64")
VNNI = frozenset({"avx512_vnni", "avx_vnni"})
NOTE = (
    "this host adds u8 × s8 products in 16 bits, which the target does not: accuracy was measured with uint8 "
    "weights of the same values, which it adds exactly, times with the files as they are"
)


class ExactRuntime(Runtime):
    """The same settings with integer kernels that never saturate; slower, so not for latency."""


def overflows() -> bool:
    """Whether this host's sums of u8 × s8 products saturate; false where its instruction sets are unknown."""
    _, flags = cpu()
    return platform.machine() in X86 and bool(flags) and not flags & VNNI


def for_accuracy(target: Target) -> Runtime:
    """Settings under which a model has the outputs that it has on the target's device.

    Those of the target, unless integer kernels saturate on this host and not on the device.
    """
    if target.quantization.saturates or not overflows():
        return target.runtime
    return ExactRuntime(**target.runtime.model_dump())


def accuracy_notes(target: Target) -> tuple[str, ...]:
    """Note for the report where accuracy was measured with other kernels than latency."""
    return (NOTE,) if isinstance(for_accuracy(target), ExactRuntime) else ()


@lru_cache
def cpu() -> tuple[str, frozenset[str]]:
    """Name and instruction sets of the processor; the latter are empty where the system lists none."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine(), frozenset()
    fields: dict[str, str] = {}
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = frozenset((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name") or platform.machine(), flags
