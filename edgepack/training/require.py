"""Check that torch is installed before it is imported."""

import importlib.util

from edgepack.errors import ConfigError


def require_torch() -> None:
    """Check that torch is installed.

    Raises:
        ConfigError: it is not; the message says how to install it.
    """
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(
            "training needs torch: pip install 'edgepack[tune]'. On x86 Linux the plain wheel is a CUDA "
            "build of several gigabytes; the CPU wheel from PyTorch's own index is enough"
        )
