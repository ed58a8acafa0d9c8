"""The commands report and compare, on the reports of finished builds."""

from pathlib import Path
from typing import Annotated

import typer

from edgepack.cli.common import Json, app

Package = Annotated[Path, typer.Argument(help="The folder of a package.", metavar="DIR")]


@app.command()
def report(folder: Package, as_json: Json = False) -> None:
    """Show the report of a build, and write its report.html again.

    Reads report.json and ranges.json only; nothing is built or measured.
    """
    from edgepack.report.html.reading import read_report
    from edgepack.report.html.render import write_html
    from edgepack.report.text import text

    found = read_report(folder)
    page = write_html(folder)
    print(found.to_json() if as_json else f"{text(found)}\n{page} written", end="" if as_json else "\n")


@app.command()
def compare(
    first: Package,
    second: Package,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write the comparison as HTML.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare two builds by their reports.

    Sizes, latencies, fidelity and metric of each file, and the fusion groups whose precision differs.
    """
    import json
    from dataclasses import asdict

    from edgepack.report.comparison import compare_builds, named, pair_text
    from edgepack.report.html.pair import comparison_html
    from edgepack.report.html.reading import read_report
    from edgepack.report.html.render import replace_file

    names = named([str(first), str(second)])
    pair = compare_builds(names, read_report(first), read_report(second))
    if html is not None:
        replace_file(html, comparison_html(pair))
    print(json.dumps(asdict(pair), indent=1, allow_nan=False) if as_json else pair_text(pair).rstrip())
