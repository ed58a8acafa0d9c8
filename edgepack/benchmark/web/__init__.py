"""The bench in a browser: a page from this host runs the models with onnxruntime-web and posts back."""
