"""Options of single commands, with their --help text; options that commands share are in ``common``."""

from pathlib import Path
from typing import Annotated

import typer

# --- build

Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        "-t",
        metavar="NAME",
        help="A target (see `edgepack targets`) or a .yaml file. Repeatable.",
    ),
]
CalibrationData = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="Calibration samples: a folder of images, .npz or .npy files, one .npz or .npy file, or "
        "module:function.",
    ),
]
EvaluationData = Annotated[
    str | None, typer.Option(metavar="DATA", help="Evaluation samples, in the same formats.")
]
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="FOLDER", help="The package's folder. Default: dist/{target}."),
]
MethodName = Annotated[
    str | None,
    typer.Option(metavar="WORD", help="Quantization: auto, static, dynamic, weight_only or float."),
]
Preset = Annotated[str | None, typer.Option(metavar="WORD", help="Effort: fast, balanced or best.")]
Budget = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Time of the search of preset best, e.g. 90s or 5m. Default: 120s."),
]
ObserverName = Annotated[
    str | None,
    typer.Option(
        metavar="WORD",
        help="Calibration observer: minmax, moving_average, percentile, entropy or mse. Default: mse.",
    ),
]
SampleCount = Annotated[
    int | None, typer.Option(metavar="COUNT", help="Maximum number of calibration samples.")
]
Ranges = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Use the ranges.json of an earlier build instead of calibrating."),
]
OnDevice = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="WHERE",
        help="Measure latency on this device: ssh://user@host, adb, docker:IMAGE or local.",
    ),
]

# --- build and bench

DevicePython = Annotated[
    str, typer.Option(metavar="PROGRAM", help="The device's Python, with onnxruntime or LiteRT installed.")
]

# --- bench

Models = Annotated[
    list[Path],
    typer.Argument(help="Models or folders of packages. The first model is the baseline."),
]
BenchData = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="Sample inputs. Default: the recipe's, or random with batch 1."),
]
BenchRecipe = Annotated[
    Path | None,
    typer.Option("--recipe", "-r", metavar="FILE", help="The recipe, for samples and images. Default: none."),
]
Threads = Annotated[
    int | None, typer.Option(metavar="COUNT", help="Number of threads. Default: the target's.", min=1)
]
Runs = Annotated[int, typer.Option(metavar="COUNT", help="Timed runs of each model.", min=1)]
Ops = Annotated[bool, typer.Option("--ops", help="Also show the time per operator type.")]
MeasureThere = Annotated[
    str | None,
    typer.Option(
        metavar="WHERE",
        help="Measure on this device: ssh://user@host[:port][/folder], adb[:serial], docker:IMAGE or local.",
    ),
]
Keep = Annotated[bool, typer.Option("--keep", help="Keep the benchmark's files on the device.")]
InBrowser = Annotated[bool, typer.Option("--web", help="Measure in a browser: serves a page to open there.")]
Host = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS",
        help="With --web: the address to serve at; for a phone, this host's on the network.",
    ),
]
Port = Annotated[
    int, typer.Option(metavar="NUMBER", help="With --web: the port. 0: any free port.", min=0, max=65535)
]
