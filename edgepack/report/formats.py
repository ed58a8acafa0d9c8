"""What a report says of several formats: how close they are, what is missing, what a ``.tflite`` is like."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

MOST_REASONS = 8
BUSY = 3.0
"""How many times p50 is p90 where other programs take turns on the cores; 1.1 on a quiet machine."""
NHWC = [0, 2, 3, 1]
PORTS = (("takes", "inputs"), ("gives", "outputs"))


def tflite_lines(details: Mapping[str, Any]) -> list[str]:
    """How the ``.tflite`` is run and what an application must feed it."""
    if not details:
        return []
    taken = details["xnnpack"]
    total, count, pieces = taken["operators"], taken["delegated"], taken["partitions"]
    left = [f"{n} {op}" for op, n in taken["left"].items()]
    share = "all" if count == total else f"{count} of"
    lines = [
        f"model.tflite: XNNPACK takes {share} {total} operators in {pieces} piece{'' if pieces == 1 else 's'}"
        + (f", and leaves {first_of(left, 6, 'more')}" if left else ""),
        *(f"  {verb} {_port(port)}" for verb, key in PORTS for port in details[key]),
    ]
    reasons = Counter(reason for _, reason in details["float_islands"])
    lines += [
        f"  float, {n} node{'' if n == 1 else 's'}: {reason}"
        for reason, n in reasons.most_common(MOST_REASONS)
    ]
    return lines


def _port(port: Mapping[str, Any]) -> str:
    """As an application sees it: ``image float32 [1, 224, 224, 3], NHWC``."""
    axes = port["axes"]
    order = "" if axes == sorted(axes) else ", NHWC" if axes == NHWC else f", axes in the order {axes}"
    stored = f", (q - {port['zero_point']}) × {port['scale']:.6g}" if "scale" in port else ""
    return f"{port['name']}: {port['type']} {port['shape']}{order}{stored}"


def first_of(parts: Sequence[str], most: int, rest: str) -> str:
    """The first ``most`` parts, and how many are left."""
    more = [f"{len(parts) - most} {rest}"] if len(parts) > most else []
    return ", ".join([*parts[:most], *more])


def host_only(runtime: Mapping[str, Any]) -> str:
    """That float ran on kernels of this host which the device lacks; empty where it has them all."""
    without = runtime.get("weighed_without") or ()
    if not without:
        return ""
    return (
        f"the float model ran here on kernels that the device has not ({', '.join(without)}): "
        "expect int8 to gain more there; forms were weighed without them"
    )


def busy(latencies_ms: Sequence[tuple[float, float]]) -> str:
    """That the machine had other work while it timed these p50 and p90; empty where it had little."""
    most = max((p90 / p50 for p50, p90 in latencies_ms if p50 > 0), default=1.0)
    if most < BUSY:
        return ""
    return (
        f"the machine was busy (p90 is up to {most:.0f} times p50): latencies have waits for others in "
        "them; what is as fast is told from turns next to each other, and holds better"
    )
