"""Imports go one way, and a few modules alone may do certain things. The source is read, nothing runs."""

import ast
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
PACKAGE = REPO / "edgepack"
MOST_LINES = 400
MOST_PARAMETERS = 7
MOST_ENTRIES = 26

ROOMS: dict[str, tuple[str, ...]] = {
    "errors": (),
    "results": (),
    "files": ("errors",),
    "ir": ("errors",),
    "config": ("errors", "ir"),
    "pack": ("errors", "results", "ir"),
    "data": ("errors", "ir", "config"),
    "runtime": ("errors", "ir", "config"),
    "graph": ("errors", "ir", "config"),
    "evaluation": ("errors", "results", "ir", "config", "data", "runtime"),
    "calibration": ("errors", "ir", "config", "data", "runtime"),
    "quantization": ("errors", "results", "ir", "config", "data", "graph", "calibration"),
    "report": ("errors", "results", "calibration"),
    "benchmark": ("errors", "results", "ir", "config", "data", "runtime", "calibration", "quantization"),
    "compression": ("errors", "ir", "config", "data", "pack", "graph", "calibration", "quantization"),
    "selection": (
        "errors", "results", "ir", "config", "runtime", "graph", "evaluation", "quantization", "benchmark",
    ),
    "training": (
        "errors", "results", "ir", "config", "data", "graph", "calibration", "quantization", "compression",
    ),
    "export": (
        "errors", "results", "ir", "config", "pack", "runtime", "graph", "evaluation", "calibration",
        "quantization", "benchmark", "selection",
    ),
    "pipeline": (
        "errors", "results", "files", "ir", "config", "pack", "data", "runtime", "graph", "evaluation",
        "calibration", "quantization", "report", "benchmark", "compression", "selection", "training",
        "export",
    ),
    "cli": (
        "errors", "config", "pack", "benchmark", "report", "training", "pipeline",
    ),
    "__main__": ("cli",),
}  # fmt: skip
"""Who may import whom: each room from the floor up, and the rooms below it that it uses.

Any room may read the version from ``edgepack`` itself, which imports nothing.
"""

ONLY_IN: dict[str, tuple[str, ...]] = {
    "onnxscript": ("graph",),
    "typer": ("cli",),
    "rich": ("cli",),
    "torch": ("training",),
    "segno": ("cli",),
    "tensorflow": (),
    "pkg_resources": (),
}
"""The only modules that may import a library."""

SPEAKS = ("benchmark.cold", "benchmark.devices.device_runner")
"""May write to the terminal, besides the command line: programs that answer their parent process."""

LAZY = ("onnxscript", "onnxruntime", "torch", "PIL", "ai_edge_litert", "tflite_runtime")
"""Libraries that take long to import: never while the rooms in ``QUICK`` are imported."""
QUICK = ("__init__", "errors", "results", "config", "report", "files", "cli", "__main__")
"""What `edgepack --help` may import."""

FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(
    path for folder in ("edgepack", "tests", "benchmarks") for path in (REPO / folder).rglob("*.py")
)


