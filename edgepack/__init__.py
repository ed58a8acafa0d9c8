"""edgepack: from an ONNX model and sample data to a measured int8 package for an edge device.

Each package below says in its docstring what goes in and what comes out. Two modules serve all of them:
``errors`` holds the exceptions and their exit codes, ``results`` the figures of a build.
"""

__version__ = "0.1.0"
