"""The report's notes on the ``.tflite``, on kernels that only the host has, and on a busy machine."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

MOST_REASONS = 8
BUSY = 3.0
"""p90 over p50 from which the machine counts as busy; 1.1 on a quiet machine."""
NHWC = [0, 2, 3, 1]
PORTS = (("input", "inputs"), ("output", "outputs"))


def tflite_lines(details: Mapping[str, Any]) -> list[str]:
    """Which operators of the ``.tflite`` XNNPACK runs, its inputs and outputs, and its float islands."""
    if not details:
        return []
    delegate = details["xnnpack"]
    total, count, partitions = delegate["operators"], delegate["delegated"], delegate["partitions"]
    left = [f"{n} {op}" for op, n in delegate["left"].items()]
    share = "all" if count == total else f"{count} of"
    lines = [
        f"model.tflite: XNNPACK runs {share} {total} operators in {partitions} "
        f"partition{'' if partitions == 1 else 's'}"
        + (f"; not delegated: {first_of(left, 6, 'more')}" if left else ""),
        *(f"  {kind} {_port(port)}" for kind, key in PORTS for port in details[key]),
    ]
    reasons = Counter(reason for _, reason in details["float_islands"])
    lines += [
        f"  float, {n} node{'' if n == 1 else 's'}: {reason}"
        for reason, n in reasons.most_common(MOST_REASONS)
    ]
    return lines


def _port(port: Mapping[str, Any]) -> str:
    """An input or output: ``image: float32 [1, 224, 224, 3], NHWC``."""
    axes = port["axes"]
    order = "" if axes == sorted(axes) else ", NHWC" if axes == NHWC else f", axes in the order {axes}"
    stored = f", (q - {port['zero_point']}) × {port['scale']:.6g}" if "scale" in port else ""
    return f"{port['name']}: {port['type']} {port['shape']}{order}{stored}"


def first_of(parts: Sequence[str], most: int, rest: str) -> str:
    """The first ``most`` parts, and the number of others."""
    more = [f"{len(parts) - most} {rest}"] if len(parts) > most else []
    return ", ".join([*parts[:most], *more])


def host_only(runtime: Mapping[str, Any]) -> str:
    """A note where the float model ran on kernels of this host that the device lacks; else empty."""
    without = runtime.get("weighed_without") or ()
    if not without:
        return ""
    return (
        f"the float model ran here on kernels that the device lacks ({', '.join(without)}): int8 gains more "
        "on the device; candidates were compared without these kernels"
    )


def busy(latencies_ms: Sequence[tuple[float, float]]) -> str:
    """A note where other programs ran while these p50 and p90 were measured; else empty."""
    most = max((p90 / p50 for p50, p90 in latencies_ms if p50 > 0), default=1.0)
    if most < BUSY:
        return ""
    return (
        f"the machine was busy (p90 is up to {most:.0f} times p50): latencies include waits for other "
        "programs; speed-ups come from interleaved runs and are more reliable"
    )
