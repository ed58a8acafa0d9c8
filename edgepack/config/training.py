"""Training as a recipe has it."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgepack.config.strict_yaml import Strict

Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
HALF = 0.5


class Sparsify(Strict):
    """Zeros that training makes and learns to live with."""

    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of zeros among all weights; of a pattern always half; of channels those of all that may go."""
    when: Literal["dynamic", "once"] = "dynamic"
    """dynamic: more and more, chosen anew on the way, so that weights may come back; once: at one step."""
    pattern: Literal["unstructured", "2:4", "4:8", "channels"] = "unstructured"
    """2:4, 4:8: that many of so many inputs in a row; on the way, in more and more of the groups. channels:
    whole ones, in all layers that share them; the pass `compact` then takes them out of the graph."""
    multiple: Annotated[int, Field(ge=1)] | None = None
    """Of channels that are left of each group; in a build by default what the target's kernels like."""
    regrowth: Literal["gradient", "straight_through"] = "gradient"
    """How weights that are out come back. gradient: those with the largest gradients come in for the least of
    those that are in, and begin at zero (Evci et al., 2020); straight_through: they go on learning as if they
    were in, fade, and are in again where they are large (Zhou et al., 2021)."""
    exchanged: Share = 0.3
    """Of weights that are in, the share that makes room at a choice by gradient; it falls to none."""
    start: Share = 0.05
    """Share of the training after which removal starts, or happens."""
    end: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of the training after which a dynamic choice is final."""
    every: Annotated[int, Field(ge=1)] = 20
    """Steps between two choices."""

    @model_validator(mode="after")
    def _patterns_are_half_zeros(self) -> "Sparsify":
        if ":" in self.pattern and self.sparsity != HALF:
            raise ValueError(f"pattern {self.pattern} is half zeros: leave out sparsity")
        if self.when == "dynamic" and self.start >= self.end:
            raise ValueError("start must lie before end")
        return self


class Gradients(Strict):
    """Gradients as low-bit weights, as they are stored on small devices and sent between workers."""

    bits: Literal[8, 4] = 8
    block: Annotated[int, Field(ge=8)] | None = 256
    """Values that share a scale; null: one scale for a tensor."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    error_feedback: bool = True
    """What coding loses is added to the gradient of the next step."""


class Tune(Strict):
    """The weights are trained so that the model answers as its teacher does."""

    budget_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that training may take."""
    steps: Annotated[int, Field(gt=0)] | None = None
    """Steps after which it ends at the latest. Only by steps can a run be repeated exactly."""
    batch: Annotated[int, Field(ge=1)] = 10
    """Samples in a step."""
    views: Annotated[int, Field(ge=0)] = 0
    """Other views of each picture that are trained on too, parts of it, mirrored or not, with what the
    teacher says to them (Beyer et al., 2022)."""
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """At its highest, as a share of a channel's size; it rises over the first steps and falls by a cosine."""
    temperature: Annotated[float, Field(gt=0)] = 8.0
    """What the logits of both are divided by before they are compared."""
    logits: Weight = 1.0
    """Weight of the difference of the outputs."""
    level: Weight = 1.0
    """Weight of the difference of the mean of all logits, which no softmax sees, but who reads them does."""
    features: Weight = 1.0
    """Weight of the difference of inner values."""
    feature_map: dict[str, str] = {}
    """Inner values of the model and those of the teacher that they are compared with; by default what
    residual additions give where both have them under one name."""
    labels: Weight = 0.0
    """Weight of the cross-entropy with the samples' labels."""
    keep: tuple[str, ...] = ()
    """Names of weights that are not trained; `*` and `?` work as in a shell."""
    l1: Weight = 0.0
    """Weight of the sum of magnitudes of all weights."""
    l2: Weight = 0.0
    """Weight of half the sum of squares."""
    group_lasso: Weight = 0.0
    """Weight of the sum of lengths of all output channels (Yuan and Lin, 2006): whole ones go to zero."""
    sparsify: Sparsify | None = None
    gradients: Gradients | None = None
    """Few bits for gradients; by default they stay floats."""
    held_out: Share = 0.2
    """Share of the samples that only judge; the weights that do best on them are kept, the first too."""
    stop_at: Annotated[float, Field(gt=0, le=1)] | None = None
    """Agreement with the teacher on the held-out samples at which training ends."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """By default as many as there are cores."""


class AwareTune(Tune):
    """The integers that are stored are trained so that the quantized model answers as its float form does."""

    learn_ranges: bool = False
    """Scales of activations are trained too (Esser et al., 2020)."""

    @model_validator(mode="after")
    def _no_zeros(self) -> "AwareTune":
        asked = [key for key in FOR_ZEROS if getattr(self, key)]
        if asked:
            raise ValueError(
                f"{asked[0]}: for weights before they are quantized; give it to a `tune` of `passes`"
            )
        return self


FOR_ZEROS = ("sparsify", "l1", "l2", "group_lasso")
