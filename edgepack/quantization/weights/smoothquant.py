"""SmoothQuant: moves outliers of an activation into the weights that consume it.

Given::

    MatMul(x, w)

Result, for any positive ``s`` per input channel::

    MatMul(x / s, w * s)

The output is the same. An activation has one scale for all channels, a weight one per output: a few channels
of large range, common in transformers, cost all others their resolution (Xiao et al., 2023, SmoothQuant).
The paper uses one migration strength per model; here each activation has the one with the least expected
error.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

STRENGTHS = tuple(np.round(np.arange(0.3, 1.01, 0.1), 1))
"""Of ``s = range(x)^strength / range(w)^(1 - strength)``."""
MAX_FACTOR = 64.0
"""A channel is scaled by at most this much, either way."""
MAX_ERROR_SHARE = 0.7
"""SmoothQuant must leave at most this share of the expected error: it costs a pass over the activation."""
LEVELS = 255
WEIGHT_LIMIT = 127
COMPENSATED_SHARE = 0.2
"""Share of a weight's rounding error that GPTQ leaves in the output, approximately."""


def smoothing_factors(
    weights: Sequence[Floats], low: Floats, high: Floats, mean_square: Floats
) -> Floats | None:
    """``s`` [K] for an activation that ``weights`` [outputs, K] consume, or ``None`` without enough gain.

    ``low`` and ``high`` [samples, K] are the extremes of each channel in each sample, ``mean_square`` [K].
    The activation is quantized at run time, so its expected step is the mean over samples.
    """
    stacked = np.concatenate(weights, axis=0)
    input_peak = np.maximum(-low, high).max(axis=0)
    weight_peak = np.abs(stacked).max(axis=0)
    plain = _expected_error(stacked, low, high, mean_square)
    best, least = None, MAX_ERROR_SHARE * plain
    for strength in STRENGTHS:
        factors = np.maximum(input_peak, 1e-6) ** strength / np.maximum(weight_peak, 1e-6) ** (1 - strength)
        factors = factors / np.exp(np.log(factors).mean())
        factors = np.clip(factors, 1 / MAX_FACTOR, MAX_FACTOR).astype(np.float32)
        error = _expected_error(stacked * factors, low / factors, high / factors, mean_square / factors**2)
        if error < least:
            best, least = factors, error
    return best


def _expected_error(weight: Floats, low: Floats, high: Floats, mean_square: Floats) -> float:
    """Mean squared error summed over outputs, from rounding the activation and the weight."""
    step = (np.maximum(high.max(axis=1), 0) - np.minimum(low.min(axis=1), 0)) / LEVELS
    from_input = float((step**2).mean()) / 12 * float((weight**2).sum())
    weight_step = np.abs(weight).max(axis=1) / WEIGHT_LIMIT
    from_weight = float((weight_step**2).sum()) / 12 * float(mean_square.sum())
    return from_input + COMPENSATED_SHARE * from_weight
