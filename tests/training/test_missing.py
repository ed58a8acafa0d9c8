"""Without torch `edgepack tune` says how to get it, and nothing else changes."""

import importlib.util

import pytest

from edgepack.errors import ConfigError
from edgepack.training import require


def test_it_says_how_to_install_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'edgepack\[tune\]'.*CUDA build.*CPU wheel"):
        require.require_torch()
