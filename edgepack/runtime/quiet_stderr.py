"""Filters informational lines that a runtime's C++ code writes to standard error."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

STDERR = 2
NOTE = b"INFO: "
"""Prefix of LiteRT's informational lines, e.g. on delegates; it has no log level in Python."""


@contextmanager
def without_notes() -> Iterator[None]:
    """Within the context, lines with ``INFO:`` are dropped from standard error; others follow at its end."""
    kept = os.dup(STDERR)
    try:
        with tempfile.TemporaryFile() as written:
            os.dup2(written.fileno(), STDERR)
            try:
                yield
            finally:
                os.dup2(kept, STDERR)
                written.seek(0)
                for line in written:
                    if not line.startswith(NOTE):
                        os.write(STDERR, line)
    finally:
        os.close(kept)
