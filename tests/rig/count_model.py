"""Run in the rig under the counting plugin: one inference of a model between two getppid().

``python count_model.py model.onnx inputs.npz``: arrays by the name of the input.
"""

import os
import sys

import numpy as np
import onnxruntime as ort

WARMUP = 2
COUNTED = 2


def main(model: str, inputs: str) -> None:
    """Open, warm up, and run the model ``COUNTED`` times; the plugin counts what lies between."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    with np.load(inputs) as archive:
        feeds = dict(archive)
    for _ in range(WARMUP):
        session.run(None, feeds)
    os.getppid()
    for _ in range(COUNTED):
        session.run(None, feeds)
        os.getppid()


if __name__ == "__main__":
    main(*sys.argv[1:])
