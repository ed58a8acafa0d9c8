"""Latency, cold start, memory and time per operator, on this host or on a device.

In: model files and feeds. Out: figures; speed-ups come from interleaved runs. ``devices/`` measures by ssh,
adb or docker, ``web/`` in a browser; ``profile`` times operators, ``group_figures`` fusion groups.
"""
