"""The loop: a model learns to answer as its teacher does, until steps, time or the goal end it."""

import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir
import torch
from torch import Tensor

from edgepack.config_tune import Tune
from edgepack.data import Samples
from edgepack.model import Array, clone
from edgepack.quantize.grid import set_grid
from edgepack.tied import as_transposes
from edgepack.tune.checkpoint import digest_of, load_checkpoint, run_identity, save_checkpoint
from edgepack.tune.exchange import Exchange
from edgepack.tune.graph import compile_model, run_program
from edgepack.tune.held import Held, hold, scale_key
from edgepack.tune.lessons import Batch, Lessons, batches, can_be_stacked, labels_of, prepare_lessons
from edgepack.tune.objective import Objective, agreement, choose_objective, losses, matching
from edgepack.tune.sparsify import choose_masks, penalty, wanted_sparsity
from edgepack.tune.state import Entry, State
from edgepack.tune.weights import keys_of, with_weights
from edgepack.tune.workers import ALONE, Workers
from edgepack.views import with_views

WARM_UP = 10
"""Steps over which the learning rate rises."""
MOMENTUM = 0.9
PARTS = (0.25, 0.5, 0.75)
"""Of the way from the first weights to the last, at which weights are judged in the end."""
FADING = 1.0
"""What weights that are out lose in a step, as a multiple of the learning rate. They come back where
gradients agree, not because an optimizer that takes steps of one size has moved them far."""
OnStep = Callable[[int, int, str], None]
"""Called with steps done, steps in all as far as one can tell, and a line of text."""


class Student(Protocol):
    """What is trained, as a function of its weights."""

    model: ir.Model
    """The graph that is run."""

    def __call__(self, feeds: Mapping[str, Tensor], held: Held, keep: list[str]) -> dict[str, Tensor]:
        """The values named in ``keep``, for stacked samples."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Gradients that each worker sent to others."""

    workers: int
    sent_bytes: int
    float_bytes: int
    """The same as floats."""


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


