"""Selection by measurement: which candidate of the quantized model ships.

In: the fusion groups, a function that builds a model from a precision for each of them, the limits of the
gate, probe samples. Out: the cheapest candidate that keeps every limit, and a line for each that was
measured. ``trials`` times one candidate against the original, compares it with the limits and computes its
cost: one slower than the original costs more than any that is not. ``candidates`` lists the candidates,
``choose`` compares them, ``search`` changes single groups, ``leaderboard`` keeps what was measured,
``history`` keeps figures between runs.
"""
