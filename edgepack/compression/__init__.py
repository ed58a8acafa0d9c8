"""Compression passes: pruning, clustering, weight sharing, structured pruning.

In: a float model, samples, the settings of a pass. Out: a float model with fewer or shared weights, and what
was done. ``channels/`` finds which channels are coupled, ``structured`` removes whole channels.
"""
