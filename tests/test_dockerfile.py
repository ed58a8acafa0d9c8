"""The Dockerfile says what it means: files that exist, stages in order, commands and options that are real.

No engine runs here. What the RUN lines do is done by hand in the continuous integration: a wheel, installed
into an empty environment, used outside of the checkout.
"""

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parent.parent
IN_SLIM_IMAGE = {"pip", "useradd", "install"}
"""Programs of the base image that RUN lines may use: Python's, and Debian's essential ones."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: ``words`` without the flags, which are ``--name=value``."""

    name: str
    words: tuple[str, ...]
    flags: dict[str, str]
    text: str


def parse(text: str) -> list[Instruction]:
    """Instructions of a Dockerfile, in order; comments gone, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        name, _, rest = line.strip().partition(" ")
        if not name:
            continue
        flags: dict[str, str] = {}
        words = rest.split()
        while name in ("COPY", "FROM") and words[0].startswith("--"):
            key, _, value = words.pop(0).partition("=")
            flags[key] = value
        found.append(Instruction(name, tuple(words), flags, rest.strip()))
    return found


@dataclass(frozen=True, slots=True)
class Stage:
    """From one FROM to the next."""

    name: str
    base: str
    body: tuple[Instruction, ...]


def stages_of(instructions: Sequence[Instruction]) -> list[Stage]:
    """Stages in order; one without a name is called by its number."""
    starts = [i for i, one in enumerate(instructions) if one.name == "FROM"]
    found = []
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(instructions)], strict=True)):
        words = instructions[start].words
        name = words[2] if len(words) == 3 and words[1].upper() == "AS" else str(number)
        found.append(Stage(name, words[0], tuple(instructions[start + 1 : end])))
    return found


INSTRUCTIONS = parse((REPO / "Dockerfile").read_text())
STAGES = {stage.name: stage for stage in stages_of(INSTRUCTIONS)}
PROJECT: dict[str, Any] = tomllib.loads((REPO / "pyproject.toml").read_text())


def all_of(kind: str) -> list[tuple[Stage, Instruction]]:
    """Instructions of one kind with their stages."""
    return [(stage, one) for stage in STAGES.values() for one in stage.body if one.name == kind]


def lineage(stage: Stage) -> list[Instruction]:
    """Instructions that a stage inherits and its own, oldest first."""
    inherited = lineage(STAGES[stage.base]) if stage.base in STAGES else []
    return [*inherited, *stage.body]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps ``path`` from the engine."""
    lines = (REPO / ".dockerignore").read_text().splitlines()
    patterns = [line.strip().removeprefix("**/") for line in lines if line.strip() and line[0] != "#"]
    return any(fnmatch(part, pattern) for part in Path(path).parts for pattern in patterns)


def last(stage: Stage, kind: str) -> Instruction | None:
    """The instruction of that kind which is in force at the end of a stage."""
    return next((one for one in reversed(lineage(stage)) if one.name == kind), None)


def help_of(*words: str) -> str:
    """What ``edgepack ... --help`` prints."""
    code = "import sys; from edgepack.cli import main; sys.argv[0] = 'edgepack'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--help"],
        check=True,
        capture_output=True,
        text=True,
        env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", "PYTHONPATH": ":".join(sys.path)},
    )
    return done.stdout


def test_the_parser_joins_lines_and_drops_comments() -> None:
    text = "# a\nFROM x AS y\n\nRUN a \\\n    # within\n    && b\nCOPY --from=y --chown=u:u . /z\n"
    assert [(one.name, one.words, one.flags) for one in parse(text)] == [
        ("FROM", ("x", "AS", "y"), {}),
        ("RUN", ("a", "&&", "b"), {}),
        ("COPY", (".", "/z"), {"--from": "y", "--chown": "u:u"}),
    ]


def test_stages_stand_on_earlier_stages_or_slim_images() -> None:
    seen: list[str] = []
    for stage in STAGES.values():
        assert stage.base in (*seen, "scratch", "python:${PYTHON}-slim")
        for one in stage.body:
            if "--from" in one.flags:
                assert one.flags["--from"] in seen, f"{stage.name} copies from {one.flags['--from']}"
        seen.append(stage.name)
    assert {"build", "runtime", "package", "dist"} <= set(seen)
    assert list(STAGES.values())[-1].base == "runtime", "`docker build .` gives the command line"


def test_the_python_of_the_images_is_one_that_edgepack_supports() -> None:
    chosen = next(one.words[0] for one in INSTRUCTIONS if one.name == "ARG").removeprefix("PYTHON=")
    assert f"Programming Language :: Python :: {chosen}" in PROJECT["project"]["classifiers"]


@pytest.mark.parametrize(
    "source",
    [source for _, one in all_of("COPY") if "--from" not in one.flags for source in one.words[:-1]],
)
def test_copied_files_exist_and_reach_the_engine(source: str) -> None:
    assert (REPO / source).exists()
    assert not ignored(source)


def test_the_wheel_finds_all_that_pyproject_names() -> None:
    copied = {source for one in STAGES["build"].body if one.name == "COPY" for source in one.words[:-1]}
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert needed | {*wheel["packages"], *wheel["force-include"]} <= copied


@pytest.mark.parametrize(
    "path", ["edgepack.yaml", "calibration_data", "edgepack/cli/program.py", "targets/mobile.yaml"]
)
def test_the_example_reaches_the_engine(path: str) -> None:
    assert (REPO / path).exists()
    assert not ignored(path)


@pytest.mark.parametrize("path", [".git", ".venv", "dist", "tests/test_example.py", "edgepack/__pycache__"])
def test_what_no_image_needs_stays_away(path: str) -> None:
    assert ignored(path)


@pytest.mark.parametrize("name", [name for name, stage in STAGES.items() if last(stage, "ENTRYPOINT")])
def test_images_do_not_run_as_root(name: str) -> None:
    user = last(STAGES[name], "USER")
    assert user is not None
    assert user.words[0].partition(":")[0] not in ("root", "0")
    made = [one.text for one in lineage(STAGES[name]) if one.name == "RUN" and "useradd" in one.text]
    assert any(text.split("useradd", 1)[1].split("&&")[0].split()[-1] == user.words[0] for text in made)


def test_the_entry_point_is_installed_by_the_wheel() -> None:
    entry = last(STAGES["runtime"], "ENTRYPOINT")
    assert entry is not None
    assert entry.text == '["edgepack"]'
    assert "edgepack" in PROJECT["project"]["scripts"]


def commands() -> list[list[str]]:
    """Every command of every RUN line, as words."""
    lines = [re.sub(r"\$\{\w+:\+(.*?)\}", r"\1", one.text) for _, one in all_of("RUN")]
    return [shlex.split(command) for line in lines for command in line.split("&&")]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_and_their_options_exist(command: list[str]) -> None:
    assert command[0] in IN_SLIM_IMAGE | set(PROJECT["project"]["scripts"])
    if command[0] == "edgepack":
        told = help_of(command[1])
        for option in (word for word in command if word.startswith("--")):
            assert re.search(rf"{option}\b", told), f"edgepack {command[1]} has no {option}"
    if command[0] == "pip":
        done = subprocess.run(
            [sys.executable, "-m", "pip", command[1], "--help"], check=True, capture_output=True, text=True
        )
        for option in (word.partition("=")[0] for word in command if word.startswith("--")):
            assert option in done.stdout, f"pip {command[1]} has no {option}"
