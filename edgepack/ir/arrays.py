"""Array types: one array, and one array for each input of a model."""

from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]


Feeds = dict[str, Array]
