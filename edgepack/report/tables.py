"""Figures as text, and tables of text."""

from collections.abc import Callable, Collection, Sequence


def size_text(size_bytes: float) -> str:
    """Bytes as text, in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.2f} {unit}"
    return f"{size_bytes:.0f} B"


def time_text(ms: float) -> str:
    """Milliseconds as text."""
    return f"{ms:.2f} ms" if ms >= 1 else f"{ms * 1e3:.1f} µs"


def or_dash(text: Callable[[float], str], value: float | None) -> str:
    """``value`` as ``text`` writes it; a dash for ``None``."""
    return "-" if value is None else text(value)


def table(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> list[str]:
    """Indented rows with aligned columns; the columns ``right`` are aligned right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "   ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
