"""Selection by measurement: which candidate of the quantized model ships.

In: a function that makes a model from precisions, the limits of the gate, probes. Out: the cheapest candidate
that keeps every limit, and a line for each that was tried. ``trials`` builds and times one candidate against
the original and holds its cost, slower ones penalized; ``choose`` compares whole-model candidates; ``search``
changes single fusion groups; ``leaderboard`` keeps what was tried; ``history`` keeps figures between runs.
"""
