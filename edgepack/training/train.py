"""A model learns to answer as its teacher does: what a run needs, the run, and the model that comes of it."""

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
from edgepack.training.exchange import Exchange
from edgepack.training.graph import compile_model, run_program
from edgepack.training.held import Parameters, hold, scale_key
from edgepack.training.loop import Loop, OnStep, Student
from edgepack.training.objective import Objective, choose_objective, matching
from edgepack.training.state import Entry, State
from edgepack.training.weights import keys_of, with_weights
from edgepack.training.workers import ALONE, Workers
from edgepack.training.zeros import Zeros

MOMENTUM = 0.9


@dataclass(frozen=True, slots=True)
class Traffic:
    """Gradients that each worker sent to others."""

    workers: int
    sent_bytes: int
    float_bytes: int
    """The same as floats."""


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """One run of a training: where it starts from, where it runs, whom it tells."""

    seed: int
    threads: int = 1
    """Used where the settings name none."""
    checkpoints: Path | None = None
    """A folder for a log and, after each epoch, all that is needed to go on."""
    on_step: OnStep = lambda done, total, text: None
    workers: Workers = ALONE
    """They divide the samples of each step; all call with the same arguments and get the same model."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """A trained model and how it came about."""

    model: ir.Model
    log: tuple[Entry, ...]
    ended: str
    """Why training ended."""
    kept_step: int
    """The step whose weights these are."""
    between: float = 1.0
    """How far from the start to that step they are, where that is better than either."""
    traffic: Traffic | None = None
    """What was sent between workers, where there were several."""
    apart: Mapping[str, Array] = field(default_factory=dict)
    """What a form of the model has trained besides its weights."""


def tune(
    model: ir.Model,
    teacher: ir.Model,
    samples: Samples,
    settings: Tune,
    run: TrainingRun,
    form: Callable[[ir.Model, Parameters], Student] | None = None,
) -> Tuned:
    """Train the weights of ``model`` on what ``teacher`` says to ``samples``; both stay as they are.

    The trained model has the same nodes, names, types and zeros; shared values stay shared. With a folder of
    checkpoints, a run that was killed ends as it would have when it is called again with the same arguments.
    ``form`` runs the weights in another form than the model's own, such as the integer one of
    :mod:`.fake_quant`.

    Raises:
        ModelError: the model has operators that cannot be trained (all are listed), or does not run.
        ConfigError: settings that do not fit the model, checkpoints of another run, workers that differ.
        CalibrationError: the teacher fails on a sample.
        DeviceError: another worker is gone.
    """
    together = clone(model)
    tables = as_transposes(together) if form is None else {}
    held = hold(together, settings.keep)
    student = (form or FloatStudent)(together, held)
    objective = choose_objective(student.model, teacher, settings, together)
    sizes = [t.numel() for t in held.tensors.values()]
    exchange = Exchange(sizes, settings.gradients, run.workers, run.seed)
    zeros = _zeros(together, held, settings)
    state = State(held, _optimizer(held, settings), exchange, zeros)
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
        objective = _tried(student, held, objective, distillation, settings)
        start = {key: tensor.detach().clone() for key, tensor in held.tensors.items()}
        if run.checkpoints is not None:
            _resume(run.checkpoints, state, identity)
        loop = Loop(student, objective, distillation, settings, run.seed, run.on_step)
        ended = loop.run(state, run.checkpoints, identity)
        between = loop.between(state, start)
    return _finished(model, state, tables, ended, between)


def _zeros(model: ir.Model, held: Parameters, settings: Tune) -> Zeros | None:
    if settings.sparsify is None:
        return None
    coupled = couple(model, held) if settings.sparsify.pattern == "channels" else None
    return Zeros(settings.sparsify, dict(held.masks), coupled)


def _tried(
    student: Student, held: Parameters, objective: Objective, distillation: DistillationData, settings: Tune
) -> Objective:
    """What can be compared, by one sample; and ``distillation`` learns whether samples can be stacked."""
    some = [distillation.feeds[i] for i in distillation.trained[:2]]
    with torch.no_grad():
        made = student(distillation.feeds.stacked(distillation.trained[:1]), held, objective.mine)
    found = matching(objective, made, distillation.answers[distillation.trained[0]], settings)
    distillation.together = can_be_stacked(lambda feeds: student(feeds, held, found.mine), some)
    return found


def _resume(checkpoints: Path, state: State, identity: str) -> None:
    load_checkpoint(checkpoints, state, identity)
    at = hashlib.sha256(str(state.step).encode()).hexdigest()
    state.exchange.workers.require_same(
        at, f"its checkpoint in {checkpoints} is of another step; remove all of them"
    )


def _finished(model: ir.Model, state: State, tables: Mapping[str, str], ended: str, between: float) -> Tuned:
    """The model with the weights that judged best, or the last ones where nothing judges."""
    exchange = state.exchange
    if state.best is not None:
        _, kept, arrays = state.best
    else:
        kept, arrays = state.step, state.held.arrays()
    arrays |= {table: arrays[weight].T for table, weight in tables.items() if weight in arrays}
    count = exchange.workers.count
    sent = Traffic(count, exchange.sent_bytes, exchange.float_bytes) if count > 1 else None
    apart = {key: arrays[key] for key in state.held.apart}
    return Tuned(_written(model, arrays), tuple(state.log), ended, kept, between, sent, apart)


def _written(model: ir.Model, arrays: Mapping[str, Array]) -> ir.Model:
    """The model with trained weights, and with the grids that some of them stand on."""
    made = with_weights(model, arrays)
    for value, key in keys_of(made).items():
        if (scale := arrays.get(scale_key(key))) is not None:
            set_codebook_scales(value, scale)
    return made


class FloatStudent:
    """The model itself with the weights as they are."""

    def __init__(self, model: ir.Model, held: Parameters) -> None:
        self.model = model
        self.program = compile_model(model, held.trained)

    def __call__(self, feeds: Mapping[str, Tensor], held: Parameters, keep: list[str]) -> dict[str, Tensor]:
        """The values named in ``keep``."""
        return run_program(self.program, feeds, held.values(), keep)


def _optimizer(held: Parameters, settings: Tune) -> Any:
    tensors = list(held.tensors.values())
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
