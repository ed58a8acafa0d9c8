"""The time that each stage of a build takes, and what it has to say."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edgepack.results import Notes, StageReport

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the steps done and the steps in all (0 when unknown)."""


class Clock:
    """Collects one StageReport per stage."""

    def __init__(self, progress: Progress) -> None:
        self.stages: list[StageReport] = []
        self.progress = progress

    @property
    def notes(self) -> dict[str, tuple[str, ...]]:
        """What each stage had to say."""
        return {stage.name: stage.notes for stage in self.stages}

    @contextmanager
    def stage(self, name: str) -> Iterator[Notes]:
        """Time what is inside; gives a list for what the stage has to say."""
        self.progress(name, 0, 0)
        notes = Notes()
        started = time.perf_counter()
        yield notes
        self.stages.append(
            StageReport(name, round(time.perf_counter() - started, 3), tuple(notes), notes.curve)
        )
