"""The time and the notes of each stage of a build."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edgepack.results import Notes, StageReport

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the steps done and the number of steps (0 when unknown)."""


class Clock:
    """Collects one StageReport per stage."""

    def __init__(self, progress: Progress) -> None:
        self.stages: list[StageReport] = []
        self.progress = progress

    @property
    def notes(self) -> dict[str, tuple[str, ...]]:
        """The notes of each stage."""
        return {stage.name: stage.notes for stage in self.stages}

    @contextmanager
    def stage(self, name: str) -> Iterator[Notes]:
        """Time the context; gives a list for the stage's notes."""
        self.progress(name, 0, 0)
        notes = Notes()
        started = time.perf_counter()
        yield notes
        self.stages.append(
            StageReport(name, round(time.perf_counter() - started, 3), tuple(notes), notes.curve)
        )
