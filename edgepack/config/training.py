"""Training settings of a recipe."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgepack.config.strict_yaml import Strict

Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
HALF = 0.5


class Sparsify(Strict):
    """Sparsity that is reached during training, so that the other weights adapt."""

    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of zeros among all weights; for a pattern always one half; for channels, among prunable ones."""
    when: Literal["dynamic", "once"] = "dynamic"
    """dynamic: sparsity rises, and each update of the mask may restore weights; once: all at one step."""
    pattern: Literal["unstructured", "2:4", "4:8", "channels"] = "unstructured"
    """2:4, 4:8: N nonzero weights of M consecutive inputs; the share of pruned groups rises during training.
    channels: whole channels, in all layers that share them; the pass `compact` then removes them."""
    multiple: Annotated[int, Field(ge=1)] | None = None
    """Each group keeps a multiple of this many channels; by default in a build what suits the target."""
    regrowth: Literal["gradient", "straight_through"] = "gradient"
    """How pruned weights return. gradient: weights with the largest gradients replace the smallest active
    ones, and start at zero (RigL; Evci et al., 2020); straight_through: pruned weights are still trained
    through a straight-through estimator, decay, and return if they are large (Zhou et al., 2021)."""
    exchanged: Share = 0.3
    """Share of the active weights that are replaced at a choice by gradient; it decays to zero."""
    start: Share = 0.05
    """Share of the training after which pruning starts, or happens."""
    end: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of the training after which a dynamic mask is final."""
    every: Annotated[int, Field(ge=1)] = 20
    """Steps between two updates of the mask."""

    @model_validator(mode="after")
    def _patterns_are_half_zeros(self) -> "Sparsify":
        if ":" in self.pattern and self.sparsity != HALF:
            raise ValueError(f"pattern {self.pattern} is half zeros: leave out sparsity")
        if self.when == "dynamic" and self.start >= self.end:
            raise ValueError("start must lie before end")
        return self


class Gradients(Strict):
    """Low-bit gradients, as they are stored on small devices and exchanged between workers."""

    bits: Literal[8, 4] = 8
    block: Annotated[int, Field(ge=8)] | None = 256
    """Values that share a scale; null: one scale for a tensor."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    error_feedback: bool = True
    """Error feedback: the quantization error is added to the gradient of the next step."""


class Tune(Strict):
    """Distillation: the weights are trained so that the model's outputs match the teacher's."""

    budget_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that training may take."""
    steps: Annotated[int, Field(gt=0)] | None = None
    """Largest number of steps. Only a limit in steps makes a run reproducible."""
    batch: Annotated[int, Field(ge=1)] = 10
    """Batch size."""
    views: Annotated[int, Field(ge=0)] = 0
    """Augmented copies of each image that are trained on too, crops, mirrored or not, with the teacher's
    outputs for them (Beyer et al., 2022)."""
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate, relative to the magnitude of a channel; linear warm-up, then cosine decay."""
    temperature: Annotated[float, Field(gt=0)] = 8.0
    """Temperature: the logits of both models are divided by it before the softmax."""
    logits: Weight = 1.0
    """Weight of the loss on the outputs."""
    level: Weight = 1.0
    """Weight of the loss on the mean of all logits, which a softmax ignores and other consumers do not."""
    features: Weight = 1.0
    """Weight of the loss on intermediate values."""
    feature_map: dict[str, str] = {}
    """Intermediate values of the model and the teacher's to compare them with; by default the outputs of
    residual additions that both have under one name."""
    labels: Weight = 0.0
    """Weight of the cross-entropy with the samples' labels."""
    keep: tuple[str, ...] = ()
    """Names of weights that are not trained; `*` and `?` work as in a shell."""
    l1: Weight = 0.0
    """Weight of the L1 penalty: the sum of magnitudes of all weights."""
    l2: Weight = 0.0
    """Weight of the L2 penalty: half the sum of squares."""
    group_lasso: Weight = 0.0
    """Weight of the group lasso: the sum of norms of all output channels (Yuan and Lin, 2006)."""
    sparsify: Sparsify | None = None
    gradients: Gradients | None = None
    """Low-bit gradients; float by default."""
    held_out: Share = 0.2
    """Share of the samples held out for validation; the weights that do best on them are kept, the initial
    ones included."""
    stop_at: Annotated[float, Field(gt=0, le=1)] | None = None
    """Agreement with the teacher on the held-out samples at which training stops."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Threads; by default the number of cores."""


class AwareTune(Tune):
    """Quantization-aware training: rounded weights are trained so that outputs match the float model's."""

    learn_ranges: bool = False
    """Learn the scales of activations too (LSQ; Esser et al., 2020)."""

    @model_validator(mode="after")
    def _no_zeros(self) -> "AwareTune":
        asked = [key for key in FOR_ZEROS if getattr(self, key)]
        if asked:
            raise ValueError(
                f"{asked[0]}: for weights before they are quantized; give it to a `tune` of `passes`"
            )
        return self


FOR_ZEROS = ("sparsify", "l1", "l2", "group_lasso")
