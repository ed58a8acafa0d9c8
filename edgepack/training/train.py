"""Knowledge distillation of an ONNX model from a teacher: setup, training run and trained model."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from edgepack.config.training import Tune
from edgepack.data.augmentation import augmented
from edgepack.data.samples import Samples
from edgepack.graph.tied_embeddings import as_transposes
from edgepack.ir.arrays import Array
from edgepack.ir.model import clone
from edgepack.quantization.weights.codebook_scales import set_codebook_scales
from edgepack.training.checkpoint import load_checkpoint, run_identity
from edgepack.training.coupled import couple
from edgepack.training.distillation_data import DistillationData, can_be_stacked, prepare_distillation
from edgepack.training.gradient_exchange import Exchange
from edgepack.training.graph import compile_model, run_program
from edgepack.training.loop import Loop, OnStep, Student
from edgepack.training.objective import Objective, choose_objective, matching
from edgepack.training.parameters import Parameters, scale_key, trainable_parameters
from edgepack.training.state import Entry, State
from edgepack.training.weights import keys_of, with_weights
from edgepack.training.workers import ALONE, Workers
from edgepack.training.zeros import Zeros

MOMENTUM = 0.9


@dataclass(frozen=True, slots=True)
class Traffic:
    """Gradient bytes that each worker sent."""

    workers: int
    sent_bytes: int
    float_bytes: int
    """Bytes that float gradients would have taken."""


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """The settings of one training run that are not in the recipe."""

    seed: int
    threads: int = 1
    """Default of the setting ``threads``."""
    checkpoints: Path | None = None
    """Folder for the log and a checkpoint after each epoch."""
    on_step: OnStep = lambda done, total, text: None
    workers: Workers = ALONE
    """They share the samples of each step; all must call with the same arguments and get the same model."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """A trained model and the log of its training."""

    model: ir.Model
    log: tuple[Entry, ...]
    ended: str
    """Why training ended."""
    kept_step: int
    """The step whose weights were kept."""
    between: float = 1.0
    """Interpolation factor between the first weights and those of that step; 1 without interpolation."""
    traffic: Traffic | None = None
    """Set if there were several workers."""
    apart: Mapping[str, Array] = field(default_factory=dict)
    """What was trained besides the weights, such as activation scales."""


def tune(
    model: ir.Model,
    teacher: ir.Model,
    samples: Samples,
    settings: Tune,
    run: TrainingRun,
    make_student: Callable[[ir.Model, Parameters], Student] | None = None,
) -> Tuned:
    """Train the weights of ``model`` to reproduce the outputs of ``teacher`` on ``samples``.

    Neither model is changed. The trained model has the same nodes, names, types and zeros; shared values stay
    shared. With a checkpoint folder, calling again with the same arguments resumes a killed run and gives the
    same result. ``make_student`` makes another student than the float graph, such as the quantized graph of
    :mod:`.fake_quant`.

    Raises:
        ModelError: the model has operators without a gradient (all are listed), or does not run.
        ConfigError: the settings do not fit the model, a checkpoint is of another run, or workers differ.
        CalibrationError: the teacher fails on a sample.
        DeviceError: another worker is gone.
    """
    together = clone(model)
    tables = as_transposes(together) if make_student is None else {}
    parameters = trainable_parameters(together, settings.keep)
    student = (make_student or FloatStudent)(together, parameters)
    objective = choose_objective(student.model, teacher, settings, together)
    sizes = [t.numel() for t in parameters.tensors.values()]
    exchange = Exchange(sizes, settings.gradients, run.workers, run.seed)
    zeros = _zeros(together, parameters, settings)
    state = State(parameters, _optimizer(parameters, settings), exchange, zeros)
    identity = run_identity(student.model, teacher, samples, settings, run.seed, run.workers.count)
    run.workers.require_same(identity, "it has another model, teacher, samples, settings or seed")
    threads = settings.threads or run.threads
    with (
        _threads(threads),
        tempfile.TemporaryDirectory(prefix="edgepack-tune-") as folder,
    ):
        distillation = prepare_distillation(
            teacher,
            objective,
            augmented(samples, settings.views, run.seed),
            settings,
            threads=threads,
            folder=Path(folder),
        )
        objective = _comparable(student, parameters, objective, distillation, settings)
        start = {key: tensor.detach().clone() for key, tensor in parameters.tensors.items()}
        if run.checkpoints is not None:
            _resume(run.checkpoints, state, identity)
        loop = Loop(student, objective, distillation, settings, run.seed, run.on_step)
        ended = loop.run(state, run.checkpoints, identity)
        between = loop.between(state, start)
    return _finished(model, state, tables, ended, between)


def _zeros(model: ir.Model, parameters: Parameters, settings: Tune) -> Zeros | None:
    if settings.sparsify is None:
        return None
    coupled = couple(model, parameters) if settings.sparsify.pattern == "channels" else None
    return Zeros(settings.sparsify, dict(parameters.masks), coupled)


def _comparable(
    student: Student,
    parameters: Parameters,
    objective: Objective,
    distillation: DistillationData,
    settings: Tune,
) -> Objective:
    """Run one sample: the pairs that can be compared; sets whether ``distillation`` can be stacked."""
    some = [distillation.feeds[i] for i in distillation.trained[:2]]
    with torch.no_grad():
        made = student(distillation.feeds.stacked(distillation.trained[:1]), parameters, objective.mine)
    found = matching(objective, made, distillation.teacher_outputs[distillation.trained[0]], settings)
    distillation.together = can_be_stacked(lambda feeds: student(feeds, parameters, found.mine), some)
    return found


def _resume(checkpoints: Path, state: State, identity: str) -> None:
    load_checkpoint(checkpoints, state, identity)
    at = hashlib.sha256(str(state.step).encode()).hexdigest()
    state.exchange.workers.require_same(
        at, f"its checkpoint in {checkpoints} is of another step; remove all of them"
    )


def _finished(model: ir.Model, state: State, tables: Mapping[str, str], ended: str, between: float) -> Tuned:
    """The model with the best weights on held-out samples, or the last weights without any."""
    exchange = state.exchange
    if state.best is not None:
        _, kept, arrays = state.best
    else:
        kept, arrays = state.step, state.parameters.arrays()
    arrays |= {table: arrays[weight].T for table, weight in tables.items() if weight in arrays}
    count = exchange.workers.count
    sent = Traffic(count, exchange.sent_bytes, exchange.float_bytes) if count > 1 else None
    apart = {key: arrays[key] for key in state.parameters.apart}
    return Tuned(_written(model, arrays), tuple(state.log), ended, kept, between, sent, apart)


def _written(model: ir.Model, arrays: Mapping[str, Array]) -> ir.Model:
    """The model with trained weights and their codebook scales."""
    made = with_weights(model, arrays)
    for value, key in keys_of(made).items():
        if (scale := arrays.get(scale_key(key))) is not None:
            set_codebook_scales(value, scale)
    return made


class FloatStudent:
    """The float model as student."""

    def __init__(self, model: ir.Model, parameters: Parameters) -> None:
        self.model = model
        self.program = compile_model(model, parameters.trained)

    def __call__(
        self, feeds: Mapping[str, Tensor], parameters: Parameters, keep: list[str]
    ) -> dict[str, Tensor]:
        """Run the graph; return the values named in ``keep``."""
        return run_program(self.program, feeds, parameters.values(), keep)


def _optimizer(parameters: Parameters, settings: Tune) -> Any:
    tensors = list(parameters.tensors.values())
    if settings.optimizer == "sgd":
        return torch.optim.SGD(tensors, lr=settings.learning_rate, momentum=MOMENTUM, nesterov=True)
    return torch.optim.Adam(tensors, lr=settings.learning_rate)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
