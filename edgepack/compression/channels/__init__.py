"""Which channels of a model belong together, for what removes them and for what trains without them."""
