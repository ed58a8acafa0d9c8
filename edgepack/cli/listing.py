"""The command targets."""

import json
from typing import Annotated

import typer

from edgepack.cli.common import Json, app
from edgepack.errors import ConfigError


@app.command()
def targets(
    name: Annotated[str | None, typer.Argument(help="Show this target. Default: list all targets.")] = None,
    schema: Annotated[
        str | None, typer.Option(metavar="KIND", help="Print the JSON schema of `target` or `recipe` files.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List targets, show one, or print a JSON schema."""
    from edgepack.config.recipe import Recipe
    from edgepack.config.strict_yaml import Strict
    from edgepack.config.target import Target, list_targets, load_target

    if schema is not None:
        kinds: dict[str, type[Strict]] = {"target": Target, "recipe": Recipe}
        if schema not in kinds:
            raise ConfigError(f"--schema {schema}: known: target, recipe")
        print(json.dumps(kinds[schema].model_json_schema(), indent=1))
    elif name is not None:
        print(load_target(name).model_dump_json(indent=1))
    else:
        found = {n: load_target(str(path)) for n, path in list_targets().items()}
        if as_json:
            print(json.dumps({n: t.model_dump(mode="json") for n, t in found.items()}, indent=1))
        else:
            width = max(map(len, found), default=0)
            for n, t in found.items():
                print(f"{n.ljust(width)}  {t.description}  [{', '.join(t.formats)}]")
