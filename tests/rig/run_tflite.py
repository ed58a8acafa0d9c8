"""Run a .tflite once: ``run_tflite.py MODEL FEED.npz OUTPUTS.npz``; needs tflite-runtime and NumPy alone."""

import sys

import numpy as np
from tflite_runtime.interpreter import Interpreter


def main(model: str, feed: str, outputs: str) -> None:
    """Arrays go in and out by tensor name, in the file's own types and orders of axes."""
    interpreter = Interpreter(model, num_threads=1)
    interpreter.allocate_tensors()
    with np.load(feed) as arrays:
        for entry in interpreter.get_input_details():
            interpreter.set_tensor(entry["index"], arrays[entry["name"]])
    interpreter.invoke()
    results = interpreter.get_output_details()
    np.savez(outputs, **{result["name"]: interpreter.get_tensor(result["index"]) for result in results})


if __name__ == "__main__":
    main(*sys.argv[1:])
