"""The calibration run: the float model over the samples, one sample in memory at a time."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgepack.calibration.effective_range import consumer_functions
from edgepack.calibration.histogram import StreamingHistogram, TensorStats
from edgepack.calibration.observers import OBSERVERS, WITHOUT_HISTOGRAM
from edgepack.calibration.ranges import Range, RangeTable
from edgepack.config.recipe import Calibration
from edgepack.config.target import Runtime
from edgepack.data.samples import Samples
from edgepack.errors import CalibrationError
from edgepack.ir.files import save_model, weight_bytes
from edgepack.ir.fingerprint import fingerprint
from edgepack.ir.model import LARGE_BYTES, clone
from edgepack.runtime.session import open_session
from edgepack.runtime.unsigned_weights import make_weights_unsigned

LEVELS_8_BIT = 255


def calibrate(
    model: ir.Model,
    samples: Samples,
    names: Sequence[str],
    config: Calibration,
    *,
    threads: int,
    on_sample: Callable[[], None] = lambda: None,
) -> RangeTable:
    """Measure the ranges of the float values ``names`` of ``model`` over ``samples``.

    Memory holds the activations of one sample and one histogram per tensor, for any number of samples, batch
    sizes and shapes.

    Raises:
        CalibrationError: no samples, the model fails on a sample, or a tensor holds NaN or infinity.
    """
    inner = {v.name: v for node in model.graph for v in node.outputs}
    stats = {
        name: TensorStats(
            StreamingHistogram(config.bins),
            momentum=config.momentum,
            consumer_functions=consumer_functions(inner[name]) if name in inner else (),
        )
        for name in dict.fromkeys(names)
    }
    with_histogram = config.observer not in WITHOUT_HISTOGRAM
    for key, values in stream_activations(model, samples, list(stats), threads=threads):
        for name, value in values.items():
            try:
                stats[name].update(value, with_histogram=with_histogram)
            except ValueError as error:
                raise CalibrationError(
                    f"tensor {name!r} {error} on sample {key}; look at that sample, or at the float model's "
                    "own overflow there"
                ) from error
        on_sample()
    reached = max((s.samples for s in stats.values()), default=0)
    if stats and not reached:
        raise CalibrationError(
            f"{samples.source}: no sample reached the model; calibration needs at least one"
        )
    observer = OBSERVERS[config.observer]
    ranges = {}
    for name, tensor in stats.items():
        if not tensor.samples:
            continue  # only empty arrays: nothing to quantize
        low, high = observer(tensor, config, LEVELS_8_BIT)
        counted = tensor.histogram.coarse()
        ranges[name] = Range(float(low), float(high), tensor.minimum, tensor.maximum, counted)
    return RangeTable(ranges, config.observer, fingerprint(model), samples.fingerprint, len(samples))


def stream_activations(
    model: ir.Model, samples: Samples, names: Sequence[str], *, threads: int, exact: bool = False
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Run ``model`` on each sample and yield ``(sample key, {name: array})`` for the values ``names``.

    ``exact``: integer kernels do not saturate on any host, see :mod:`edgepack.runtime.host`.

    Raises:
        CalibrationError: the runtime fails on a sample.
    """
    inputs = {value.name for value in model.graph.inputs}
    inner = [name for name in names if name not in inputs]
    observed = clone(model)
    values = {v.name: v for node in observed.graph for v in node.outputs}
    present = {v.name for v in observed.graph.outputs}
    observed.graph.outputs.extend(values[name] for name in inner if name not in present)
    if exact:
        make_weights_unsigned(observed, int8_activations=False)
    with tempfile.TemporaryDirectory(prefix="edgepack-calibrate-") as folder:
        path = Path(folder) / "observed.onnx"
        save_model(observed, path, check=False)
        large = weight_bytes(model) > LARGE_BYTES
        runtime = Runtime(threads=threads)
        session = open_session(path, runtime.sparing() if large else runtime, lean=True)
        for sample in samples:
            try:
                arrays = session.run(inner, sample.feeds) if inner else []
            except Exception as error:
                raise CalibrationError(
                    f"the float model fails on sample {sample.key}: {str(error).splitlines()[0]}"
                ) from error
            found = dict(zip(inner, arrays, strict=True))
            yield sample.key, {name: found[name] if name in found else sample.feeds[name] for name in names}
        del session
