"""Fixtures of the tests on emulated ARM cores."""

from support.arm_network import inputs, network

__all__ = ["inputs", "network"]
