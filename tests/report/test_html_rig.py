"""report.html of a real build in a real browser: drawn, quiet, readable on a phone, in light and dark.

Run with ``pytest -m rig`` after ``python tests/rig/browser.py --install`` (as root, once).
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rig.browser import look, missing

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.rig,
    pytest.mark.skipif(bool(missing()), reason="no browser: " + "; ".join(missing())),
]


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped example with passes, so that the report has steps to draw."""
    folder = tmp_path_factory.mktemp("page")
    recipe = yaml.safe_load((ROOT / "edgepack.yaml").read_text())
    recipe["model"] = str(ROOT / recipe["model"])
    for part in ("calibration_data", "evaluation_data"):
        recipe[part]["path"] = str(ROOT / recipe[part]["path"])
    recipe["passes"] = [{"prune": {"sparsity": 0.3}}, {"share": {"within": 0.001}}]
    recipe["gate"] = {"max_metric_drop": 0.5}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    built = folder / "built"
    recipe_path = str(folder / "recipe.yaml")
    command = ["build", "-r", recipe_path, "-o", str(built), "--preset", "fast"]
    subprocess.run([sys.executable, "-m", "edgepack", *command], check=True)
    return built


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(package: Path, width: int, scheme: str, tmp_path: Path) -> None:
    page = package / "report.html"
    found = look(page.as_uri(), width, scheme, tmp_path / "page.png")
    assert page.stat().st_size < 6_000_000
    assert found["messages"] == []
    assert found["scroll_width"] <= width
    assert found["violations"] == []
    assert [c for c in found["charts"] if not (c["width"] > 100 and c["height"] > 20 and c["marks"])] == []
    titles = {c["title"] for c in found["charts"]}
    assert {"Bytes on disk", "Latency, median", "Accuracy", "Histogram", "Parity"} <= titles
    steps = next(c for c in found["charts"] if c["title"] == "Bytes on disk")
    assert steps["marks"] >= 4  # original, two passes, quantized
    assert "share" in found["text"] and "prune" in found["text"]


def test_two_builds_in_a_browser(package: Path, tmp_path: Path) -> None:
    page = tmp_path / "both.html"
    other = tmp_path / "an/efficientnet_lite0_int8_per_channel_and_pruned_to_thirty_percent"
    shutil.copytree(package, other)
    compared = ["compare", str(package), str(other), "--html", str(page)]
    subprocess.run([sys.executable, "-m", "edgepack", *compared], check=True, stdout=subprocess.DEVNULL)
    found = look(page.as_uri(), 390, "dark", tmp_path / "both.png")
    assert found["messages"] == found["violations"] == []
    assert found["scroll_width"] <= 390
    assert len(found["charts"]) > 5 and all(c["marks"] == 2 for c in found["charts"])
