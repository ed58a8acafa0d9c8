"""From ranges to an integer model: units, plan, rounding, apply, choice."""
