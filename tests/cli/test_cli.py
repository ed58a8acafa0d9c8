"""The command line: its imports, output and exit codes."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import tiny

from edgepack.cli import run

COMMANDS = (
    "build", "inspect", "plan", "check", "bench", "report", "compare", "tune", "pack", "unpack", "targets",
)  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with its package in dist/x86-cpu."""
    folder = tiny.project(tmp_path_factory.mktemp("cli") / "project", metric="accuracy")
    done = tiny.run(folder, "build")
    assert done.returncode == 0, done.stderr
    return folder


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, edgepack.cli; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=tiny.environment(), capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "typer" in loaded
    heavy = {"onnxruntime", "onnx", "onnx_ir", "onnxscript", "numpy", "pydantic", "yaml", "rich", "PIL"}
    assert not loaded & heavy


def test_help_is_quick(tmp_path: Path) -> None:
    """Under 300 ms on an idle machine; here relative to a bare interpreter, the best of several.

    In CPU time, which does not include other programs.
    """

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def best(*command: str) -> float:
        times = []
        for _ in range(5):
            before = spent()
            subprocess.run(command, env=tiny.environment(), capture_output=True, check=True)
            times.append(spent() - before)
        return min(times)

    bare = best(sys.executable, "-c", "pass")
    assert best(sys.executable, "-m", "edgepack", "--help") < bare + 0.5


