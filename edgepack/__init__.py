"""edgepack: from an ONNX model and sample data to a measured int8 package for an edge device."""

__version__ = "0.1.0"
