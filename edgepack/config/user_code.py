"""User-defined functions, named ``module:function`` in a recipe."""

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgepack.errors import ConfigError, did_you_mean

_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_reference(text: str) -> bool:
    """Whether ``text`` has the format ``module:function`` (``package.module:function``)."""
    return _REFERENCE.fullmatch(text) is not None


def load_function(reference: str, base: Path) -> Callable[..., Any]:
    """The function that ``reference`` (``module:function``) names.

    ``base``, the folder of the recipe, is first on ``sys.path`` during the import, and only then.

    Raises:
        ConfigError: no such module or function, the import fails, or another module of the same name is
            already loaded.
    """
    module_name, _, name = reference.partition(":")
    base = base.resolve()
    importlib.invalidate_caches()
    sys.path.insert(0, str(base))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise ConfigError(
            f"{reference}: importing {module_name!r} with {base} on the path failed with "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(str(base))
    _refuse_another_module(module_name, getattr(module, "__file__", None), base)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        what = "is not a function" if hasattr(module, name) else f"is not in {module_name}"
        raise ConfigError(f"{reference}: {name!r} {what}, {did_you_mean(name, known)}")
    return function  # type: ignore[no-any-return]


def _refuse_another_module(module_name: str, found: str | None, base: Path) -> None:
    """Refuse a module of the same name from another file: Python would silently use the one loaded first."""
    stem = base.joinpath(*module_name.split("."))
    meant = [p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.is_file()]
    if meant and Path(found or "").resolve() not in {p.resolve() for p in meant}:
        raise ConfigError(
            f"{meant[0]}: another module named {module_name!r} is already loaded from {found}; "
            "rename the file"
        )
