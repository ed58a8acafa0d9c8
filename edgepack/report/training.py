"""Training in a report: how the loss went, and what a stage of the build has to say."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Curve:
    """The loss of a training on its way, thinned out."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    """Each the mean of the steps since the one before."""
    judged_steps: tuple[int, ...]
    """After these the samples judged that nothing was trained on."""
    judged_losses: tuple[float, ...]
    kept_step: int
    """The step whose weights were kept."""


class Notes(list[str]):
    """What a stage has to say: sentences, and a curve where it trained."""

    def __init__(self, sentences: Iterable[str] = (), curve: Curve | None = None) -> None:
        super().__init__(sentences)
        self.curve = curve
