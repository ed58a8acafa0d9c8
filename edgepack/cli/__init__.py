"""The command line: one command is one library call; only this package prints."""

from edgepack.cli import building, measuring, tuning, packing, listing  # noqa: F401, I001  # the order in --help
from edgepack.cli.common import app
from edgepack.cli.program import main, run

__all__ = ["app", "main", "run"]
