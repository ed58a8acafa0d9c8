"""The quantization plan: precision and parameters of each fusion group, and the reason where it is float."""
