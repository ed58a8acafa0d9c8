"""Measurements: sessions, latency, fidelity, what the runtime fused, where it was measured."""
