"""The example that a checkout builds by default: complete, small, accurate, honestly divided."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgepack.config.recipe import Recipe, load_recipe
from edgepack.config.target import load_target
from edgepack.data.samples import check_disjoint, open_samples
from edgepack.evaluation.metrics import resolve_metric
from edgepack.ir.files import load_model
from edgepack.ir.inputs import input_specs

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "calibration_data"
EVALUATION = 300
CALIBRATION = 100


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(ROOT / "edgepack.yaml", {})


@pytest.fixture(scope="module")
def model(recipe: Recipe) -> ir.Model:
    return load_model(recipe.model)


def arrays(name: str) -> dict[str, npt.NDArray[np.generic]]:
    with np.load(FOLDER / name, allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


def test_the_folder_is_small_and_says_where_its_data_come_from() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == {"README.md", "calibration.npz", "digits.onnx", "evaluation.npz"}
    assert sum(files.values()) < 5_000_000
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for words in ("Free Spoken Digit Dataset", "CC BY-SA 4.0", "Jakobovski"):
        assert words in readme


def test_the_recipe_names_files_that_exist(recipe: Recipe) -> None:
    assert recipe.model == FOLDER / "digits.onnx"
    assert recipe.calibration_data is not None and recipe.evaluation_data is not None
    for path in (recipe.model, recipe.calibration_data.path, recipe.evaluation_data.path):
        assert Path(path).is_file()
    assert [load_target(name).name for name in recipe.target] == ["mobile"]
    assert recipe.gate is not None and recipe.gate.max_metric_drop == 0.01
    assert recipe.metric is not None
    resolve_metric(recipe.metric, ROOT)


def test_the_network_is_as_training_left_it(model: ir.Model) -> None:
    """A build has work to do: BatchNorm to fold, a depthwise and a residual pattern, any batch size."""
    ops = [node.op_type for node in model.graph]
    assert model.opset_imports[""] == 17
    assert {"Conv", "BatchNormalization", "Relu", "Add", "GlobalAveragePool", "Gemm"} <= set(ops)
    assert ops.count("BatchNormalization") == ops.count("Conv")
    assert [(i.name, i.shape) for i in input_specs(model)] == [("logmel", ("batch", 1, 40, 97))]


def test_calibration_and_evaluation_share_no_sample(recipe: Recipe, model: ir.Model) -> None:
    assert recipe.calibration_data is not None and recipe.evaluation_data is not None
    inputs = input_specs(model)
    calibration = open_samples(recipe.calibration_data, "calibration", inputs, {}, base=ROOT)
    evaluation = open_samples(recipe.evaluation_data, "evaluation", inputs, {}, base=ROOT)
    assert (len(calibration), len(evaluation)) == (CALIBRATION, EVALUATION)
    check_disjoint(calibration, evaluation)


def test_the_samples_are_float32_and_every_digit_is_asked_equally_often() -> None:
    calibration, evaluation = arrays("calibration.npz"), arrays("evaluation.npz")
    for part, count in ((calibration, CALIBRATION), (evaluation, EVALUATION)):
        assert part["logmel"].dtype == np.float32
        assert part["logmel"].shape == (count, 1, 40, 97)
        unique = np.unique(part["logmel"].reshape(count, -1), axis=0)
        assert len(unique) == count, "a sample that comes twice counts twice"
    assert np.bincount(evaluation["label"]).tolist() == [EVALUATION // 10] * 10


def test_the_model_names_the_digits(recipe: Recipe) -> None:
    evaluation = arrays("evaluation.npz")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(recipe.model, options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"logmel": evaluation["logmel"]})
    assert float((logits.argmax(axis=1) == evaluation["label"]).mean()) >= 0.97
