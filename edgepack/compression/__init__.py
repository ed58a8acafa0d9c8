"""Compression passes: pruning, clustering, weight sharing, structured pruning.

In: a float model, samples and the settings of a pass. Out: a float model with fewer or shared weights,
and notes. ``channels/`` finds which channels are coupled, ``structured`` removes whole channels.
"""
