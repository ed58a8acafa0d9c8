"""The options that single commands have, with what --help says of them; what several share is in common."""

from pathlib import Path
from typing import Annotated

import typer

# --- build

Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target", "-t", metavar="NAME", help="A target (`edgepack targets`), or a .yaml file; repeatable."
    ),
]
CalibrationData = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="Folder of images, .npz or .npy; one .npz or .npy; module:function."),
]
EvaluationData = Annotated[
    str | None, typer.Option(metavar="DATA", help="The same, for the check; other samples.")
]
Output = Annotated[
    str | None, typer.Option("--output", "-o", metavar="FOLDER", help="Default: dist/{target}.")
]
MethodName = Annotated[
    str | None, typer.Option(metavar="WORD", help="auto, static, dynamic, weight_only or float.")
]
Preset = Annotated[str | None, typer.Option(metavar="WORD", help="fast, balanced or best.")]
Budget = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="For preset best: how long to search, as 90s or 5m; 120s."),
]
ObserverName = Annotated[
    str | None,
    typer.Option(metavar="WORD", help="The recipe's calibration.observer, such as percentile; mse."),
]
SampleCount = Annotated[
    int | None, typer.Option(metavar="COUNT", help="Calibrate on at most this many samples.")
]
Ranges = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The ranges.json of an earlier build, instead of calibration."),
]
OnDevice = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="WHERE",
        help="Time there instead of here: ssh://user@host, adb, docker:IMAGE or local.",
    ),
]

# --- build and bench

DevicePython = Annotated[
    str, typer.Option(metavar="PROGRAM", help="The Python there that has onnxruntime or LiteRT.")
]

# --- bench

Models = Annotated[
    list[Path],
    typer.Argument(help="Models, the first is the yardstick; the folder of a package stands for its models."),
]
BenchData = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="Sample inputs; by default the recipe's, or random, batch 1."),
]
BenchRecipe = Annotated[
    Path | None,
    typer.Option("--recipe", "-r", metavar="FILE", help="For samples and images; by default none."),
]
Threads = Annotated[int | None, typer.Option(metavar="COUNT", help="Default: the target's.", min=1)]
Runs = Annotated[int, typer.Option(metavar="COUNT", help="Rounds in which every model runs once.", min=1)]
Ops = Annotated[bool, typer.Option("--ops", help="Also the time per operator type.")]
MeasureThere = Annotated[
    str | None,
    typer.Option(
        metavar="WHERE",
        help="Measure there: ssh://user@host[:port][/folder], adb[:serial], docker:IMAGE or local.",
    ),
]
Keep = Annotated[bool, typer.Option("--keep", help="Leave the bench and its results on the device.")]
InBrowser = Annotated[
    bool, typer.Option("--web", help="Measure in a browser that opens the page served here.")
]
Host = Annotated[
    str, typer.Option(metavar="ADDRESS", help="With --web: where to serve; this host's, for a phone.")
]
Port = Annotated[int, typer.Option(metavar="NUMBER", help="With --web; default: any.", min=0, max=65535)]
