"""The inputs of a pass besides the model and its settings."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod

import onnx_ir as ir

from edgepack.compression.structured import Multiples
from edgepack.config.passes import Cluster
from edgepack.config.target import Target
from edgepack.data.samples import Samples

FEWEST_SAMPLES = 32
MOST_SAMPLES = 512
SAMPLE_VALUES = 128 * 3 * 224 * 224
"""Input values that passes use. A dense layer gets one row for each sample, a convolution many positions, so
models with small inputs need more samples."""


@dataclass(frozen=True)
class PassInputs:
    """The inputs that all passes share."""

    target: Target
    samples: Samples
    """The calibration samples; a pass uses :attr:`some` of them."""
    training: Samples
    threads: int
    seed: int
    accurate: Callable[[ir.Model], bool] = lambda model: True
    """Whether a model meets the gate with a margin for later stages."""
    clusters: Cluster | None = None
    """Settings of a later cluster pass."""

    @cached_property
    def some(self) -> Samples:
        """The samples that passes use."""
        return some_samples(self.samples)

    @property
    def multiples(self) -> Multiples:
        """Channel multiples that the target's kernels prefer."""
        like = self.target.quantization
        return Multiples(like.pruned_channels_multiple, like.depthwise_channels_multiple)


def some_samples(samples: Samples) -> Samples:
    """Evenly spaced samples for passes; more of them if each is small."""
    size = sum(prod(array.shape) for array in next(iter(samples)).feeds.values())
    return samples.spread(min(max(SAMPLE_VALUES // max(size, 1), FEWEST_SAMPLES), MOST_SAMPLES))
