"""Benchmarks in a browser with onnxruntime-web: a page, a server for it, and its results."""
