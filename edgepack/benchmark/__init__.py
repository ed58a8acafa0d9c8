"""Latency, cold start, memory and per-operator times, here or on a device.

In: model files and feeds. Out: figures; ratios come from runs that take turns. ``devices/`` measures by ssh,
adb or docker, ``web/`` in a browser; ``profile`` times operators, ``group_figures`` fusion groups.
"""
