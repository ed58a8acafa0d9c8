"""Statistics and ranges of given arrays."""

import numpy as np
import numpy.typing as npt

from edgepack.calibration.histogram import StreamingHistogram, TensorStats
from edgepack.calibration.observers import OBSERVERS
from edgepack.config.recipe import Calibration

CONFIG = Calibration()
LEVELS = 255


def measured(*samples: npt.ArrayLike, bins: int = 2048) -> TensorStats:
    stats = TensorStats(StreamingHistogram(bins), CONFIG.momentum)
    for sample in samples:
        stats.update(np.asarray(sample, np.float32), with_histogram=True)
    return stats


def bounds(observer: str, *samples: npt.ArrayLike, config: Calibration = CONFIG) -> tuple[float, float]:
    return OBSERVERS[observer](measured(*samples, bins=config.bins), config, LEVELS)
