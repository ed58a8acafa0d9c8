"""Repair of a full-int8 ``.tflite`` that is not accurate: its noisiest groups compute in float.

The noise of each group is measured alone, with its int8 kernel in a file that is float otherwise. As few of
the noisiest groups as make the file accurate stay in float.
"""

import time
from collections.abc import Callable, Sequence

from edgepack.quantization.plan.types import Precision, Precisions, Request
from edgepack.selection.search import too_noisy

SHARE_FOR_NOISE = 0.7
"""Share of the time for measuring groups alone."""
REASON = too_noisy(Precision.STATIC)


def repair(
    groups: Sequence[str],
    write: Callable[[Precisions], None],
    noise: Callable[[], float],
    accurate: Callable[[], bool],
    seconds: float,
) -> int | None:
    """Leave the file with the fewest noisy ``groups`` in float that make it accurate.

    ``write`` writes the file, with some groups in other precisions; ``noise`` and ``accurate`` measure the
    last version. Gives how many groups are in float. Gives ``None`` where the file is not accurate even with
    all measured groups in float, or where time ran out; then all measured groups are in float.
    """
    started = time.monotonic()

    def left(share: float = 1.0) -> bool:
        return time.monotonic() - started < seconds * share

    def in_float(names: Sequence[str]) -> Precisions:
        return dict.fromkeys(names, Request(Precision.FLOAT, REASON))

    alone = {}
    for name in groups:
        if not left(SHARE_FOR_NOISE):
            break
        write(in_float([other for other in groups if other != name]))
        alone[name] = noise()
    noisy = sorted(alone, key=lambda name: alone[name], reverse=True)
    too_few, enough, count = 0, len(noisy) + 1, 1
    written = 0
    while too_few + 1 < enough and noisy and left():
        write(in_float(noisy[:count]))
        written = count
        if accurate():
            enough = count
        else:
            too_few = count
        # Doubled until accurate, then a binary search between the bounds.
        count = min(count * 2, len(noisy)) if enough > len(noisy) else (too_few + enough) // 2
        if count in (too_few, enough):
            break
    best = min(enough, len(noisy))
    if written != best:
        write(in_float(noisy[:best]))
    return enough if enough <= len(noisy) else None
