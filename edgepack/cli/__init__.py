"""The command line: one command is one library call; only this package prints."""

from edgepack.cli import building, measuring, reporting, tuning, packing, listing  # noqa: F401, I001  # as --help lists them
from edgepack.cli.common import app
from edgepack.cli.program import main, run

__all__ = ["app", "main", "run"]
