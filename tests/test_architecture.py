"""Imports go one way, and a few modules alone may do certain things. The source is read, nothing runs."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
PACKAGE = REPO / "edgepack"
MOST_LINES = 450

LAYERS: dict[str, tuple[str, ...]] = {
    "vocabulary": (
        "__init__",
        "errors",
        "scheme",
        "numerics",
        "resampling",
        "strict",
        "target",
        "config*",
        "lines",
        "report*",
    ),
    "material": (
        "model",
        "tied",
        "data",
        "feeds",
        "labels",
        "sources",
        "images",
        "views",
        "metrics",
        "usercode",
    ),
    "stages": (
        "normalize",
        "half",
        "rules*",
        "widen",
        "prepare",
        "calibrate",
        "quantize",
        "export",
        "measure",
        "pack",
        "channels",
        "passes",
        "tune",
    ),
    "choice": (
        "measurements",
        "trials",
        "tried",
        "search",
        "choose",
        "gate",
        "explain",
        "terms",
        "material",
        "tflite_*",
        "artifacts",
        "waterfall",
        "two_builds",
        "page",
    ),
    "line": ("scratch", "clock", "parts", "storing", "build", "compare", "on_device", "inspect", "pool*"),
    "command line": ("cli", "__main__"),
}
"""Modules and packages by layer, lowest first. A module imports from its own layer and from lower ones."""

ONLY_IN: dict[str, tuple[str, ...]] = {
    "onnxscript": ("normalize", "rules*"),
    "typer": ("cli",),
    "rich": ("cli",),
    "torch": ("tune",),
    "segno": ("cli",),
    "tensorflow": (),
    "pkg_resources": (),
}
"""The only modules that may import a library."""

SPEAKS = ("measure.cold", "measure.devices.device_runner")
"""May write to the terminal, besides the command line: programs that answer their parent process."""

LAZY = ("onnxscript", "onnxruntime", "torch", "PIL", "ai_edge_litert", "tflite_runtime")
"""Libraries that take long to import: never while vocabulary or the command line are imported."""

FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(
    path for folder in ("edgepack", "tests", "benchmarks") for path in (REPO / folder).rglob("*.py")
)


def module_name(path: Path) -> str:
    """``edgepack/ir/model.py`` as ``ir.model``; a package by its name, edgepack as ``__init__``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def part_of(module: str) -> str:
    """The module or package directly in edgepack: ``quantize`` of ``quantize.plan``."""
    return module.partition(".")[0]


def layer_of(module: str) -> int:
    """The place of a module's layer, 0 the lowest; -1 when no layer names it."""
    for place, patterns in enumerate(LAYERS.values()):
        if any(fnmatch(part_of(module), pattern) for pattern in patterns):
            return place
    return -1


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
    return part_of(module) == "cli" or module in SPEAKS


def label(path: Path) -> str:
    return str(path.relative_to(REPO))


def test_there_is_something_to_read() -> None:
    assert len(FILES) > 10
    assert "config" in inner_imports(PACKAGE / "images.py")
    assert inner_imports(PACKAGE / "errors.py") == frozenset()


@pytest.mark.parametrize("path", FILES, ids=label)
def test_imports_go_down(path: Path) -> None:
    module = module_name(path)
    place = layer_of(module)
    assert place >= 0, f"{module} has no layer yet: give it one in LAYERS"
    up = sorted(other for other in inner_imports(path) if layer_of(other) > place)
    assert not up, f"{module} ({list(LAYERS)[place]}) imports from a higher layer: {', '.join(up)}"


def test_no_part_imports_itself_through_others() -> None:
    """Nothing calls backwards: modules and packages directly in edgepack can be put in one order."""
    needs: dict[str, set[str]] = {}
    for path in FILES:
        part = part_of(module_name(path))
        needs.setdefault(part, set()).update({part_of(other) for other in inner_imports(path)} - {part})
    while outside := {
        part
        for part, others in needs.items()
        if not others & needs.keys() or all(part not in needs[other] for other in needs)
    }:
        needs = {part: others for part, others in needs.items() if part not in outside}
    assert not needs, f"a circle among: {', '.join(sorted(needs))}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_stays_in_its_modules(library: str) -> None:
    allowed = ONLY_IN[library]
    importing = {
        module_name(path) for path in FILES if library in {n.partition(".")[0] for n in imports(path)}
    }
    strays = sorted(m for m in importing if not any(fnmatch(part_of(m), pattern) for pattern in allowed))
    assert not strays, (
        f"{library} is imported in {', '.join(strays)}; allowed: {', '.join(allowed) or 'nowhere'}"
    )


@pytest.mark.parametrize("path", FILES, ids=label)
def test_slow_libraries_are_imported_when_needed(path: Path) -> None:
    module = module_name(path)
    at_import = {name.partition(".")[0] for name in imports(path, at_import=True)}
    assert "onnxscript" not in at_import, "takes seconds: import it in the function that uses it"
    if layer_of(module) in (0, layer_of("cli")):
        assert at_import.isdisjoint(LAZY)


def test_help_is_quick_because_the_command_line_imports_its_commands_late() -> None:
    files = list((PACKAGE / "cli").glob("*.py"))
    assert len(files) > 3
    first_modules = {name for path in files for name in imports(path, at_import=True)}
    names = {part_of(name.partition(".")[2]) for name in first_modules if name.startswith("edgepack")}
    late = sorted(name for name in names - {"cli"} if layer_of(name) > 0)
    assert not late, f"cli imports {', '.join(late)} before it knows which command is meant"


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if part_of(module_name(path)) != "cli" and module_name(path) not in SPEAKS],
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