def test_bench_takes_a_package_and_says_what_is_not_there(built: Path) -> None:
    done = tiny.run(built, "bench", "model.onnx", "dist/x86-cpu", "--runs", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert [row["model"] for row in json.loads(done.stdout)] == ["model.onnx", "dist/x86-cpu/model.onnx"]
    done = tiny.run(built, "bench", "model.onnx", "nix.ort")
    assert done.returncode == 3
    assert "nix.ort: no such file" in done.stderr


def test_pack_and_unpack(built: Path, tmp_path: Path) -> None:
    model = built / "dist" / "x86-cpu" / "model.onnx"
    done = tiny.run(tmp_path, "pack", str(model), "-o", "m.epk", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["packed_bytes"] == (tmp_path / "m.epk").stat().st_size
    assert tiny.run(tmp_path, "unpack", "m.epk", "-o", "back.onnx").returncode == 0
    assert (tmp_path / "back.onnx").read_bytes() == model.read_bytes()
    (tmp_path / "m.epk").write_bytes((tmp_path / "m.epk").read_bytes()[:-20])
    done = tiny.run(tmp_path, "unpack", "m.epk", "-o", "back.onnx")
    assert done.returncode == 3 and "cut short" in done.stderr


def test_help_names_every_command(tmp_path: Path) -> None:
    done = tiny.run(tmp_path, "--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert command in done.stdout
        assert tiny.run(tmp_path, command, "--help").returncode == 0


def test_version(tmp_path: Path) -> None:
    assert tiny.run(tmp_path, "--version").stdout.startswith("edgepack 0.")


def test_build_without_arguments_reads_the_recipe_here(built: Path, tmp_path: Path) -> None:
    assert (built / "dist/x86-cpu/model.onnx").is_file()
    assert (built / "dist/x86-cpu/report.txt").read_text().startswith("PASS  model.onnx for x86-cpu: ")
    done = tiny.run(tmp_path, "build")
    assert done.returncode == 2
    assert "edgepack.yaml" in done.stderr


def test_a_model_named_on_the_command_line_does_not_take_the_recipe_here(built: Path) -> None:
    done = tiny.run(built, "build", "model.onnx", "-t", "x86-cpu")
    assert done.returncode == 2
    assert "no calibration data" in done.stderr


def test_check_takes_the_recipe_here_only_for_its_own_model(built: Path) -> None:
    done = tiny.run(built, "check", "model.onnx", "dist/x86-cpu/model.onnx")
    assert "accuracy" in done.stdout
    (built / "other.onnx").write_bytes((built / "model.onnx").read_bytes())
    done = tiny.run(built, "check", "other.onnx", "dist/x86-cpu/model.onnx")
    assert done.returncode == 2
    assert "no samples to check on" in done.stderr
    done = tiny.run(built, "check", "other.onnx", "dist/x86-cpu/model.onnx", "--data", "calib.npz")
    assert done.returncode == 0, done.stderr
    assert "accuracy" not in done.stdout


def test_plan_without_a_model_is_for_the_target_of_the_recipe(tmp_path: Path) -> None:
    folder = tiny.project(tmp_path / "plan", target="no-such-target")
    assert "no-such-target" in tiny.run(folder, "plan").stderr
    assert tiny.run(folder, "plan", "model.onnx").returncode == 0


def test_modules_that_look_like_commands_are_commands(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgepack.cli", "--version"]
    done = subprocess.run(
        command, cwd=tmp_path, env=tiny.environment(), capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("edgepack 0.")


def test_two_targets_in_one_call(tmp_path: Path) -> None:
    folder = tiny.project(tmp_path / "two")
    done = tiny.run(folder, "build", "-t", "x86-cpu", "-t", "arm-cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert [report["target"] for report in json.loads(done.stdout)] == ["x86-cpu", "arm-cpu"]
    for name in ("x86-cpu", "arm-cpu"):
        written = json.loads((folder / "dist" / name / "report.json").read_text())
        assert written["target"] == name
        assert written["passed"]


def test_build_json(tmp_path: Path) -> None:
    folder = tiny.project(tmp_path / "json")
    done = tiny.run(folder, "build", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((folder / "dist/x86-cpu/report.json").read_text())


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect",),
        ("inspect", "--target", "x86-cpu"),
        ("plan", "--target", "mobile"),
        ("check", "model.onnx", "dist/x86-cpu/model.onnx"),
        ("bench", "model.onnx", "dist/x86-cpu/model.onnx", "--runs", "5", "--ops"),
        ("targets",),
        ("targets", "mobile"),
    ],
    ids=" ".join,
)
def test_json_of_each_command_parses(arguments: tuple[str, ...], built: Path) -> None:
    done = tiny.run(built, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    text = tiny.run(built, *arguments)
    assert text.returncode == 0
    assert text.stdout


def test_schemas(tmp_path: Path) -> None:
    recipe = json.loads(tiny.run(tmp_path, "targets", "--schema", "recipe").stdout)
    assert "calibration_data" in recipe["properties"]
    target = json.loads(tiny.run(tmp_path, "targets", "--schema", "target").stdout)
    assert "kernels" in target["properties"]
    assert tiny.run(tmp_path, "targets", "--schema", "gate").returncode == 2


def test_a_gate_that_is_not_met_keeps_the_package(tmp_path: Path) -> None:
    folder = tiny.project(tmp_path / "gate", gate={"min_sqnr_db": 90, "max_bytes": 1_000_000})
    done = tiny.run(folder, "build")
    assert done.returncode == 1
    assert "the package is kept" in done.stderr
    lines = (folder / "dist/x86-cpu/report.txt").read_text().splitlines()
    assert lines[0].startswith("GATE FAILED  model.onnx")
    (failed,) = [line for line in lines if "FAIL " in line]
    assert "fidelity in dB at least 90" in failed
    assert any(line.startswith("  ok ") and "bytes at most" in line for line in lines)
    report = json.loads((folder / "dist/x86-cpu/report.json").read_text())
    assert not report["passed"]
    assert [line["passed"] for line in report["gate"]] == [False, True]
    assert (folder / "dist/x86-cpu/model.onnx").is_file()


def test_data_as_a_plain_path_with_changes_from_the_command_line(tmp_path: Path) -> None:
    folder = tiny.project(tmp_path / "plain", calibration_data="calib.npz", evaluation_data="eval.npz")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = tiny.run(elsewhere, "build", "-r", str(folder / "edgepack.yaml"), "--samples", "6", "--json")
    assert done.returncode == 0, done.stderr
    assert (folder / "dist/x86-cpu/model.onnx").is_file()
    ranges = json.loads((folder / "dist/x86-cpu/ranges.json").read_text())
    assert ranges["samples"] == 6
    assert not list(elsewhere.iterdir())


def test_a_data_function_is_looked_for_beside_the_recipe(tmp_path: Path) -> None:
    folder = tiny.project(tmp_path / "function", calibration_data="feeds:draw")
    (folder / "feeds.py").write_text(
        "import numpy as np\n\ndef draw():\n    rng = np.random.default_rng(7)\n"
        "    for _ in range(5):\n        yield {'x': rng.normal(size=(1, 16)).astype('float32')}\n"
    )
    done = tiny.run(tmp_path, "build", "-r", "function/edgepack.yaml")
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "dist/x86-cpu/ranges.json").read_text())["samples"] == 5


def test_the_built_model_runs_on_more_rows_than_it_was_calibrated_with(built: Path) -> None:
    import onnxruntime as ort

    session = ort.InferenceSession(str(built / "dist/x86-cpu/model.onnx"), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.ones((7, 16), np.float32)})
    assert y.shape == (7, 4)


def test_a_defect_has_an_exit_code_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise KeyError("inner")

    assert run(broken) == 70
    assert "KeyError" in capsys.readouterr().err


@pytest.mark.parametrize("budget", ["soon", "-5", "5h", "1m30s"])
def test_a_budget_is_seconds_or_minutes(budget: str, tmp_path: Path) -> None:
    done = tiny.run(tiny.project(tmp_path / "p"), "build", f"--budget={budget}")
    assert done.returncode == 2
    assert f"--budget {budget}: give seconds or minutes, as 90s or 5m" in done.stderr


def test_a_recipe_where_a_model_belongs(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("model: a.onnx\n")
    done = tiny.run(tmp_path, "build", "my.yaml", "--target", "x86-cpu")
    assert done.returncode == 2
    assert "give it with --recipe my.yaml" in done.stderr
