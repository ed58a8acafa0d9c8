"""The HTML report: one file that loads and sends nothing."""

import os
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from edgepack.calibration.ranges import RangeTable
from edgepack.errors import ExportError
from edgepack.report.html.devices import devices
from edgepack.report.html.layers import error_and_time, precisions, ranges
from edgepack.report.html.markup import Html, tag
from edgepack.report.html.reading import read_ranges, read_report
from edgepack.report.html.sections import candidates, formats, origin, parity, steps, verdict
from edgepack.report.html.training import training
from edgepack.report.html.words import Section
from edgepack.results import BuildReport

PAGE = "report.html"


def report_html(report: BuildReport, table: RangeTable | None) -> str:
    """``report`` as HTML; ``table`` has the histograms."""
    parts = [
        steps(report),
        training(report),
        error_and_time(report),
        precisions(report),
        ranges(table),
        parity(report),
        formats(report),
        devices(report),
        candidates(report),
        origin(report),
    ]
    title = f"{report.model} for {report.target}: edgepack {report.edgepack_version}"
    return page(title, verdict(report), parts)


def write_html(folder: Path) -> Path:
    """Write ``report.html`` of a package's ``folder`` from its ``report.json`` and ``ranges.json``.

    Raises:
        ConfigError, CalibrationError: one of them is missing or broken.
    """
    content = report_html(read_report(folder), read_ranges(folder))
    path = folder / PAGE
    replace_file(path, content)
    return path


def replace_file(path: Path, content: str) -> None:
    """Write ``path`` atomically.

    Raises:
        ExportError: the folder cannot be written.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(content, encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise ExportError(f"{path}: cannot be written ({error.strerror})") from error


def page(title: str, header: Html, sections: Iterable[Section | None]) -> str:
    """An HTML document with inline style and script."""
    shown = [part for part in sections if part is not None]
    links = [tag("li", tag("a", part.title, href=f"#{part.anchor}")) for part in shown]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", _asset("style.css")),
    )
    body = tag(
        "body",
        header,
        tag("nav", tag("ul", links), aria_label="Sections of the report"),
        tag("main", (part.markup for part in shown)),
        tag("footer", tag("p", title)),
        tag("div", id="tip", hidden=True),
        tag("script", _asset("page.js")),
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _asset(name: str) -> Html:
    return Html(files("edgepack.report.html").joinpath(name).read_text(encoding="utf-8"))
