"""Channel dependencies: which channels of which tensors must be removed together."""
