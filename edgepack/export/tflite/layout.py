"""Orders of axes: the layout of a tensor of the file relative to the tensor of the ONNX graph.

An order lists ONNX axes as they are stored: ``(0, 2, 3, 1)`` is an NCHW tensor stored as NHWC. Two orders
store the same data where axes of a size above 1 come in the same sequence; then at most a RESHAPE converts
one to the other. Transpose, Reshape, Squeeze, Unsqueeze and Flatten of ONNX mostly only change the order; no
operator is written for them until a consumer needs the axes in another sequence.
"""

from collections.abc import Iterable, Sequence

Order = tuple[int, ...]
Shape = tuple[int, ...]


def native(rank: int) -> Order:
    """The order of the ONNX graph."""
    return tuple(range(rank))


def channels_last(rank: int) -> Order:
    """The order with axis 1 last: NHWC for four axes."""
    return native(rank) if rank < 3 else (0, *range(2, rank), 1)


def arranged(shape: Shape, order: Order) -> Shape:
    """The stored shape of a tensor with ONNX shape ``shape``."""
    return tuple(shape[axis] for axis in order)


def sequence(shape: Shape, order: Order) -> Order:
    """The axes of a size above 1 in stored order, which determine the bytes."""
    return tuple(axis for axis in order if shape[axis] != 1)


def same_data(shape: Shape, left: Order, right: Order) -> bool:
    """Whether both orders store the same bytes."""
    return sequence(shape, left) == sequence(shape, right)


def padded(order: Order, rank: int) -> Order:
    """The order of a tensor with leading axes of size 1, as broadcasting adds them."""
    extra = rank - len(order)
    return (*range(extra), *(axis + extra for axis in order))


def axis_last(order: Order, axis: int) -> Order:
    """``order`` with one axis moved to the end."""
    return (*(a for a in order if a != axis), axis)


def permutation(have: Order, want: Order) -> tuple[int, ...]:
    """The permutation of a TRANSPOSE from ``have`` to ``want``."""
    return tuple(have.index(axis) for axis in want)


def merged_permutation(shape: Shape, have: Order, want: Order) -> tuple[Shape, tuple[int, ...]]:
    """:func:`permutation` with adjacent axes that stay adjacent merged: stored shape and permutation.

    The kernel is faster with fewer axes, and runtimes transpose at most six.
    """
    old, new = sequence(shape, have), sequence(shape, want)
    runs: list[list[int]] = []
    for axis in new:
        place = old.index(axis)
        if runs and place > 0 and old[place - 1] == runs[-1][-1]:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    stored = sorted(runs, key=lambda run: old.index(run[0]))
    sizes = tuple(_product(shape[a] for a in run) for run in stored)
    return sizes, tuple(stored.index(run) for run in runs)


def reshaped_order(before: Shape, order: Order, after: Shape) -> Order | None:
    """The order of the tensor reshaped from ``before`` to ``after``, for data stored in ``order``.

    ``None`` where there is none: where axes that are not adjacent in the file are merged.

    >>> reshaped_order((1, 8, 4, 4), (0, 2, 3, 1), (1, 2, 4, 4, 4))  # groups of channels
    (0, 3, 4, 1, 2)
    """
    groups = _groups(before, after)
    if groups is None:
        return None
    stored = list(sequence(before, order))
    result: list[int] = []
    while stored:
        old, new = next(g for g in groups if stored[0] in g[0])
        if stored[: len(old)] != old:
            return None
        del stored[: len(old)]
        result += new
    return with_groups(after, result)


def joined_order(before: Shape, order: Order, after: Shape) -> Order:
    """The order nearest to ``order`` from which a reshape to ``after`` moves no data: merged axes adjacent
    and in sequence.

    >>> joined_order((1, 2, 4, 8, 8), (0, 3, 4, 2, 1), (1, 8, 8, 8))  # shuffled channels
    (0, 3, 4, 1, 2)
    """
    groups = _groups(before, after)
    if groups is None:
        return native(len(before))
    result: list[int] = []
    for axis in sequence(before, order):
        if axis not in result:
            result += next(old for old, _ in groups if axis in old)
    return with_groups(before, result)


def with_groups(shape: Shape, axes: Sequence[int]) -> Order:
    """An order with ``axes`` in sequence, and each axis of size 1 after its predecessor."""
    result = list(axes)
    for axis, size in enumerate(shape):
        if size == 1 and axis not in result:
            result.insert(result.index(axis - 1) + 1 if axis else 0, axis)
    return tuple(result)


def _groups(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]] | None:
    """Smallest groups of adjacent axes, before and after, of equal size; ``None`` where a size is 0."""
    if 0 in before or 0 in after:
        return None
    left = [a for a, size in enumerate(before) if size != 1]
    right = [a for a, size in enumerate(after) if size != 1]
    groups = []
    while left:
        old, new = [left.pop(0)], [right.pop(0)]
        while (a := _product(before[i] for i in old)) != (b := _product(after[i] for i in new)):
            if a < b:
                old.append(left.pop(0))
            else:
                new.append(right.pop(0))
        groups.append((old, new))
    return groups


def _product(sizes: Iterable[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
