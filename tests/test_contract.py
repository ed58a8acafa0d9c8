"""docs/contract.md says what the code has: a name that is changed or removed is noticed here.

``EDGEPACK_CONTRACT=write pytest tests/test_contract.py`` writes the tables again. Look at the diff: scripts
of users may hold on to each line that changes or goes.
"""

import difflib
import os
from pathlib import Path

import pytest
from support import contract

from edgepack.benchmark.bench import ColdStart

PAGE = Path(__file__).parent.parent / "docs" / "contract.md"
WRITE = "EDGEPACK_CONTRACT"


def compare(name: str, lines: contract.Lines) -> None:
    """The table in the page is ``lines``; where the user asks for it, it becomes so."""
    written = PAGE.read_text(encoding="utf-8")
    expected = contract.filled(written, {name: lines})
    if os.environ.get(WRITE) == "write":
        PAGE.write_text(expected, encoding="utf-8")
        return
    diff = difflib.unified_diff(
        written.splitlines(), expected.splitlines(), "docs/contract.md", "the code", n=0, lineterm=""
    )
    assert written == expected, "\n".join(
        ("the contract changes:", *diff, f"if that is meant: {WRITE}=write pytest tests/test_contract.py")
    )


@pytest.mark.parametrize("name", contract.READ)
def test_the_page_says_what_the_code_has(name: str) -> None:
    compare(name, contract.READ[name]())


def test_the_page_says_what_a_build_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Cold starts take processes of their own; tests/benchmark has them.
    monkeypatch.setattr("edgepack.benchmark.bench.cold_start", lambda *_: ColdStart(1.0, 1_000_000))
    package = contract.built(tmp_path)
    for name, lines in contract.BUILT.items():
        compare(name, lines(package))


def test_every_table_has_one_place() -> None:
    found = contract.places(PAGE.read_text(encoding="utf-8"))
    assert sorted(found) == sorted([*contract.READ, *contract.BUILT])
    page = "a\n<!-- table: one -->\nold\n<!-- end -->\nb\n<!-- table: two -->\nkept\n<!-- end -->\n"
    assert contract.places(page) == ["one", "two"]
    assert contract.filled(page, {"one": ["1", "2"]}) == page.replace("old\n", "1\n2\n")


def test_names_are_read_at_every_depth() -> None:
    recipe, report = contract.recipe_keys(), contract.report_fields()
    assert '| `images.*.layout` | `nchw` or `nhwc` | `"nchw"` |' in recipe
    assert "| `quantize.tune.sparsify.every` | integer ≥ 1 | `20` |" in recipe
    assert "| `model` | path | required |" in recipe
    assert "| `evaluation_data` | mapping or null, keys as in `calibration_data` | `null` |" in recipe
    assert "| `devices[].models[].sqnr_db` | number or null |" in report
    assert report[2] == "| `schema_version` | integer |"
    commands = contract.commands()
    assert "| `edgepack compare` | `DIR` | path | required |" in commands
    assert "| `edgepack build` | `--target`, `-t` | text, repeatable |  |" in commands
