"""All exceptions that edgepack raises deliberately, and the exit code of each.

::

    EdgepackError            exit code
    ├── ConfigError               2     recipe, target or command line
    ├── ModelError                3     the ONNX file
    ├── SamplesError              3     calibration or evaluation data
    ├── CalibrationError          4     ranges could not be measured
    ├── ExportError               4     an artifact could not be written or verified
    ├── DeviceError               5     the device cannot be reached, or cannot run the bench
    └── GateFailed                1     a limit is not met; a package is kept, a pool is not written

A message says what is wrong, where (file, node, tensor, sample) and what to do.
"""

import difflib
from collections.abc import Iterable


class EdgepackError(Exception):
    """Base of all errors that a user can act on; ``exit_code`` is the exit code of the command line."""

    exit_code = 4


class ConfigError(EdgepackError):
    """A recipe, a target or an argument is wrong."""

    exit_code = 2


class ModelError(EdgepackError):
    """The ONNX model cannot be read, is invalid, or is not supported."""

    exit_code = 3


class SamplesError(EdgepackError):
    """Calibration or evaluation data do not fit the model, or are damaged."""

    exit_code = 3


class CalibrationError(EdgepackError):
    """Activation ranges could not be measured, or stored ranges belong to another model."""

    exit_code = 4


class ExportError(EdgepackError):
    """An artifact could not be written, or the runtime refuses it."""

    exit_code = 4


class DeviceError(EdgepackError):
    """A device cannot be reached, was lost, or lacks a requirement of the bench."""

    exit_code = 5


class GateFailed(EdgepackError):
    """The build is complete but fails a limit of its gate."""

    exit_code = 1


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or the list of all."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
