"""Strict YAML: a mapping becomes a frozen, typed model; errors name the key."""

import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from edgepack.errors import ConfigError, did_you_mean


class Strict(BaseModel):
    """Base of all configuration: immutable; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


S = TypeVar("S", bound=Strict)


class _UniqueKeys(yaml.SafeLoader):
    """Refuses duplicate keys; PyYAML silently keeps the last one."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is given twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no file, not YAML, a key given twice, or not a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {type(content).__name__}, a mapping of keys was expected")
    return content


def parse(kind: type[S], content: dict[str, Any], where: str) -> S:
    """``content`` validated as a ``kind``.

    Raises:
        ConfigError: one line per key that is unknown ("did you mean"), missing or of a wrong type.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(kind, problem) for problem in error.errors(include_url=False))
        raise ConfigError(f"{where}: " + "; ".join(lines)) from error


def _explain(kind: type[BaseModel], problem: Any) -> str:
    *_, last = problem["loc"] or ("",)
    unknown = problem["type"] == "extra_forbidden"
    place = [part for part in problem["loc"] if (unknown and part is last) or not _is_tag(part)]
    dotted = ".".join(map(str, place)) if place else "(top level)"
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key {dotted!r}, {did_you_mean(str(last), _fields_at(kind, place[:-1]))}"
        case "missing":
            return f"the key {dotted!r} is missing"
        case "literal_error" | "enum":
            choices = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
            hint = did_you_mean(str(problem["input"]), choices)
            listed = f"one of {', '.join(choices)}"
            hint = f"{hint} ({listed})" if hint.startswith("did you mean") else listed
            return f"{dotted}: there is no {problem['input']!r}, {hint}"
        case "value_error":
            return f"{dotted}: {problem['ctx']['error']}"
        case "model_type" | "dict_type":
            return f"{dotted}: should be a mapping of keys (given: {problem['input']!r})"
    return f"{dotted}: {problem['msg'].removeprefix('Input ')} (given: {problem['input']!r})"


def _is_tag(part: int | str) -> bool:
    """Whether a part of an error's location is no key of the file: pydantic also names union members."""
    return isinstance(part, str) and (
        part in ("float", "int", "str", "bool") or bool(re.search(r"[\[(]", part))
    )


def _fields_at(kind: type[BaseModel], place: list[int | str]) -> list[str]:
    """Names of the fields of the nested model at ``place``."""
    for part in place:
        field = kind.model_fields.get(str(part))
        if field is None:
            continue  # an index or a mapping key: the model of its annotation was found before
        nested = _nested_models(field.annotation)
        if nested:
            kind = nested[0]
    return list(kind.model_fields)


def _nested_models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in getattr(annotation, "__args__", ()) for m in _nested_models(arg)]
