"""Quantize one model with one rival. Runs in the rival's own environment and needs nothing of edgepack.

    python rival_tools.py TOOL model.onnx samples/ out.onnx

``samples/`` holds one .npz per calibration sample with an array per input. Each tool is used as its manual
says for int8 on a CPU: asymmetric u8 activations, symmetric s8 weights, one scale a channel.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Feeds = dict[str, Any]


def feeds_of(folder: Path) -> Iterator[Feeds]:
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as archive:
            yield dict(archive)


def reader(folder: Path) -> Any:
    from onnxruntime.quantization import CalibrationDataReader  # noqa: PLC0415

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = feeds_of(folder)

        def get_next(self) -> Feeds | None:
            return next(self.feeds, None)

        def rewind(self) -> None:
            self.feeds = feeds_of(folder)

    return Reader()


def stock_static(model: Path, samples: Path, out: Path, method: str) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static  # noqa: PLC0415
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415

    prepared = out.with_suffix(".pre.onnx")
    quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(out), reader(samples), per_channel=True, activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8, calibrate_method=CalibrationMethod[method],
    )  # fmt: skip


def stock_dynamic(model: Path, samples: Path, out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415

    quantize_dynamic(str(model), str(out), per_channel=True, weight_type=QuantType.QInt8)


def nncf(model: Path, samples: Path, out: Path) -> None:
    import nncf  # type: ignore[import-not-found]  # noqa: PLC0415
    import onnx  # noqa: PLC0415

    loaded = onnx.load(model)  # noqa: TID251  # what the rival takes
    feeds = list(feeds_of(samples))
    # Its manual: the model type is given for transformers, which has attention kept accurate.
    attention = sum(node.op_type == "Softmax" for node in loaded.graph.node) > 1
    quantized = nncf.quantize(
        loaded,
        nncf.Dataset(feeds),
        subset_size=len(feeds),
        model_type=nncf.ModelType.TRANSFORMER if attention else None,
    )
    onnx.save(quantized, out)  # noqa: TID251


def quark(model: Path, samples: Path, out: Path) -> None:
    from quark.onnx import ModelQuantizer  # type: ignore[import-not-found]  # noqa: PLC0415
    from quark.onnx.quantization.config import (  # type: ignore[import-not-found]  # noqa: PLC0415
        Config,
        get_default_config,
    )

    config = Config(global_quant_config=get_default_config("U8S8_AAWS"))
    ModelQuantizer(config).quantize_model(str(model), str(out), reader(samples))


def main() -> None:
    tool, *paths = sys.argv[1:]
    model, samples, out = map(Path, paths)
    if tool.startswith("static "):
        stock_static(model, samples, out, tool.removeprefix("static "))
    else:
        {"dynamic": stock_dynamic, "nncf": nncf, "quark": quark}[tool](model, samples, out)


if __name__ == "__main__":
    main()
