"""The public contract as tables that are read from the code, to compare with docs/contract.md."""

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import typer
from pydantic import TypeAdapter
from support import tiny

import edgepack
from edgepack.cli import app, program
from edgepack.config.recipe import Recipe, load_recipe
from edgepack.config.target import Target, load_target
from edgepack.errors import EdgepackError
from edgepack.pipeline.build import build
from edgepack.pipeline.job import Job
from edgepack.results import BuildReport
from edgepack.runtime.fused import FusionReport

Lines = list[str]

BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
}
"""Words of a JSON schema in the tables."""

VALUES: dict[Any, str] = {
    bool: "flag",
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    list[str]: "text",
    list[Path]: "path",
}
"""Types of a command's parameters."""

OUTCOMES = {
    0: "good",
    1: "the gate is not met: a package is kept, a pool is not written",
    2: "configuration: a recipe, a target, an option",
    3: "the model or the data",
    4: "calibration or export",
    5: "a device",
    70: "a defect in edgepack",
    130: "stopped by SIGINT",
    143: "stopped by SIGTERM",
}
"""The meaning of each exit code; a code without a line here fails the test."""

WORKERS = "`edgepack tune` by several workers, as torchrun sets it"
VARIABLES = {
    "EDGEPACK_CACHE": "folder of what builds measured and of the fetched onnxruntime-web",
    "EDGEPACK_TARGETS": "a folder of targets, searched first",
    "XDG_CACHE_HOME": "its `edgepack` has what builds measured where `EDGEPACK_CACHE` is not set",
    "RANK": WORKERS,
    "WORLD_SIZE": WORKERS,
    "LOCAL_WORLD_SIZE": WORKERS,
    "MASTER_ADDR": WORKERS,
    "MASTER_PORT": WORKERS,
}
KINDS: dict[type, str] = {
    bool: "true or false",
    int: "number",
    float: "number",
    str: "text",
    list: "list",
    dict: "mapping",
}
"""Types of JSON values."""
INNER = frozenset({"PYTHONPATH"})
"""Read and set for processes that edgepack starts; no setting."""

FILES = {
    "model.onnx": "always",
    "model.ort": "where `formats` has `ort`",
    "model.required_operators.config": "beside `model.ort`",
    "model.tflite": "where `formats` has `tflite`",
    "model.epk": "where `formats` has `epk`",
    "ranges.json": "always",
    "report.html": "always",
    "report.json": "always",
    "report.txt": "always",
}


# --- commands


def commands() -> Lines:
    """Every command with its arguments and options."""
    group: Any = typer.main.get_command(app)
    lines = ["| command | argument or option | value | default |", "|---|---|---|---|"]
    lines += [_option("edgepack", option, bool) for option in group.params]
    for info in app.registered_commands:
        assert info.callback is not None
        name, types = info.name or info.callback.__name__, get_type_hints(info.callback)
        for option in group.commands[name].params:
            lines.append(_option(f"edgepack {name}", option, types[option.name]))
    return lines


def _option(command: str, option: Any, kind: Any) -> str:
    """One row. The type is that of the Python parameter: typer's own classes differ between its versions."""
    parts = [part for part in (kind, *get_args(kind)) if part in VALUES]
    words = [VALUES[parts[0]], *(["repeatable"] if get_origin(parts[0]) is list else [])]
    if option.param_type_name == "argument":
        name = (option.metavar or option.name.upper()).strip("[].")
    else:
        name = "`, `".join((*option.opts, *option.secondary_opts))
    default = "" if kind is bool or option.default is None else _default(option.default)
    default = "required" if option.required else default
    return f"| `{command}` | `{name}` | {', '.join(words)} | {default} |"


def _default(value: object) -> str:
    return f"`{json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)}`"


# --- keys and fields, from JSON schemas


def recipe_keys() -> Lines:
    """All keys of a recipe, nested keys after their parents."""
    return _tables(Recipe.model_json_schema())


def target_keys() -> Lines:
    """All keys of a target."""
    return _tables(Target.model_json_schema())


