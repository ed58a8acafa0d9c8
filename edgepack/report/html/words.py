"""Figures as text for the HTML report, and its sections."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgepack.report.html.markup import Html, tag
from edgepack.report.tables import size_text, time_text
from edgepack.results import Fidelity, ModelFigures, Parity

NONE = "–"
"""Text of a figure that was not measured."""


def smaller(before: float, after: float) -> str:
    """The ratio of two sizes: ``4.00× smaller``."""
    ratio = before / after
    return f"{ratio:.2f}× smaller" if ratio >= 1 else f"{1 / ratio:.2f}× larger"


def faster(speedup: float) -> str:
    """A speed-up: ``2.00× as fast``."""
    return f"{speedup:.2f}× as fast"


def change(before: float, after: float) -> str:
    """A relative change in percent, signed."""
    return f"{100 * (after - before) / before:+.1f} %".replace("-", "−") if before else ""


def signed(value: float) -> str:
    """A difference of metrics, signed."""
    return f"{value:+.4f}".replace("-", "−")


def level(sqnr_db: float | None) -> str:
    """Fidelity in dB; ``None`` means equal outputs."""
    return "equal" if sqnr_db is None else f"{sqnr_db:.1f} dB"


def closeness(found: Fidelity | Parity) -> str:
    """Fidelity and agreement in one cell."""
    return level(found.sqnr_db) + ("" if found.agreement is None else f" · {found.agreement:.4f}")


def size(value: int | None) -> str:
    """Bytes, or a dash."""
    return NONE if value is None else size_text(value)


def duration(ms: float | None) -> str:
    """Milliseconds, or a dash."""
    return NONE if ms is None else time_text(ms)


def microseconds(us: float | None) -> str:
    """Microseconds of one group, or a dash."""
    return NONE if us is None else f"{us:,.1f}"


def metric_name(models: Sequence[ModelFigures]) -> str | None:
    """The metric's name without its module."""
    name = next((m.fidelity.metric_name for m in models if m.fidelity and m.fidelity.metric_name), None)
    return name and name.rpartition(":")[2].replace("_", " ")


def metric_of(model: ModelFigures) -> float | None:
    """The metric's value of one model."""
    return model.fidelity.metric if model.fidelity else None


@dataclass(frozen=True, slots=True)
class Section:
    """One section of the HTML report."""

    anchor: str
    title: str
    markup: Html


def section(anchor: str, title: str, *body: "str | Iterable[str] | None", lead: str = "") -> Section:
    """A section with the introduction ``lead``."""
    markup = tag(
        "section",
        tag("h2", title, id=f"{anchor}-title"),
        tag("p", lead, class_="lead") if lead else None,
        *body,
        id=anchor,
        aria_labelledby=f"{anchor}-title",
    )
    return Section(anchor, title, markup)
