"""Failures: a clear message, the right exit code, no partial files, unchanged inputs."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from support import tiny
from support.onnx_models import parse

from edgepack import cli
from edgepack.config.target import list_targets
from edgepack.errors import ExportError
from edgepack.files.atomic import PREFIX, scratch_folder
from edgepack.ir.files import save_model

CONFIG, MATERIAL, EXPORT = 2, 3, 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.project(tmp_path / "project")


Fail = Callable[..., str]


@pytest.fixture
def fail(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fail:
    """Run a build that must fail, in this process; gives the message, and checks the files that are left."""

    def build(code: int, *arguments: str) -> str:
        before = tiny.snapshot(folder)
        monkeypatch.chdir(folder)
        monkeypatch.setattr("sys.argv", ["edgepack", "build", *arguments])
        assert cli.run(cli.app) == code
        assert tiny.snapshot(folder) == before
        assert not list(folder.rglob(f"{PREFIX}*"))
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "Traceback" not in printed.err
        return printed.err

    return build


SAMPLES: dict[str, tuple[dict[str, npt.NDArray[Any]], list[str]]] = {
    "wrong name": ({"y": tiny.samples(4, 1)}, ["'x'", "'y'"]),
    "dtype": ({"x": tiny.samples(4, 1).astype(np.int32)}, ["'x' is int32", "float32", "astype"]),
    "rank": ({"x": np.zeros((4, 1, 1, 16), np.float32)}, ["[1, 1, 16]", "[batch, 16]", "axes"]),
    "shape": ({"x": np.zeros((4, 1, 15), np.float32)}, ["axis 1 must be 16, it is 15"]),
    "NaN": ({"x": np.full((4, 1, 16), np.nan, np.float32)}, ["16 NaN", "sample 0", "[0, 0]"]),
    "infinite": ({"x": np.full((4, 1, 16), -np.inf, np.float32)}, ["16 infinite", "sample 0"]),
    "no samples": ({"x": np.zeros((0, 1, 16), np.float32)}, ["x"]),
}


@pytest.mark.parametrize("part", ["calibration", "evaluation"])
@pytest.mark.parametrize("case", SAMPLES)
def test_samples_that_do_not_fit(case: str, part: str, folder: Path, fail: Fail) -> None:
    arrays, words = SAMPLES[case]
    labels = {"label": np.arange(len(next(iter(arrays.values()))))}
    file = {"calibration": "calib.npz", "evaluation": "eval.npz"}[part]
    np.savez(folder / file, allow_pickle=False, **arrays, **labels)
    message = fail(MATERIAL)
    for word in [*words, file]:
        assert word in message


def test_a_bad_sample_in_the_middle_is_found_when_it_is_read(folder: Path, fail: Fail) -> None:
    x = tiny.samples(9, 1)
    x[6, 0, 3] = np.nan
    np.savez(folder / "calib.npz", x=x)
    message = fail(MATERIAL)
    assert "calib.npz[6]" in message
    assert "1 NaN" in message


def test_an_empty_folder(folder: Path, fail: Fail) -> None:
    (folder / "nothing").mkdir()
    assert "nothing: has no files" in fail(MATERIAL, "--calibration-data", "nothing")


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut short"])
def test_a_broken_sample_file(content: bytes, folder: Path, fail: Fail) -> None:
    (folder / "calib.npz").write_bytes(content)
    assert "calib.npz" in fail(MATERIAL)


def test_a_sample_file_that_is_cut_short(folder: Path, fail: Fail) -> None:
    whole = (folder / "calib.npz").read_bytes()
    (folder / "calib.npz").write_bytes(whole[: len(whole) // 2])
    assert "calib.npz" in fail(MATERIAL)


def test_no_such_samples(folder: Path, fail: Fail) -> None:
    message = fail(MATERIAL, "--calibration-data", "missing.npz")
    assert "missing.npz" in message
    assert "does not exist" in message


def test_no_calibration_data(folder: Path, fail: Fail) -> None:
    assert "--calibration-data" in fail(CONFIG, "model.onnx", "--target", "x86-cpu")


def test_evaluation_samples_that_are_calibration_samples(folder: Path, fail: Fail) -> None:
    np.savez(folder / "eval.npz", x=tiny.samples(24, 1)[20:], label=np.zeros(4, int))
    message = fail(MATERIAL)
    assert "4 evaluation samples are also calibration samples" in message
    assert "calib.npz[20] = eval.npz[0]" in message


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_model_that_is_cut_short(part: float, folder: Path, fail: Fail) -> None:
    model = folder / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[: int(len(whole) * part)])
    assert "model.onnx" in fail(MATERIAL)


def test_a_model_without_its_data_file(folder: Path, fail: Fail) -> None:
    net = parse(tiny.NET, weights={**tiny.weights(), "w1": np.ones((24, 16), np.float32)})
    save_model(net, folder / "model.onnx", external=True)
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-100])
    assert "cut short" in fail(MATERIAL)
    data.unlink()
    assert "does not exist" in fail(MATERIAL)


def test_a_model_that_the_runtime_refuses(folder: Path, fail: Fail) -> None:
    proto = onnx.ModelProto.FromString((folder / "model.onnx").read_bytes())
    proto.graph.node[0].op_type = "Gemmm"
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    assert "Gemmm" in fail(MATERIAL)


def test_a_model_that_is_quantized_already(folder: Path, fail: Fail) -> None:
    body = """net (float[batch, 16] x) => (float[batch, 16] y) {
        scale = Constant <value = float {0.1}> ()
        zero = Constant <value = uint8 {0}> ()
        q = QuantizeLinear (x, scale, zero)
        y = DequantizeLinear (q, scale, zero)
    }"""
    save_model(parse(body), folder / "model.onnx")
    message = fail(MATERIAL)
    assert "quantized already" in message
    assert "QuantizeLinear" in message


def test_no_such_model(folder: Path, fail: Fail) -> None:
    message = fail(MATERIAL, "other.onnx", "--target", "x86-cpu", "--calibration-data", "calib.npz")
    assert "other.onnx" in message


def test_a_wrong_target(folder: Path, fail: Fail) -> None:
    assert "did you mean 'x86-cpu'?" in fail(CONFIG, "--target", "x86cpu")
    assert f"known: {', '.join(sorted(list_targets()))}" in fail(CONFIG, "--target", "toaster")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"calibraton_data": "calib.npz"}, "unknown key 'calibraton_data', did you mean 'calibration_data'?"),
        ({"quantize": {"methd": "static"}}, "unknown key 'quantize.methd', did you mean 'method'?"),
        (
            {"quantize": {"overrides": [{"op_type": ["Gemm"], "method": "float"}]}},
            "unknown key 'quantize.overrides.0.op_type', did you mean 'op_types'?",
        ),
        (
            {"evaluation_data": {"path": "eval.npz", "labels": {"aray": "label"}}},
            "unknown key 'evaluation_data.labels.aray', did you mean 'array'?",
        ),
        ({"images": {"x": {"heigth": 3}}}, "unknown key 'images.x.heigth', did you mean 'height'?"),
        ({"preset": "slow"}, "preset: there is no 'slow', one of fast, balanced, best"),
        ({"calibration": {"observer": "mze"}}, "did you mean 'mse'? (one of minmax, moving_average,"),
        ({"quantize": {"method": "int8"}}, "one of auto, static, dynamic, weight_only, float"),
        ({"bench": {"runs": "many"}}, "bench.runs: should be a valid integer"),
        ({"gate": 3}, "gate: should be a mapping of keys (given: 3)"),
        ({"metric": "top5"}, "metric: there is no 'top5', did you mean 'top1'?"),
        ({"metric": "measures:score"}, "importing 'measures'"),
        ({"quantize": {"overrides": [{"op_types": ["Gem"], "method": "float"}]}}, "did you mean 'Gemm'?"),
        ({"target": ["x86-cpu", "mobile"], "output": "out"}, "put {target} into the path"),
        ({"model": None}, "no model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_recipe(recipe: dict[str, Any], message: str, folder: Path, fail: Fail) -> None:
    tiny.project(folder, **recipe)
    assert message in fail(CONFIG)


def test_several_mistakes_are_reported_at_once(folder: Path, fail: Fail) -> None:
    message = fail(CONFIG, "--preset", "fats", "--method", "statc", "--observer", "mzx")
    for key in ("preset", "quantize.method", "calibration.observer"):
        assert f"{key}: there is no" in message


def test_a_metric_function_that_raises(folder: Path, fail: Fail) -> None:
    (folder / "sums.py").write_text("def score(outputs, labels):\n    return 1 / 0\n")
    message = fail(EXPORT, "--metric", "sums:score")
    assert "metric sums:score: raised ZeroDivisionError: division by zero" in message


def test_a_metric_without_labels(folder: Path, fail: Fail) -> None:
    tiny.project(folder, evaluation_data="eval.npz", metric="accuracy")
    assert "no labels" in fail(MATERIAL)


def test_ranges_of_another_model(folder: Path, tmp_path: Path, fail: Fail) -> None:
    other = tiny.project(tmp_path / "other", seed=5)
    assert tiny.run(other, "build").returncode == 0
    message = fail(EXPORT, "--ranges", str(other / "dist/x86-cpu/ranges.json"))
    assert "measured on another model" in message
    assert "ranges.json" in fail(EXPORT, "--ranges", "calib.npz")


@pytest.mark.parametrize("place", ["model.onnx", "model.onnx/below", "/proc/edgepack-out", "/dev/null/out"])
def test_an_output_that_cannot_be_written(place: str, folder: Path, fail: Fail) -> None:
    message = fail(EXPORT, "-o", place)
    assert place in message
    assert "-o" in message


def test_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="disk is full"), scratch_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_exit_codes_of_the_process(folder: Path) -> None:
    assert tiny.run(folder, "build", "--target", "x").returncode == CONFIG
    assert tiny.run(folder, "build", "--no-such-option").returncode == CONFIG
    assert tiny.run(folder, "build", "--calibration-data", "no.npz").returncode == MATERIAL
    done = tiny.run(folder, "build", "-o", "/proc/x/y")
    assert done.returncode == EXPORT
    assert done.stderr.startswith("edgepack: error: /proc/x/y: cannot be written")


def wait_for(scratch: Path, process: subprocess.Popen[str]) -> None:
    """Wait until the build has written a file of its package."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if any(scratch.glob(f"{PREFIX}*/package/*")):
            return
        time.sleep(0.01)
    raise AssertionError(f"the build wrote nothing: {process.communicate()}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_build_that_is_stopped_leaves_nothing(number: signal.Signals, folder: Path) -> None:
    before = tiny.snapshot(folder)
    process = tiny.start(folder, "build")
    wait_for(folder / "dist", process)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "stopped" in err
    assert "Traceback" not in err
    assert tiny.snapshot(folder) == before
    assert not list((folder / "dist").iterdir())


def test_a_build_that_is_killed_leaves_a_hidden_folder_that_the_next_build_removes(folder: Path) -> None:
    before = tiny.snapshot(folder)
    process = tiny.start(folder, "build")
    wait_for(folder / "dist", process)
    process.kill()
    process.communicate(timeout=30)
    assert {k: v for k, v in tiny.snapshot(folder).items() if "dist" not in k} == before
    assert all(p.name.startswith(PREFIX) for p in (folder / "dist").iterdir())
    assert list((folder / "dist").iterdir())
    with scratch_folder(folder / "dist/x86-cpu") as scratch:
        assert list((folder / "dist").iterdir()) == [scratch]
        with scratch_folder(folder / "dist/other") as second:  # a folder in use is left alone
            assert set((folder / "dist").iterdir()) == {scratch, second}
    assert not list((folder / "dist").iterdir())


def test_a_build_that_fails_leaves_an_older_package_as_it_was(folder: Path, fail: Fail) -> None:
    assert tiny.run(folder, "build").returncode == 0
    tiny.project(folder, gate={"max_metric_drop": 0.1}, metric="broken:score")
    (folder / "broken.py").write_text("def score(outputs, labels):\n    raise KeyError('box')\n")
    assert "KeyError" in fail(EXPORT)
