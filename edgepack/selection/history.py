"""Measurements of earlier runs, so that a search resumes where an earlier one was stopped.

A file of JSON lines, one measurement each, written at once: a killed search loses only the current one. The
key of a measurement is a digest of the bytes that were run, never the name of a candidate. The file name
depends on the original, the samples, the runtime and the machine, since times do not hold elsewhere.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

Figures = Mapping[str, float | None]


@dataclass(slots=True)
class Measurements:
    """Figures by key. Without a ``path`` they are kept in memory only."""

    path: Path | None = None
    reused: int = 0
    _known: dict[str, Figures] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is None or not self.path.is_file():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # cut off when the process was killed
                continue
            self._known[entry["key"]] = entry["figures"]

    def get(self, *key: str) -> Figures | None:
        """The figures of ``key``, or ``None``."""
        found = self._known.get("/".join(key))
        self.reused += found is not None
        return found

    def put(self, figures: Figures, *key: str) -> None:
        """Store ``figures`` under ``key``."""
        name = "/".join(key)
        self._known[name] = dict(figures)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The leading newline ends a line that a kill cut off; blank lines do no harm.
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"key": name, "figures": self._known[name]}) + "\n")


def cache_folder() -> Path:
    """``$EDGEPACK_CACHE``, else ``edgepack`` in the user's cache folder."""
    chosen = os.environ.get("EDGEPACK_CACHE")
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(chosen) if chosen else (Path(home) if home else Path.home() / ".cache") / "edgepack"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
