"""Smoothing: outliers of an activation move into the weights that read it.

Given::

    MatMul(x, w)

Result, for any positive ``s`` per input channel::

    MatMul(x / s, w * s)

The product is the same. An activation has one scale for all channels, a weight one for each output: a few
channels of large range, as every transformer has them, cost all others their resolution (Xiao et al., 2023,
SmoothQuant). Where the paper takes one migration strength for a model, here each activation gets the one
with the least expected error.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

STRENGTHS = tuple(np.round(np.arange(0.3, 1.01, 0.1), 1))
"""Of ``s = range(x)^strength / range(w)^(1 - strength)``."""
MOST = 64.0
"""A channel is scaled by at most this much, either way."""
WORTH = 0.7
"""The division costs a pass over the activation: it must leave at most this share of the expected error."""
LEVELS = 255
WEIGHT_LIMIT = 127
MADE_UP_FOR = 0.2
"""Share of a weight's rounding error that GPTQ leaves in the output, about."""


def smoothing_factors(
    weights: Sequence[Floats], low: Floats, high: Floats, mean_square: Floats
) -> Floats | None:
    """``s`` [K] for an activation that ``weights`` [outputs, K] read, or ``None`` where it does not pay.

    ``low`` and ``high`` [samples, K] are the extremes of each channel in each sample, ``mean_square`` [K].
    The range of the activation is taken at run time, so its expected step is the mean over samples.
    """
    stacked = np.concatenate(weights, axis=0)
    seen = np.maximum(-low, high).max(axis=0)
    weighs = np.abs(stacked).max(axis=0)
    plain = _expected_error(stacked, low, high, mean_square)
    best, least = None, WORTH * plain
    for strength in STRENGTHS:
        factors = np.maximum(seen, 1e-6) ** strength / np.maximum(weighs, 1e-6) ** (1 - strength)
        factors = np.clip(factors / np.exp(np.log(factors).mean()), 1 / MOST, MOST).astype(np.float32)
        error = _expected_error(stacked * factors, low / factors, high / factors, mean_square / factors**2)
        if error < least:
            best, least = factors, error
    return best


def _expected_error(weight: Floats, low: Floats, high: Floats, mean_square: Floats) -> float:
    """Mean squared error of all outputs together, from rounding the activation and the weight."""
    step = (np.maximum(high.max(axis=1), 0) - np.minimum(low.min(axis=1), 0)) / LEVELS
    from_input = float((step**2).mean()) / 12 * float((weight**2).sum())
    weight_step = np.abs(weight).max(axis=1) / WEIGHT_LIMIT
    from_weight = float((weight_step**2).sum()) / 12 * float(mean_square.sum())
    return from_input + MADE_UP_FOR * from_weight
