"""pack and unpack."""

import json
from pathlib import Path
from typing import Annotated

import typer

from edgepack.cli.common import Json, app


@app.command()
def pack(
    models: Annotated[list[Path], typer.Argument(help="One model of any format, or several .onnx.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="OUT", help="FILE.epk; or a folder, which becomes a pool."),
    ],
    within: Annotated[
        float, typer.Option(metavar="ERROR", help="For a pool: also share tensors this near, as 0.01.")
    ] = 0.0,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Samples to compare a pool's outputs on; or random.")
    ] = None,
    min_sqnr_db: Annotated[
        float | None, typer.Option(metavar="DB", help="A pooled model below it keeps its own tensors; 30.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Pack a model into one file, or several into a pool.

    The file is to be unpacked before use; a pool is used as it is, and stores once what its models share.
    """
    from edgepack.pooling import facts, pack_models, text

    result = pack_models(models, output, within, data, min_sqnr_db)
    print(json.dumps(facts(result), indent=1) if as_json else text(result), end="\n" if as_json else "")


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