def module_name(path: Path) -> str:
    """``edgepack/ir/model.py`` as ``ir.model``; a package by its name, edgepack as ``__init__``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def room_of(module: str) -> str:
    """The module or package directly in edgepack: ``ir`` of ``ir.model``."""
    return module.partition(".")[0]


@cache
def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def run_nodes(tree: ast.AST, *, at_import: bool = False) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``; with ``at_import`` also without function bodies."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield node
        yield from run_nodes(node, at_import=at_import)


def imports(path: Path, *, at_import: bool = False) -> set[str]:
    """Dotted names that a file imports; ``from a import b`` gives ``a.b``, since b may be a module."""
    found: set[str] = set()
    for node in run_nodes(parse(path), at_import=at_import):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full, from edgepack"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@cache
def inner_imports(path: Path) -> frozenset[str]:
    """Modules of edgepack that a file imports, as ``module_name`` gives them."""
    known = {module_name(file) for file in FILES}
    found = set()
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first == "edgepack":
            candidates = [rest, rest.rpartition(".")[0] or "__init__"]
            found |= set([c for c in candidates if c in known][:1])
    return frozenset(found)


def speaks(module: str) -> bool:
    """Whether a module may write to the terminal."""
    return room_of(module) == "cli" or module in SPEAKS


def label(path: Path) -> str:
    return str(path.relative_to(REPO))


def forbidden(module: str, imported: Collection[str]) -> list[str]:
    """Modules among ``imported`` that the room of ``module`` may not import."""
    own = room_of(module)
    allowed = {own, "__init__", *ROOMS.get(own, ())}
    return sorted(other for other in imported if room_of(other) not in allowed)


def circles(needs: Mapping[str, Collection[str]]) -> set[str]:
    """What imports itself through others: all that is left once what has no such imports is taken away."""
    left = {name: set(others) for name, others in needs.items()}
    while gone := {
        name
        for name, others in left.items()
        if not others & left.keys() or all(name not in needed for needed in left.values())
    }:
        left = {name: others for name, others in left.items() if name not in gone}
    return set(left)


def test_there_is_something_to_read() -> None:
    assert len(FILES) > 10
    assert "config.recipe" in inner_imports(PACKAGE / "data" / "images.py")
    assert inner_imports(PACKAGE / "errors.py") == frozenset()


def test_the_table_goes_one_way() -> None:
    """A room is listed after all that it may import."""
    above: set[str] = set()
    for room, below in ROOMS.items():
        assert set(below) <= above, f"{room} may import {set(below) - above}, which are not below it"
        above.add(room)


def test_the_page_has_the_same_table() -> None:
    lines = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines()
    rows = [
        line.strip("| ").split(" | ")
        for line in lines[lines.index("## Packages") :]
        if line.startswith("| `")
    ]
    found = {name.strip("`").removesuffix("/").removesuffix(".py"): imports for name, _, imports in rows}
    expected = {room: ", ".join(below) or "nothing" for room, below in reversed(ROOMS.items())}
    assert list(found.items()) == list(expected.items())


def test_the_package_has_the_rooms_of_the_table_and_nothing_else() -> None:
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    rooms.discard("_targets")  # a copy of targets/ that the wheel has
    files = {"__init__.py", "__main__.py", "errors.py", "results.py", "py.typed"}
    assert entries - rooms - {"_targets"} == files
    assert rooms == {room for room in ROOMS if f"{room}.py" not in files}
    assert len(entries) <= MOST_ENTRIES


@pytest.mark.parametrize("path", FILES, ids=label)
def test_imports_go_down(path: Path) -> None:
    module = module_name(path)
    wrong = forbidden(module, inner_imports(path))
    files = {module_name(file): label(file) for file in FILES}
    assert not wrong, (
        f"{label(path)} imports {', '.join(files[other] for other in wrong)}: "
        f"{room_of(module)} may import {', '.join(ROOMS.get(room_of(module), ())) or 'nothing'}"
    )


def test_an_upward_import_is_noticed() -> None:
    assert forbidden("calibration.run", ["ir.model", "calibration.ranges", "pipeline.build"]) == [
        "pipeline.build"
    ]
    assert forbidden("errors", ["__init__", "ir.model"]) == ["ir.model"]
    assert circles({"a": ["b"], "b": ["c"], "c": ["b"], "d": ["a"]}) == {"b", "c"}


def test_every_allowed_import_is_used() -> None:
    """The table says what is, not what might be."""
    for room, below in ROOMS.items():
        files = [path for path in FILES if room_of(module_name(path)) == room]
        used = {room_of(other) for path in files for other in inner_imports(path)}
        assert set(below) <= used, f"{room} does not import {', '.join(sorted(set(below) - used))}"


def test_no_module_imports_itself_through_others() -> None:
    found = circles({module_name(path): inner_imports(path) for path in FILES})
    assert not found, f"a circle among: {', '.join(sorted(found))}"


def test_every_room_says_what_it_does() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        text = ast.get_docstring(parse(path)) or ""
        assert text, label(path)
        if path.parent.parent == PACKAGE:
            words = text.split()
            assert ("In:" in words and "Out:" in words) or path.parent.name == "files", label(path)


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_stays_in_its_modules(library: str) -> None:
    allowed = ONLY_IN[library]
    importing = {
        module_name(path) for path in FILES if library in {n.partition(".")[0] for n in imports(path)}
    }
    strays = sorted(m for m in importing if not any(fnmatch(room_of(m), pattern) for pattern in allowed))
    assert not strays, (
        f"{library} is imported in {', '.join(strays)}; allowed: {', '.join(allowed) or 'nowhere'}"
    )


@pytest.mark.parametrize("path", FILES, ids=label)
def test_slow_libraries_are_imported_when_needed(path: Path) -> None:
    module = module_name(path)
    at_import = {name.partition(".")[0] for name in imports(path, at_import=True)}
    assert "onnxscript" not in at_import, "takes seconds: import it in the function that uses it"
    if room_of(module) in QUICK:
        assert at_import.isdisjoint(LAZY)


def test_help_is_quick_because_the_command_line_imports_its_commands_late() -> None:
    files = list((PACKAGE / "cli").glob("*.py"))
    assert len(files) > 3
    first_modules = {name for path in files for name in imports(path, at_import=True)}
    names = {room_of(name.partition(".")[2]) for name in first_modules if name.startswith("edgepack.")}
    late = sorted(names & set(ROOMS) - set(QUICK))
    assert not late, f"cli imports {', '.join(late)} before it knows which command is meant"


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if room_of(module_name(path)) != "cli" and module_name(path) not in SPEAKS],
    ids=label,
)
def test_only_the_command_line_prints(path: Path) -> None:
    for node in ast.walk(parse(path)):
        printing = isinstance(node, ast.Name) and node.id == "print"
        writing = isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr")
        line = getattr(node, "lineno", 0)
        assert not (printing or writing), (
            f"{label(path)}:{line}: return it, only the command line writes to the terminal"
        )


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_files_stay_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{label(path)} has {lines} lines, more than {MOST_LINES}: split it"


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names of what a caller gives."""
    given = function.args
    several = [a for a in (given.vararg, given.kwarg) if a is not None]
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, *several)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def is_command(path: Path, function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether typer calls the function with the options of the command line."""
    return room_of(module_name(path)) == "cli" and any(
        "command" in ast.unparse(decorator) for decorator in function.decorator_list
    )


@pytest.mark.parametrize("path", FILES, ids=label)
def test_functions_take_few_parameters(path: Path) -> None:
    """What travels together is a type. Commands of the command line have as many options as they need."""
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_command(path, node):
            continue
        names = parameters(node)
        assert len(names) <= MOST_PARAMETERS, (
            f"{label(path)}:{node.lineno}: {node.name} takes {len(names)} parameters: {', '.join(names)}"
        )


def test_many_parameters_are_noticed() -> None:
    function = ast.parse("def f(self, a, /, b, *c, d=1, **e): ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    assert parameters(function) == ["a", "b", "d", "c", "e"]
