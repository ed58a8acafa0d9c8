"""Passes of a recipe: changes to the weights before quantization, applied in the order given."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from edgepack.config.strict_yaml import Strict
from edgepack.config.training import Tune


class Prune(Strict):
    """Unstructured or N:M pruning: the least important weights become zero."""

    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of zeros among the weights that are pruned; an N:M pattern determines its own."""
    max_bytes: Annotated[int, Field(gt=0)] | None = None
    """Instead of `sparsity`: the least sparsity for which the packed int8 file (`.epk`) has at most this many
    bytes."""
    within_gate: bool = False
    """Instead of `sparsity`: the most zeros that keep half of each accuracy limit of the gate on the
    evaluation data, so that half is left for later stages; with `max_bytes`, no more than that needs."""
    method: Literal["l1", "l2", "wanda", "second_order"] = "second_order"
    """The importance of a weight: its magnitude (l1), its square (l2), its square times the squared input
    (wanda, Sun et al., 2023), or the increase of the layer's error when the other weights compensate
    (second_order: OBS; Hassibi and Stork, 1993; SparseGPT, 2023). Only second_order changes the other
    weights."""
    pattern: Literal["unstructured", "2:4", "4:8"] = "unstructured"
    scope: Literal["measured", "global", "layer"] = "global"
    """global: one threshold on the importance relative to the layer's sum; measured: sparsity by layer, from
    the error that it causes in the model's outputs on samples that the zeros were not chosen on (takes
    several times as long); layer: the same sparsity in all layers."""
    views: Annotated[int, Field(ge=0)] = 0
    """Augmented copies of each image that are used too: crops, mirrored or not."""
    keep: tuple[str, ...] = ()
    """Names of nodes that are not pruned; `*` and `?` work as in a shell."""
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
    """Weight clustering: the weights of a layer take few distinct values; zeros stay zeros."""

    bits: Annotated[int, Field(ge=1, le=7)] = 4
    """At most two to the power of this many distinct values."""
    outputs: Annotated[int, Field(gt=0)] | None = None
    """Output channels that share one codebook; by default all of a layer."""
    keep: tuple[str, ...] = ()
    """Names of nodes that are not clustered; `*` and `?` work as in a shell."""
    keep_types: tuple[str, ...] = ()
    """The same by operator type."""


class Structured(Strict):
    """Structured pruning: whole channels, neurons and attention heads are removed from the model."""

    macs: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """Share of the model's multiplications to keep."""
    method: Literal["l1", "l2", "activation", "second_order"] = "second_order"
    """The importance of a channel: the weights that produce it (l1, l2), its activations, or the increase of
    its consumers' error when their other inputs compensate (second_order)."""
    reconstruct: bool = True
    """Fit the remaining weights to the outputs of the whole model."""
    multiple: Annotated[int, Field(ge=1)] | None = None
    """Keep a multiple of this many channels; by default what is fast with the target's kernels."""
    at_most: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Largest share of the channels of one layer that may be removed."""
    keep: tuple[str, ...] = ()
    """Names of nodes whose output channels are all kept; `*` and `?` work as in a shell."""
    keep_types: tuple[str, ...] = ()
    """The same by operator type."""


class Compact(Strict):
    """Remove channels that are zero in the weights of all consumers; the outputs do not change."""

    multiple: Annotated[int, Field(ge=1)] | None = None
    """Keep a multiple of this many channels; by default what is fast with the target's kernels."""


class Share(Strict):
    """Equal, or nearly equal, constants become one."""

    within: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest difference, relative to the constant's norm; by default only equal constants are shared."""


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
        """The settings under the key."""
        found = getattr(self, self.name)
        assert isinstance(found, Strict)
        return found


APART = "each weight would be changed for its own inputs, and equal weights would not stay equal"
REPEATED = frozenset({"tune"})
"""Passes that may occur more than once: training recovers from each of the other passes."""
AFTER: dict[tuple[str, str], str] = {
    ("share", "prune"): APART,
    ("share", "cluster"): APART,
    ("share", "structured"): APART,
    ("share", "compact"): APART,
    ("cluster", "prune"): "weights that compensate for the new zeros would leave the codebook",
    ("prune", "structured"): "refitted weights are not zero any more",
    ("cluster", "compact"): "the codebook scales are those of the channels before",
    ("cluster", "structured"): "refitted weights leave the codebook",
}
"""Why the second pass must not come after the first."""


def step_names(passes: tuple[Pass, ...]) -> list[str]:
    """Names of the passes; a repeated name gets a number: ``prune, tune, cluster, tune 2``."""
    names = [entry.name for entry in passes]
    counts = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return [name if count == 1 else f"{name} {count}" for name, count in zip(names, counts, strict=True)]


def check_order(passes: tuple[Pass, ...]) -> None:
    """Refuse an order in which a pass would undo an earlier one.

    Raises:
        ValueError: the message names the two passes and the reason.
    """
    names = [entry.name for entry in passes]
    for place, later in enumerate(names):
        for earlier in names[:place]:
            if earlier == later and later not in REPEATED:
                raise ValueError(f"{later} is listed twice; use one entry")
            if reason := AFTER.get((earlier, later)):
                raise ValueError(f"{later} after {earlier}: {reason}; put {later} first")
