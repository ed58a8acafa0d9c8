"""What a runtime's C++ code writes to standard error, without its notes that all is well."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

STDERR = 2
NOTE = b"INFO: "
"""How LiteRT marks a note, that it has made a delegate, say; from Python it cannot be told to write less."""


@contextmanager
def without_notes() -> Iterator[None]:
    """Within, lines that begin with ``INFO:`` do not reach standard error; all others do, at the end."""
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