def tune(
    model: ir.Model,
    teacher: ir.Model,
    samples: Samples,
    settings: Tune,
    *,
    seed: int,
    threads: int = 1,
    checkpoints: Path | None = None,
    on_step: OnStep = lambda done, total, text: None,
    form: Callable[[ir.Model, Held], Student] | None = None,
    workers: Workers = ALONE,
) -> Tuned:
    """Train the weights of ``model`` on what ``teacher`` says to ``samples``; both stay as they are.

    The trained model has the same nodes, names, types and zeros; shared values stay shared. With a folder of
    ``checkpoints`` there are a log and, after each epoch, all that is needed to go on: called again with the
    same arguments, a run that was killed ends as it would have. ``form`` runs the weights in another form
    than the model's own, such as the integer one of :mod:`edgepack.tune.fake_quant`. Several ``workers`` that
    call this with the same arguments divide the samples of each step, and all get the same model.

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
    exchange = Exchange(sizes, settings.gradients, workers, seed)
    state = State(held, _optimizer(held, settings), exchange)
    identity = run_identity(student.model, teacher, samples, settings, seed, workers.count)
    workers.require_same(identity, "it has another model, teacher, samples, settings or seed")
    with (
        _threads(settings.threads or threads),
        tempfile.TemporaryDirectory(prefix="edgepack-tune-") as folder,
    ):
        lessons = prepare_lessons(
            teacher,
            objective,
            with_views(samples, settings.views, seed),
            held_out=settings.held_out,
            views=settings.views,
            labelled=settings.labels > 0,
            threads=settings.threads or threads,
            folder=Path(folder),
        )
        some = [lessons.feeds[i] for i in lessons.trained[:2]]
        with torch.no_grad():
            made = student(lessons.feeds.stacked(lessons.trained[:1]), held, objective.mine)
        objective = matching(objective, made, lessons.answers[lessons.trained[0]], settings)
        lessons.together = can_be_stacked(lambda feeds: student(feeds, held, objective.mine), some)
        start = {key: tensor.detach().clone() for key, tensor in held.tensors.items()}
        if checkpoints is not None:
            load_checkpoint(checkpoints, state, identity)
            at = hashlib.sha256(str(state.step).encode()).hexdigest()
            workers.require_same(
                at, f"its checkpoint in {checkpoints} is of another step; remove all of them"
            )
        loop = _Loop(student, objective, lessons, settings, seed, on_step)
        ended = loop.run(state, checkpoints, identity)
        between = loop.between(state, start)
    if state.best is not None:
        _, kept, arrays = state.best
    else:
        kept, arrays = state.step, held.arrays()
    sent = Traffic(workers.count, exchange.sent_bytes, exchange.float_bytes) if workers.count > 1 else None
    arrays |= {table: arrays[weight].T for table, weight in tables.items() if weight in arrays}
    return Tuned(_written(model, arrays), tuple(state.log), ended, kept, between, sent)


def _written(model: ir.Model, arrays: Mapping[str, Array]) -> ir.Model:
    """The model with trained weights, and with the grids that some of them stand on."""
    made = with_weights(model, arrays)
    for value, key in keys_of(made).items():
        if (scale := arrays.get(scale_key(key))) is not None:
            set_grid(value, scale)
    return made


class FloatStudent:
    """The model itself with the weights as they are."""

    def __init__(self, model: ir.Model, held: Held) -> None:
        self.model = model
        self.program = compile_model(model, held.trained)

    def __call__(self, feeds: Mapping[str, Tensor], held: Held, keep: list[str]) -> dict[str, Tensor]:
        """The values named in ``keep``."""
        return run_program(self.program, feeds, held.values(), keep)


def _set(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for key, tensor in tensors.items():
            tensor.copy_(values[key])


def _optimizer(held: Held, settings: Tune) -> Any:
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


@dataclass(frozen=True, slots=True)
class _Loop:
    student: Student
    objective: Objective
    lessons: Lessons
    settings: Tune
    seed: int
    on_step: OnStep

    def run(self, state: State, checkpoints: Path | None, identity: str) -> str:
        """Train epoch after epoch; gives the reason to stop."""
        if not state.step and self.lessons.judged and not self._changes_the_aim():
            state.best = (self._judge(state)["loss"], 0, state.held.arrays())
        while True:
            ended = self._epoch(state)
            verdict = self._verdict(state)
            if state.exchange.workers.count > 1:
                alike = "its weights are others; workers must run on machines that compute alike"
                state.exchange.workers.require_same(digest_of(state.held), alike)
            if checkpoints is not None:
                save_checkpoint(checkpoints, state, identity)
            if ended:
                return ended
            if verdict is not None and verdict >= (self.settings.stop_at or math.inf):
                return f"agreement of {verdict:.3f} on held-out samples"

    def between(self, state: State, start: Mapping[str, Tensor]) -> float:
        """Keep weights between those of the start and those of now, if they judge best; gives how far.

        Wortsman et al. (2022): with few samples what both know is in the middle.
        """
        kept = 1.0
        if state.best is None or self._changes_the_aim():
            return kept
        tensors = state.held.tensors
        last = {key: tensor.detach().clone() for key, tensor in tensors.items()}
        for part in PARTS:
            _set(tensors, {key: torch.lerp(start[key], last[key], part) for key in tensors})
            loss = self._judge(state)["loss"]
            if loss < state.best[0]:
                state.best, kept = (loss, state.step, state.held.arrays()), part
        _set(tensors, last)
        return kept

    def _changes_the_aim(self) -> bool:
        """Whether the weights of the start are no candidates: they lack what is asked for."""
        s = self.settings
        return bool(s.sparsify or s.l1 or s.l2 or s.group_lasso)

    def _progress(self, state: State) -> float:
        by_steps = state.step / self.settings.steps if self.settings.steps else 0.0
        return max(by_steps, state.elapsed_s / self.settings.budget_s)

    def _epoch(self, state: State) -> str:
        workers = state.exchange.workers
        for batch in batches(self.lessons, self.settings.batch, self.seed, state.epoch, workers):
            if (progress := self._progress(state)) >= 1:
                return "steps" if state.step == self.settings.steps else "time"
            started = time.perf_counter()
            rate = self._rate(state, progress)
            sparsity = self._mask(state, progress)
            parts = self._step(state, batch, rate)
            state.step += 1
            state.elapsed_s += time.perf_counter() - started
            (state.elapsed_s,) = workers.from_first([state.elapsed_s])
            state.log.append(
                Entry(
                    state.step,
                    state.epoch,
                    sum(parts.values()),
                    parts,
                    rate,
                    sparsity,
                    round(state.elapsed_s, 3),
                    sent_bytes=state.exchange.sent_bytes if workers.count > 1 else None,
                )
            )
            self._tell(state)
        state.epoch += 1
        done = self._progress(state) >= 1
        return ("steps" if state.step == self.settings.steps else "time") if done else ""

    def _rate(self, state: State, progress: float) -> float:
        warm = min(1.0, (state.step + 1) / WARM_UP)
        return self.settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * progress))

    def _mask(self, state: State, progress: float) -> float:
        """Choose the zeros anew where it is time to; gives their share now."""
        settings, held = self.settings.sparsify, state.held
        if settings is None:
            return 0.0
        sparsity = wanted_sparsity(settings, progress)
        final = progress >= settings.end or settings.when == "once"
        due = not state.zeros_chosen if final else state.step % settings.every == 0
        if sparsity and due:
            held.masks = choose_masks(held, sparsity, settings.pattern)
            held.returning = not final
            state.zeros_chosen = final
        return sparsity

    def _step(self, state: State, batch: Batch, rate: float) -> dict[str, float]:
        """One step; gives the parts of the loss on the samples of this worker."""
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.zero_grad()
        own = sum(map(len, batch.stacks))
        sums: dict[str, float] = {}
        for numbers in batch.stacks:
            parts = self._parts(state.held, numbers)
            (torch.stack(list(parts.values())).sum() * (len(numbers) / batch.size)).backward()
            for name, part in parts.items():
                sums[name] = sums.get(name, 0.0) + part.item() * len(numbers) / own
        state.exchange(list(state.held.tensors.values()), state.step)
        # Penalties follow from the weights alone, which all workers have.
        pressure = penalty(state.held, self.settings)
        if pressure is not None:
            pressure.backward()
            sums["penalty"] = pressure.item()
        state.optimizer.step()
        if state.held.returning:
            state.held.fade(FADING * rate)
        return sums

    def _parts(self, held: Held, numbers: list[int]) -> dict[str, Tensor]:
        made = self.student(self.lessons.feeds.stacked(numbers), held, self.objective.mine)
        answers = self.lessons.answers.stacked(numbers)
        labels = labels_of(self.lessons, numbers)
        return losses(self.objective, made, answers, self.lessons.power, self.settings, labels)

    def _judge(self, state: State) -> dict[str, float]:
        """Loss and agreement on the held-out samples."""
        total, same = 0.0, 0.0
        judged = self.lessons.judged
        size = self.settings.batch if self.lessons.together and len(set(self.lessons.shapes)) == 1 else 1
        with torch.no_grad():
            for start in range(0, len(judged), size):
                numbers = list(judged[start : start + size])
                made = self.student(self.lessons.feeds.stacked(numbers), state.held, self.objective.mine)
                answers = self.lessons.answers.stacked(numbers)
                labels = labels_of(self.lessons, numbers)
                parts = losses(self.objective, made, answers, self.lessons.power, self.settings, labels)
                total += sum(p.item() for p in parts.values()) * len(numbers)
                same += agreement(self.objective.outputs, made, answers) * len(numbers)
        # All keep and stop by one verdict, whatever the last bits of theirs.
        loss, share = state.exchange.workers.from_first([total / len(judged), same / len(judged)])
        return {"loss": loss, "agreement": share}

    def _verdict(self, state: State) -> float | None:
        """Judge the weights as they are and keep them if they are the best so far; gives the agreement."""
        if not self.lessons.judged or not state.log:
            return None
        if self.settings.sparsify is not None and not state.zeros_chosen:
            return None
        verdict = self._judge(state)
        state.log[-1] = replace(state.log[-1], held_out=verdict)
        if state.best is None or verdict["loss"] < state.best[0]:
            state.best = (verdict["loss"], state.step, state.held.arrays())
        return verdict["agreement"]

    def _tell(self, state: State) -> None:
        done = self._progress(state)
        total = max(state.step, round(state.step / done)) if done else 0
        left_s = state.elapsed_s / done - state.elapsed_s if done else 0.0
        self.on_step(state.step, total, f"loss {state.log[-1].loss:.4g}, {left_s:.0f} s left")
