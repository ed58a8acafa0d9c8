"""Selection by measurement: which candidate of the quantized model ships.

In: a function that builds a model from the precision of each fusion group, the limits of the gate, probe
samples. Out: the cheapest candidate that keeps every limit, and a line for each candidate that was measured.
``trials`` builds and times one candidate against the original and computes its cost; ``choose`` compares
whole-model candidates; ``search`` changes single groups; ``leaderboard`` keeps what was measured; ``history``
keeps figures between runs.
"""
