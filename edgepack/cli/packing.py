"""pack and unpack."""

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
        typer.Argument(help="One model of any format, or several .onnx; a package's folder for its .onnx."),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="OUT", help="FILE.epk; or a folder, which becomes a pool."),
    ],
    within: Annotated[
        float, typer.Option(metavar="ERROR", help="For a pool: also share tensors this near, as 0.01.")
    ] = 0.0,
    recipe: Annotated[
        list[Path] | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="FILE",
            help="For a pool: whose gate and data judge the models; once for all, or once for each. Default: "
            "./edgepack.yaml, for what was built with it.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="For a pool: evaluation samples, over the recipe's.")
    ] = None,
    metric: MetricName = None,
    target: TargetName = None,
    min_sqnr_db: Annotated[
        float | None,
        typer.Option(metavar="DB", help="For a pool: fidelity to keep, over the gate's; 30 without a gate."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Pack a model into one file, or several into a pool.

    The file is to be unpacked before use; a pool is used as it is, and stores once what its models share.
    Each model of a pool is held to the gate of its build, on the same samples; without a recipe, to its own
    outputs. One that misses it keeps its own weights; if it does with those, no pool is written.
    """
    from edgepack.pipeline.packing import facts, pack_models, passes, text
    from edgepack.pipeline.pool_gate import Wish

    usual = DEFAULT_RECIPE if DEFAULT_RECIPE.is_file() else None
    wish = Wish(tuple(recipe or ()), usual, data, metric, target, min_sqnr_db)
    with progress_bar(as_json) as progress:
        result = pack_models(models, output, within, wish, progress)
    print(json.dumps(facts(result), indent=1) if as_json else text(result), end="\n" if as_json else "")
    if not passes(result):
        raise GateFailed("the gate is not met; no pool is written, see the lines marked FAIL")


@app.command()
def unpack(
    packed: Annotated[Path, typer.Argument(help="An .epk file.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PATH", help="File or folder; default: its name, beside."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Restore a packed model, byte for byte."""
    from edgepack.pack.epk import unpack as restore

    files = [str(path) for path in restore(packed, output)]
    print(json.dumps({"files": files}) if as_json else "\n".join(files))
