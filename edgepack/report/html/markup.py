"""HTML from Python values; strings are escaped unless they are markup already."""

from collections.abc import Iterable
from html import escape

VOID = frozenset({"br", "circle", "col", "input", "line", "link", "meta", "path", "rect"})
"""Elements without content."""
SHAPES = frozenset({"circle", "line", "path", "rect"})
"""Void elements of SVG, which end with a slash."""

Value = str | float | bool | None


class Html(str):
    """Markup, which is not escaped."""

    __slots__ = ()


def tag(name: str, /, *children: "str | Iterable[str] | None", **attributes: Value) -> Html:
    """``<name …>children</name>``.

    Strings are escaped, :class:`Html` is not, lists are flattened and ``None`` is left out. In names of
    attributes, underscores become hyphens and a trailing one is removed (``class_``). An attribute of
    ``None`` or ``False`` is left out; one of ``True`` has no value.
    """
    shown = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID:
        return Html(f"<{name}{shown}/>" if name in SHAPES else f"<{name}{shown}>")
    return Html(f"<{name}{shown}>{join(*children)}</{name}>")


def join(*children: "str | Iterable[str] | None") -> Html:
    """Children concatenated."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(escape(child, quote=False))
        elif child is not None:
            parts.append(join(*child))
    return Html("".join(parts))


def _attribute(key: str, value: Value) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    written = f"{value:.6g}" if isinstance(value, float) else str(value)
    return f' {name}="{escape(written)}"'


def table(
    head: Iterable[str],
    rows: Iterable[Iterable[str]],
    *,
    label: str,
    numbers: Iterable[int] = (),
    kind: str = "",
) -> Html:
    """A table in a box that scrolls on narrow screens; the columns ``numbers`` are aligned right."""
    right = set(numbers)

    def cells(row: Iterable[str]) -> list[Html]:
        return [
            tag("th", cell, scope="row") if i == 0 else tag("td", cell, class_="num" if i in right else None)
            for i, cell in enumerate(row)
        ]

    titles = [
        tag("th", cell, scope="col", class_="num" if i in right else None) for i, cell in enumerate(head)
    ]
    whole = tag(
        "table",
        tag("caption", label, class_="hidden"),
        tag("thead", tag("tr", titles)),
        tag("tbody", [tag("tr", cells(row)) for row in rows]),
        class_=kind or None,
    )
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=label)
