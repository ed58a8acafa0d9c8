"""Bias correction: the mean error that a rounded weight adds to each output is subtracted from the bias."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def mean_error(weight: Floats, stored: Floats, actual: Floats, intended: Floats) -> Floats:
    """Mean error of each output, ``stored · actual - weight · intended``, float32 ``[groups · outputs]``.

    ``weight`` and ``stored`` ``[groups, outputs, K]``: the float weight, and the dequantized one in its
    place. ``actual`` and ``intended`` ``[groups, K]``: mean inputs of the quantized and of the float model.
    With both of the float model this is the analytic correction of Nagel et al. (2019, section 4.2); with
    actual inputs behind quantized layers, the empirical one.
    """
    error = np.einsum("gok,gk->go", stored - weight, actual)
    error = error + np.einsum("gok,gk->go", weight, actual - intended)
    return np.asarray(error.reshape(-1), np.float32)