def report_fields() -> Lines:
    """All fields of ``report.json``, which are always written."""
    schema = TypeAdapter(BuildReport).json_schema(mode="serialization")
    schema["properties"] = {f.name: schema["properties"][f.name] for f in fields(BuildReport)}  # as written
    return _tables(schema, defaults=False)


def _tables(schema: Mapping[str, Any], *, defaults: bool = True) -> Lines:
    """One table: the keys of a mapping at its first place, and references at its other places."""
    head = ["| key | type | default |", "|---|---|---|"] if defaults else ["| field | type |", "|---|---|"]
    return head + [_row(*found, defaults=defaults) for found in _walk(schema, schema, "", {})]


def _row(path: str, kind: str, default: str, *, defaults: bool) -> str:
    return f"| `{path}` | {kind} | {default} |" if defaults else f"| `{path}` | {kind} |"


def _walk(
    schema: Mapping[str, Any], whole: Mapping[str, Any], prefix: str, seen: dict[str, str]
) -> Iterator[tuple[str, str, str]]:
    """Path, type and default of every key; ``seen`` maps definitions to their first place."""
    required = schema.get("required", ())
    for key, value in schema["properties"].items():
        path = f"{prefix}{key}"
        kind, inner, name = _kind(value, whole, path)
        nested = inner is not None and value.get("default")
        default = "required" if key in required else "" if nested else _default(value.get("default"))
        if inner is None:
            yield path, kind, default
        elif name in seen:
            yield path, f"{kind}, keys as in `{seen[name]}`", default
        else:
            place = _place(value, path)
            seen[name] = place
            yield path, kind, default
            yield from _walk(inner, whole, f"{place}.", seen)


def _place(value: Mapping[str, Any], path: str) -> str:
    """The path of a mapping's keys: in each entry of a list, under any key of a mapping, or directly."""
    options = value.get("anyOf", [value])
    if any(option.get("type") == "array" for option in options):
        return f"{path}[]"
    return f"{path}.*" if any("additionalProperties" in option for option in options) else path


def _kind(value: Mapping[str, Any], whole: Mapping[str, Any], path: str) -> tuple[str, Any, str]:
    """The type in words, and the schema and the name of a contained mapping with known keys."""
    if "anyOf" in value:
        found = [_kind(option, whole, path) for option in value["anyOf"]]
        inner = next((f for f in found if f[1] is not None), ("", None, ""))
        return " or ".join(f[0] for f in found), inner[1], inner[2]
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        target = whole["$defs"][name]
        return ("mapping", target, name) if "properties" in target else _kind(target, whole, path)
    if "enum" in value or "const" in value:
        words = value.get("enum", [value.get("const")])
        return " or ".join(f"`{word}`" for word in words), None, ""
    match value.get("type"):
        case "array" if "items" in value:
            kind, inner, name = _kind(value["items"], whole, path)
            return f"list of {kind}", inner, name
        case "object":
            extra = value.get("additionalProperties")
            if isinstance(extra, dict):
                kind, inner, name = _kind(extra, whole, path)
                return f"mapping of any keys to {kind}", inner, name
            return "mapping of any keys to anything", None, ""
        case "null":
            return "null", None, ""
        case "string":
            return "path" if value.get("format") == "path" else "text", None, ""
        case "integer" | "number" as kind:
            bounds = [text.format(value[word]) for word, text in BOUNDS.items() if word in value]
            return " ".join([kind, ", ".join(bounds)]).strip(), None, ""
        case "boolean":
            return "true or false", None, ""
        case None:
            return "anything", None, ""
    raise AssertionError(f"{path}: the tables have no words for {value}")


# --- outputs of a build


def built(folder: Path) -> Path:
    """The package of a small build with every format, in ``folder``."""
    tiny.project(folder, output="dist", tflite={"io": "int8"})
    recipe = load_recipe(folder / "edgepack.yaml", {})
    target = load_target("mobile")
    everything = target.model_copy(update={"formats": (*target.formats, "epk")})
    return build(Job(recipe, everything, folder, "edgepack build"))[1]


