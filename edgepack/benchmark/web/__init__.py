"""Benchmarks in a browser with onnxruntime-web: a page, its server, and its results."""
