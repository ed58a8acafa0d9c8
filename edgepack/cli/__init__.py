"""The command line: parses options, calls one function of the pipeline, prints its result.

In: arguments. Out: text or JSON on standard output, and the exit code. Only this package prints; it has no
logic of its own. Heavy libraries are imported inside the commands.
"""

from edgepack.cli import building, measuring, reporting, tuning, packing, listing  # noqa: F401, I001  # as --help lists them
from edgepack.cli.common import app
from edgepack.cli.program import main, run

__all__ = ["app", "main", "run"]
