"""Short training runs on tiny networks."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from support.onnx_models import Array, conv_net, f32, run
from support.sampling import npz

from edgepack.config.recipe import Data, Labels
from edgepack.config.training import Tune
from edgepack.data.samples import Samples, open_samples
from edgepack.ir.inputs import input_specs
from edgepack.training.train import TrainingRun, Tuned, tune
from edgepack.training.weights import array_of, keys_of, trainables, with_weights

QUICK: dict[str, Any] = {"steps": 40, "learning_rate": 3e-3, "held_out": 0.0, "batch": 8}


def trained_arrays(model: ir.Model) -> dict[str, Array]:
    """The trained parameters, by key."""
    return {key: array_of(value) for value, key in keys_of(model).items() if key in trainables(model)}


def changed(model: ir.Model, function: Any) -> ir.Model:
    """The model with each trained parameter replaced by ``function(key, array)``."""
    return with_weights(model, {k: function(k, v) for k, v in trained_arrays(model).items()})


def noisy(model: ir.Model, noise: float = 0.1) -> ir.Model:
    """The model with noise added to its parameters."""
    rng = np.random.default_rng(0)
    return changed(model, lambda key, v: v + f32(noise * rng.normal(size=v.shape)))


def random_pictures(folder: Path) -> Samples:
    """Two dozen labelled images for :func:`conv_net`."""
    rng = np.random.default_rng(5)
    path = npz(folder / "x.npz", x=f32(rng.normal(size=(24, 3, 8, 8))), label=np.arange(24) % 5)
    data = Data(path=str(path), labels=Labels(array="label"))
    return open_samples(data, "calibration", input_specs(conv_net()), {}, base=folder)


def distance(a: ir.Model, b: ir.Model, samples: Samples) -> float:
    """Mean squared difference of logits, each shifted to a common mean."""
    apart = [run(a, s.feeds)["y"] - run(b, s.feeds)["y"] for s in samples]
    return float(np.mean([np.square(d - d.mean()).mean() for d in apart]))


def trained(model: ir.Model, samples: Samples, **settings: Any) -> Tuned:
    """A short run, with the original network as the teacher."""
    return tune(model, conv_net(), samples, Tune(**{**QUICK, **settings}), TrainingRun(1))
