"""``bench --web`` in Chromium at a phone's width: float and int8 run, and the report has the figures.

Run with ``pytest -m rig`` after ``python tests/rig/browser.py --install`` (as root, once); npm
fetches onnxruntime-web.
"""

import json
import subprocess
from pathlib import Path

import pytest
from rig.browser import look, missing
from support import tiny

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "calibration_data" / "digits.onnx"
HOST_FLOOR_DB = 30.0
"""WebAssembly rounds some additions differently by one, and 8 bits have about 40 dB."""
pytestmark = [
    pytest.mark.rig,
    pytest.mark.skipif(bool(missing()), reason="no browser: " + "; ".join(missing())),
]


def test_a_browser_runs_and_posts_back(tmp_path: Path) -> None:
    built = tmp_path / "built"
    assert tiny.run(ROOT, "build", "-o", str(built), "--preset", "fast").returncode == 0
    options = ["--web", "--runs", "10", "--threads", "2", "--data", "calibration_data/calibration.npz"]
    with tiny.start(ROOT, "bench", str(MODEL), str(built), *options) as process:
        try:
            assert process.stderr is not None
            address = process.stderr.readline().removeprefix("open ").strip()
            wrong = look(address.rstrip("/")[:-3] + "xyz/", 390, "light", tmp_path / "wrong.png")
            assert wrong["status"] == 403 and "wrong token" in wrong["text"]
            ready, end = "#start:not([disabled])", "[data-state]"
            found = look(address, 390, "light", tmp_path / "web.png", press=ready, until=end)
            text, _ = process.communicate(timeout=60)
        except (subprocess.SubprocessError, AssertionError):
            process.kill()
            raise
    assert process.returncode == 0
    assert found["messages"] == found["violations"] == []
    assert found["isolated"] and found["scroll_width"] <= 390
    assert "Done: the results are in" in found["text"] and f"added to the report in {built}" in text
    (run,) = json.loads((built / "report.json").read_text())["devices"]
    assert run["threads"] == 2 and run["device"].startswith("web, Chrome")
    assert [m["model"] for m in run["models"]] == ["original", "onnx"]
    for figures in run["models"]:
        assert figures["p50_ms"] > 0
        assert figures["exact"] or figures["sqnr_db"] > HOST_FLOOR_DB
    page = look((built / "report.html").as_uri(), 390, "dark", tmp_path / "report.png")
    assert "On devices" in page["text"] and page["messages"] == page["violations"] == []
    assert page["scroll_width"] <= 390
