"""Labels of evaluation samples: from an array, from file names, or from a table."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepack.errors import ConfigError, SamplesError

Cell = int | float | str
Label = Cell | tuple[tuple[Cell, ...], ...]
"""A class number, a value, a text, or rows of cells (such as one row for each box of a detector)."""


def as_label(value: Any, where: str) -> Label:
    """``value`` as a label: one number or text, or rows (a rank 1 array or flat list is a single row).

    Raises:
        SamplesError: it is something else, or not finite.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.item() if value.size == 1 else value.tolist()
    if isinstance(value, list | tuple):
        rows = value if all(isinstance(row, list | tuple) for row in value) else [value]
        return tuple(tuple(_cell(cell, where) for cell in row) for row in rows)
    return _cell(value, where)


def _cell(value: Any, where: str) -> Cell:
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, int | float | str):
        raise SamplesError(
            f"{where}: a label is a {type(value).__name__}; give a number, a text or rows of them"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise SamplesError(f"{where}: the label is {value}; leave the sample out")
    return value


def from_filename(pattern: str, files: Sequence[Path]) -> tuple[Label, ...]:
    """The match of the one group of ``pattern`` in each file's name; integers if all of them are.

    Raises:
        ConfigError: not a regular expression with one group.
        SamplesError: it does not match a file's name.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"labels.filename: {pattern!r} is not a regular expression: {error}") from error
    if expression.groups != 1:
        raise ConfigError(
            f"labels.filename: {pattern!r} has {expression.groups} groups; put exactly one pair of "
            r"parentheses around the label, as in (\d+)"
        )
    texts: list[str] = []
    for index, file in enumerate(files):
        found = expression.search(file.name)
        if found is None or found.group(1) is None:
            raise SamplesError(
                f"{file}: sample {index}: labels.filename {pattern!r} finds no label in {file.name!r}; "
                "change the expression or the name"
            )
        texts.append(found.group(1))
    if all(re.fullmatch(r"[+-]?[0-9]+", text) for text in texts):
        return tuple(int(text) for text in texts)
    return tuple(texts)


def from_table(table: Path, files: Sequence[Path]) -> tuple[Label, ...]:
    """The labels in a .tsv: each line a file name or stem, then columns, separated by tabs.

    Texts are kept unchanged, spaces included. If every line has one column and no key occurs twice, labels
    are texts; otherwise all labels are rows, so that a metric gets one type. A line with a key and no tab
    says that the file has no rows.

    Raises:
        SamplesError: the table cannot be read, or has no line for a file.
    """
    rows: dict[str, list[tuple[str, ...]]] = {}
    try:
        lines = table.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SamplesError(f"{table}: labels.file cannot be read: {error}") from error
    for line in lines:
        if line:
            key, *columns = line.split("\t")
            rows.setdefault(key, []).extend([tuple(columns)] if columns else [])
    plain = all(len(group) == 1 and len(group[0]) == 1 for group in rows.values())
    labels: list[Label] = []
    for index, file in enumerate(files):
        group = rows.get(file.name, rows.get(file.stem))
        if group is None:
            raise SamplesError(
                f"{table}: no line for sample {index} ({file}); begin a line with {file.name!r} or "
                f"{file.stem!r}, a tab and the label (or without the tab, if the sample has no rows)"
            )
        labels.append(group[0][0] if plain else tuple(group))
    return tuple(labels)
