"""What normalization did, and which patterns it left alone."""

from collections import Counter
from dataclasses import dataclass, field

from edgepack.graph.half_precision import HalfPrecisionNotes


@dataclass(frozen=True, slots=True)
class Refusal:
    """A pattern that was found and left alone."""

    rule: str
    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class NormalizeNotes:
    """What :func:`normalize` did."""

    applied: dict[str, int]
    """How often each rule rewrote something; only rules that did."""
    refused: tuple[Refusal, ...]
    """Patterns left alone, with the reason."""
    unsupported: tuple[str, ...]
    """Operators outside of the ONNX standard: kept as they are."""
    half_precision: HalfPrecisionNotes
    """What was in half precision."""
    opset_before: int
    opset_after: int
    nodes_before: int
    nodes_after: int


@dataclass(slots=True)
class Log:
    """What the rules did so far, as a normalization goes on."""

    applied: Counter[str] = field(default_factory=Counter)
    refused: dict[tuple[str, str], Refusal] = field(default_factory=dict)
