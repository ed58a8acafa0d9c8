"""Whether torch is there, before anything imports it."""

import importlib.util

from edgepack.errors import ConfigError


def require_torch() -> None:
    """Refuse to train without torch.

    Raises:
        ConfigError: with how to install it.
    """
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(
            "training needs torch: pip install 'edgepack[tune]'. On x86 Linux the plain wheel is a CUDA "
            "build of several gigabytes; the CPU wheel from PyTorch's own index is enough"
        )
