"""report: what a build says, once more."""

from pathlib import Path
from typing import Annotated

import typer

from edgepack.cli.common import Json, app

Package = Annotated[Path, typer.Argument(help="The folder of a finished build.", metavar="DIR")]


@app.command()
def report(folder: Package, as_json: Json = False) -> None:
    """Show a build's report, and write its report.html again.

    From report.json and ranges.json alone: nothing is built or measured.
    """
    from edgepack.page.reading import read_report
    from edgepack.page.render import write_page
    from edgepack.report import text

    found = read_report(folder)
    page = write_page(folder)
    print(found.to_json() if as_json else f"{text(found)}\n{page} written", end="" if as_json else "\n")
