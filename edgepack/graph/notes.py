"""What normalization changed, and which patterns it did not rewrite."""

from collections import Counter
from dataclasses import dataclass, field

from edgepack.graph.half_precision import HalfPrecisionNotes


@dataclass(frozen=True, slots=True)
class Refusal:
    """A pattern that was found and not rewritten, with the reason."""

    rule: str
    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class NormalizeNotes:
    """What :func:`normalize` changed."""

    applied: dict[str, int]
    """How often each rule was applied; only rules that were."""
    refused: tuple[Refusal, ...]
    """Patterns that were not rewritten, with the reason."""
    unsupported: tuple[str, ...]
    """Operators outside of the ONNX standard; they are kept unchanged."""
    half_precision: HalfPrecisionNotes
    """What was converted from half precision."""
    opset_before: int
    opset_after: int
    nodes_before: int
    nodes_after: int


@dataclass(slots=True)
class Log:
    """What the rules did so far, during one normalization."""

    applied: Counter[str] = field(default_factory=Counter)
    refused: dict[tuple[str, str], Refusal] = field(default_factory=dict)
