"""The commands pack and unpack."""

import json
from pathlib import Path
from typing import Annotated

import typer

from edgepack.cli.common import DEFAULT_RECIPE, Json, MetricName, TargetName, app, progress_bar
from edgepack.errors import GateFailed


@app.command()
def pack(
    models: Annotated[
        list[Path],
        typer.Argument(help="One model of any format, or several .onnx models or folders of packages."),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="OUT", help="FILE.epk for one model, or a folder for a pool."),
    ],
    within: Annotated[
        float,
        typer.Option(
            metavar="ERROR",
            help="For a pool: also share tensors within this relative error, e.g. 0.01.",
        ),
    ] = 0.0,
    recipe: Annotated[
        list[Path] | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="FILE",
            help="For a pool: the recipe with the gate and the data for the models; one for all, or one for "
            "each. Default: ./edgepack.yaml, for models that were built with it.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="For a pool: evaluation samples. Default: the recipe's."),
    ] = None,
    metric: MetricName = None,
    target: TargetName = None,
    min_sqnr_db: Annotated[
        float | None,
        typer.Option(
            metavar="DB", help="For a pool: least fidelity. Default: the gate's, or 30 without a gate."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compress a model to one .epk file, or share weights in a pool.

    An .epk file must be unpacked before use. A pool is a folder of .onnx models that stores their shared
    weights once, and is used as it is. Each model of a pool must pass the gate of its build on the same
    samples; without a recipe it is compared with its own outputs. A model that fails keeps its own weights;
    if it still fails, no pool is written.
    """
    from edgepack.pipeline.packing import facts, pack_models, passes, text
    from edgepack.pipeline.pool_gate import Request

    default = DEFAULT_RECIPE if DEFAULT_RECIPE.is_file() else None
    request = Request(tuple(recipe or ()), default, data, metric, target, min_sqnr_db)
    with progress_bar(as_json) as progress:
        result = pack_models(models, output, within, request, progress)
    print(json.dumps(facts(result), indent=1) if as_json else text(result), end="\n" if as_json else "")
    if not passes(result):
        raise GateFailed("the gate is not met; no pool is written, see the lines marked FAIL")


@app.command()
def unpack(
    packed: Annotated[Path, typer.Argument(help="An .epk file.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="File or folder. Default: the original name, next to PACKED.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Restore a packed model, byte for byte."""
    from edgepack.pack.epk import unpack as restore

    files = [str(path) for path in restore(packed, output)]
    print(json.dumps({"files": files}) if as_json else "\n".join(files))
