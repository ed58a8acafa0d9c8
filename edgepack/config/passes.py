"""Passes of a recipe: what happens to the weights before anything is quantized, in the order given."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from edgepack.config.strict_yaml import Strict
from edgepack.config.training import Tune


class Prune(Strict):
    """Weights that cost least become zero."""

    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of zeros among the weights that are pruned; a pattern has its own."""
    max_bytes: Annotated[int, Field(gt=0)] | None = None
    """In place of `sparsity`: as few zeros as bring the packed int8 file (`.epk`) down to this many bytes."""
    within_gate: bool = False
    """In place of `sparsity`: as many zeros as the gate's limits of accuracy allow on the evaluation data,
    half of each left for what follows; with `max_bytes`, no more than those ask for."""
    method: Literal["l1", "l2", "wanda", "second_order"] = "second_order"
    """What a weight counts by: its magnitude, its square, its square times its input's, or what the model
    loses when the others make up for it (only this one changes the others)."""
    pattern: Literal["unstructured", "2:4", "4:8"] = "unstructured"
    scope: Literal["measured", "global", "layer"] = "global"
    """global: each layer gives what costs it least; measured: each gives where that does least to the outputs
    of samples that the zeros were not chosen on, which takes some times as long; layer: all give the same
    share."""
    views: Annotated[int, Field(ge=0)] = 0
    """Other views of each picture that are looked at too: parts of it, mirrored or not."""
    keep: tuple[str, ...] = ()
    """Names of nodes that are left alone; `*` and `?` work as in a shell."""
    keep_types: tuple[str, ...] = ()
    """The same by operator type."""

    @model_validator(mode="after")
    def _searched_rates_differ(self) -> "Prune":
        searched = self.max_bytes is not None or self.within_gate
        if searched and (self.scope == "layer" or self.pattern != "unstructured"):
            raise ValueError(
                "max_bytes and within_gate search for rates by layer: not with scope: layer or a pattern"
            )
        return self


class Cluster(Strict):
    """The weights of a layer take few values, zeros among them staying zeros."""

    bits: Annotated[int, Field(ge=1, le=7)] = 4
    """At most two to this many values."""
    outputs: Annotated[int, Field(gt=0)] | None = None
    """Output channels that share their values; all of a layer by default."""
    keep: tuple[str, ...] = ()
    """Names of nodes that are left alone; `*` and `?` work as in a shell."""
    keep_types: tuple[str, ...] = ()
    """The same by operator type."""


class Structured(Strict):
    """Whole channels, neurons and attention heads leave the model."""

    macs: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """Multiplications to keep, of those that the model does."""
    method: Literal["l1", "l2", "activation", "second_order"] = "second_order"
    """What a channel counts by: the weights that make it (l1, l2), what reaches its readers from it, or what
    its readers lose when their other inputs make up for it."""
    reconstruct: bool = True
    """Fit the weights that are left to the outputs of the whole model."""
    multiple: Annotated[int, Field(ge=1)] | None = None
    """Of channels to keep; by default what the target's kernels like."""
    at_most: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Share of the channels of one layer that may go."""
    keep: tuple[str, ...] = ()
    """Names of nodes that keep all the channels they make; `*` and `?` work as in a shell."""
    keep_types: tuple[str, ...] = ()
    """The same by operator type."""


class Compact(Strict):
    """Channels that all their readers have zeros for leave the model; its outputs stay what they are."""

    multiple: Annotated[int, Field(ge=1)] | None = None
    """Of channels to keep; by default what the target's kernels like."""


class Share(Strict):
    """Constants that are equal, or nearly, become one."""

    within: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest difference, as a share of the constant's norm; by default only equal ones are shared."""


class Pass(Strict):
    """One entry of `passes:`, named by its only key."""

    prune: Prune | None = None
    cluster: Cluster | None = None
    share: Share | None = None
    structured: Structured | None = None
    compact: Compact | None = None
    tune: Tune | None = None

    @model_validator(mode="before")
    @classmethod
    def _a_word_is_a_pass_with_defaults(cls, content: Any) -> Any:
        if isinstance(content, str):
            return {content: {}}
        if isinstance(content, dict):
            return {key: {} if value is None else value for key, value in content.items()}
        return content

    @model_validator(mode="after")
    def _one(self) -> "Pass":
        if len(self.model_fields_set) != 1:
            raise ValueError(
                f"an entry has one key, the name of a pass: {', '.join(type(self).model_fields)}"
            )
        return self

    @property
    def name(self) -> str:
        """The key."""
        return next(iter(self.model_fields_set))

    @property
    def settings(self) -> Strict:
        """What stands under the key."""
        found = getattr(self, self.name)
        assert isinstance(found, Strict)
        return found


APART = "each weight would be changed for its own inputs, and they would be one no more"
REPEATED = frozenset({"tune"})
"""What may stand there more than once: training makes up for what each of the others does."""
AFTER: dict[tuple[str, str], str] = {
    ("share", "prune"): APART,
    ("share", "cluster"): APART,
    ("share", "structured"): APART,
    ("share", "compact"): APART,
    ("cluster", "prune"): "what is left would make up for the new zeros with values of its own",
    ("prune", "structured"): "weights that are fitted anew are not zero any more",
    ("cluster", "compact"): "the scales of its values are those of the channels that were there",
    ("cluster", "structured"): "weights that are fitted anew take values of their own",
}
"""Why the second may not stand after the first."""


def step_names(passes: tuple[Pass, ...]) -> list[str]:
    """The passes by name, numbered from the second of a name on: ``prune, tune, cluster, tune 2``."""
    names = [entry.name for entry in passes]
    counts = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return [name if count == 1 else f"{name} {count}" for name, count in zip(names, counts, strict=True)]


def check_order(passes: tuple[Pass, ...]) -> None:
    """Refuse an order in which a pass would undo an earlier one.

    Raises:
        ValueError: with the two passes and the reason.
    """
    names = [entry.name for entry in passes]
    for place, later in enumerate(names):
        for earlier in names[:place]:
            if earlier == later and later not in REPEATED:
                raise ValueError(f"{later} stands there twice; one entry says all")
            if reason := AFTER.get((earlier, later)):
                raise ValueError(f"{later} after {earlier}: {reason}; put {later} first")
