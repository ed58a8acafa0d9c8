"""Comparison of built models with the original and with each other."""

from pathlib import Path

import numpy as np
import pytest
from support.onnx_models import parse

from edgepack.config.recipe import Data
from edgepack.config.target import Runtime
from edgepack.data.samples import Samples, open_samples
from edgepack.errors import ExportError, ModelError, SamplesError
from edgepack.evaluation.check import baseline, check, compare_outputs
from edgepack.ir.files import load_model, save_model
from edgepack.ir.inputs import input_specs
from edgepack.runtime.runner import open_model

ANY_WIDTH = "net (float[1, W] x) => (float[1, W] y) { y = Relu (x) }"
FOUR_WIDE = """net (float[1, W] x) => (float[N, M] y) {
    shape = Constant <value = int64[2] {1, 4}> ()
    y = Reshape (x, shape)
}"""


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    """Two samples; the second is wider than the first."""
    save_model(parse(ANY_WIDTH), tmp_path / "any.onnx")
    save_model(parse(FOUR_WIDE), tmp_path / "four.onnx")
    (tmp_path / "data").mkdir()
    for name, width in (("a", 4), ("b", 5)):
        np.save(tmp_path / "data" / f"{name}.npy", np.ones((1, width), np.float32))
    inputs = input_specs(load_model(tmp_path / "any.onnx"))
    return open_samples(Data(path=str(tmp_path / "data")), "evaluation", inputs, {}, base=tmp_path)


def test_an_original_that_fails_on_a_sample_is_the_fault_of_the_sample(
    tmp_path: Path, samples: Samples
) -> None:
    with pytest.raises(SamplesError, match=r"sample .*b.npy: .*four.onnx fails on it: .*[Rr]eshape"):
        baseline(tmp_path / "four.onnx", samples, Runtime(), None)


def test_a_built_model_that_fails_where_the_original_does_not(tmp_path: Path, samples: Samples) -> None:
    reference = baseline(tmp_path / "any.onnx", samples, Runtime(), None)
    with pytest.raises(ExportError, match=r"sample .*b.npy: .*four.onnx fails on it: .*[Rr]eshape") as caught:
        check(tmp_path / "four.onnx", reference)
    assert "\n" not in str(caught.value)


def test_a_candidate_that_fails_on_a_probe_is_a_model_error(tmp_path: Path, samples: Samples) -> None:
    feeds = [sample.feeds for sample in samples]
    expected = [open_model(tmp_path / "any.onnx", Runtime()).run(feed) for feed in feeds]
    with pytest.raises(ModelError, match=r"the runtime fails to run it: .*[Rr]eshape"):
        compare_outputs(expected, open_model(tmp_path / "four.onnx", Runtime()), feeds)