def mappings(package: Path) -> Lines:
    """The keys of the report's free-form mappings, as a build writes them."""
    report = json.loads((package / "report.json").read_text(encoding="utf-8"))
    runtime, tflite = report["runtime"], report["runtime"]["tflite"]
    schema = TypeAdapter(FusionReport).json_schema(mode="serialization")
    fused = [(path, kind) for path, kind, _ in _walk(schema, schema, "runtime.", {})]
    counted = set(schema["properties"])
    assert counted <= set(runtime), "a build reports all that was counted"
    groups = {
        "environment": report["environment"],
        "fingerprints": report["fingerprints"],
        "runtime": {key: value for key, value in runtime.items() if key not in counted},
        "runtime.tflite": tflite,
        "runtime.tflite.inputs[]": tflite["inputs"][0],
        "runtime.tflite.outputs[]": tflite["outputs"][0],
        "runtime.tflite.xnnpack": tflite["xnnpack"],
    }
    rows = [(f"{name}.{key}", KINDS[type(v)]) for name, group in groups.items() for key, v in group.items()]
    return ["| field | type |", "|---|---|", *(f"| `{path}` | {kind} |" for path, kind in (*fused, *rows))]


def files(package: Path) -> Lines:
    """The files of a package."""
    names = sorted(path.name for path in package.iterdir())
    return ["| file | written |", "|---|---|", *(f"| `{name}` | {FILES[name]} |" for name in names)]


# --- exit codes and variables


def exit_codes() -> Lines:
    """All exit codes of the program, and their errors."""
    found = [(0, ""), (program.DEFECT, "any other exception")]
    found += [(kind.exit_code, f"`{kind.__name__}`") for kind in EdgepackError.__subclasses__()]
    found += [(program.Stopped(number).exit_code, "") for number in program.STOPPING]
    lines = ["| code | meaning | raised in Python |", "|---|---|---|"]
    for code, group in groupby(sorted(found), key=lambda pair: pair[0]):
        lines.append(f"| {code} | {OUTCOMES[code]} | {', '.join(name for _, name in group)} |")
    return lines


def variables() -> Lines:
    """Every environment variable that the package reads."""
    names = sorted(set().union(*map(_read_in, _sources())) - INNER)
    return ["| variable | what it does |", "|---|---|", *(f"| `{n}` | {VARIABLES[n]} |" for n in names)]


def _sources() -> list[Path]:
    return sorted(Path(edgepack.__file__).parent.rglob("*.py"))


def _read_in(path: Path) -> set[str]:
    """Strings of a module that look like names of variables, if the module reads the environment."""
    text = path.read_text(encoding="utf-8")
    if "os.environ" not in text and "getenv" not in text:
        return set()
    constants = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
    return {c for c in constants if isinstance(c, str) and re.fullmatch(r"[A-Z]{3,}(_[A-Z]+)*", c)}


READ: dict[str, Callable[[], Lines]] = {
    "commands": commands,
    "exit codes": exit_codes,
    "recipe": recipe_keys,
    "target": target_keys,
    "report": report_fields,
    "variables": variables,
}
"""Tables from the code, by their name in the document."""
BUILT: dict[str, Callable[[Path], Lines]] = {"mappings": mappings, "files": files}
"""Tables from a package, see :func:`built`."""


# --- the document

_BLOCK = re.compile(r"(<!-- table: ([a-z ]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def places(page: str) -> list[str]:
    """The names of the tables in ``page``, in order."""
    return [name for _, name, _, _ in _BLOCK.findall(page)]


def filled(page: str, found: Mapping[str, Lines]) -> str:
    """``page`` with the tables in ``found`` replaced."""

    def new(block: re.Match[str]) -> str:
        lines = found.get(block[2])
        return block[0] if lines is None else "".join([block[1], *(f"{line}\n" for line in lines), block[4]])

    return _BLOCK.sub(new, page)
