"""How this host multiplies integers, and how a model is opened whose device does it otherwise.

x86 without VNNI adds pairs of u8 × s8 products in 16 bits that saturate: docs/decisions/host_arithmetic.md.
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
    """The same settings, but integer products are exact on every host; slower, so never to be timed."""


def overflows() -> bool:
    """Whether this host's sums of u8 × s8 products saturate; false where its instruction sets are unknown."""
    _, flags = cpu()
    return platform.machine() in X86 and bool(flags) and not flags & VNNI


def for_accuracy(target: Target) -> Runtime:
    """How to open a model whose outputs are to be those of the target's device.

    The target's own settings, unless this host's products saturate and the device's do not.
    """
    if target.quantization.saturates or not overflows():
        return target.runtime
    return ExactRuntime(**target.runtime.model_dump())


def accuracy_notes(target: Target) -> tuple[str, ...]:
    """What to tell of accuracy that was measured with other kernels than times."""
    return (NOTE,) if isinstance(for_accuracy(target), ExactRuntime) else ()


@lru_cache
def cpu() -> tuple[str, frozenset[str]]:
    """Name and instruction sets of the processor; no instruction sets where the system does not list them."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine(), frozenset()
    fields: dict[str, str] = {}
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = frozenset((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name") or platform.machine(), flags
