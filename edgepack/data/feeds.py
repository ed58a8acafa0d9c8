"""Checks of one sample's arrays against the model's inputs, shared by all sources of samples."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgepack.errors import SamplesError, did_you_mean
from edgepack.ir.arrays import Array, Feeds
from edgepack.ir.inputs import InputSpec

# Exporters write this for every dimension they do not know, so equal names do not mean equal sizes.
_UNKNOWN_DIMS = (None, "", "?")


def with_sizes(inputs: Sequence[InputSpec], dims: Mapping[str, int]) -> tuple[InputSpec, ...]:
    """``inputs`` with the sizes that ``dims`` gives to dynamic dimensions, by name or by index (``x[3]``)."""
    return tuple(
        replace(
            spec,
            shape=spec.shape
            and tuple(
                size
                if isinstance(size, int)
                else dims.get(f"{spec.name}[{axis}]", dims.get(size or "", size))
                for axis, size in enumerate(spec.shape)
            ),
        )
        for spec in inputs
    )


def open_dims(inputs: Sequence[InputSpec]) -> list[str]:
    """Keys for the dimensions without a fixed size: their names, and their indices (``x[3]``)."""
    places = [
        (size, f"{spec.name}[{axis}]")
        for spec in inputs
        for axis, size in enumerate(spec.shape or ())
        if not isinstance(size, int)
    ]
    return list(dict.fromkeys([*(str(size) for size, _ in places if size), *(place for _, place in places)]))


def check_names(names: Collection[str], inputs: Sequence[InputSpec], where: str) -> None:
    """Refuse ``names`` that lack an input of the model.

    Raises:
        SamplesError: an input is missing; the message names it and the arrays found instead.
    """
    for spec in inputs:
        if spec.name not in names:
            others = sorted(set(names) - {i.name for i in inputs})
            there = f"it has {', '.join(map(repr, others))}; rename the one meant" if others else "add it"
            raise SamplesError(f"{where}: no array for the model's input {spec.name!r}: {there}")


def conform(given: Mapping[str, Array], inputs: Sequence[InputSpec], where: str) -> Feeds:
    """``given`` as feeds of the model, in the order of ``inputs``.

    An array with one axis less than its input gets a batch axis of 1. Values are cast only if the cast is
    exact (float16 to float32, int32 to int64, another byte order), and from float64 to float32, as every
    framework does.

    Raises:
        SamplesError: an input is missing or unknown, has a wrong type, rank or size, holds NaN or infinity, a
            symbolic dimension has two sizes, or all inputs are empty. Single inputs may be empty, such as the
            KV cache of a decoder at its first token. The message has ``where`` and the input's name.
    """
    check_names(given, inputs, where)
    unknown = [name for name in given if name not in {i.name for i in inputs}]
    if unknown:
        hint = did_you_mean(unknown[0], [i.name for i in inputs])
        raise SamplesError(f"{where}: the model has no input {unknown[0]!r}, {hint}")
    sizes: dict[str, tuple[int, str]] = {}
    feeds = {}
    nothing = all(np.size(given[spec.name]) == 0 for spec in inputs)
    for spec in inputs:
        place = f"{where}: input {spec.name!r}"
        array = given[spec.name]
        if not isinstance(array, np.ndarray):
            raise SamplesError(f"{place} is a {type(array).__name__}; give a numpy array")
        if spec.shape is not None and array.ndim == len(spec.shape) - 1:
            array = array[np.newaxis]
        if nothing:
            raise SamplesError(f"{place} is empty (shape {list(array.shape)}); remove the sample")
        _check_shape(array, spec, sizes, place)
        array = _cast(array, spec.dtype, place)
        _check_finite(array, place)
        feeds[spec.name] = array
    return feeds


def plain(array: Array) -> Array:
    """Text as a string array, since an object array would need pickling; other arrays unchanged."""
    return array.astype("U") if array.dtype == object else array


def _check_shape(array: Array, spec: InputSpec, sizes: dict[str, tuple[int, str]], place: str) -> None:
    """``sizes`` collects, per symbolic dimension, its size and the input that gave it."""
    if spec.shape is None:
        return
    wanted = "[" + ", ".join("?" if d is None else str(d) for d in spec.shape) + "]"
    found = f"{place} has shape {list(array.shape)}, the model wants {wanted}"
    if array.ndim != len(spec.shape):
        raise SamplesError(
            f"{found}: give {len(spec.shape)} axes, or {len(spec.shape) - 1} without the batch axis"
        )
    for axis, (size, want) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if isinstance(want, int) and size != want:
            raise SamplesError(f"{found}: axis {axis} must be {want}, it is {size}")
        if isinstance(want, str) and want not in _UNKNOWN_DIMS:
            first, owner = sizes.setdefault(want, (size, spec.name))
            if first != size:
                raise SamplesError(
                    f"{found}: axis {axis} ({want}) is {size}, but input {owner!r} of the same sample has "
                    f"{want} = {first}; pad or cut one of them"
                )


def _cast(array: Array, dtype: np.dtype[Any], place: str) -> Array:
    if array.dtype == dtype:
        return array
    if dtype == np.dtype(object) and array.dtype.kind == "U":
        return array.astype(object)  # text as string arrays, the type in files without pickled objects
    exact = array.dtype.kind == dtype.kind and np.can_cast(array.dtype, dtype, "safe")
    if exact or (array.dtype.type, dtype.type) == (np.float64, np.float32):
        with np.errstate(over="ignore"):  # overflow becomes infinity, which is reported
            return array.astype(dtype)
    raise SamplesError(
        f"{place} is {array.dtype}, the model wants {dtype}; convert it with array.astype({dtype.name!r}) "
        "if the values allow it"
    )


def _check_finite(array: Array, place: str) -> None:
    if not np.issubdtype(array.dtype, np.floating):
        return
    finite = np.isfinite(array)
    if finite.all():
        return
    first = np.argwhere(~finite)[0].tolist()
    nans = int(np.isnan(array).sum())
    infinities = int(array.size - finite.sum()) - nans
    raise SamplesError(
        f"{place} holds {nans} NaN and {infinities} infinite values (as {array.dtype}), the first at index "
        f"{first}; clean the data or leave the sample out"
    )
