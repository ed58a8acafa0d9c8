"""The training loop: steps on batches; keeps the weights that are best on the held-out samples."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import onnx_ir as ir
import torch
from torch import Tensor

from edgepack.config.training import Tune
from edgepack.training.checkpoint import digest_of, save_checkpoint
from edgepack.training.distillation_data import Batch, DistillationData, batches, labels_of
from edgepack.training.objective import Objective, agreement, losses
from edgepack.training.parameters import Parameters
from edgepack.training.sparsify import penalty
from edgepack.training.state import Entry, State

WARM_UP = 10
"""Warm-up steps of the learning rate."""
PARTS = (0.25, 0.5, 0.75)
"""Interpolation factors between the first and the last weights that are evaluated at the end."""
OnStep = Callable[[int, int, str], None]
"""Called with the steps done, the expected total and a line of text."""


class Student(Protocol):
    """The trained model as a function of its parameters."""

    model: ir.Model
    """The graph that runs."""

    def __call__(
        self, feeds: Mapping[str, Tensor], parameters: Parameters, keep: list[str]
    ) -> dict[str, Tensor]:
        """Run on stacked samples; return the values named in ``keep``."""


@dataclass(frozen=True, slots=True)
class Loop:
    """The fixed part of a run; :class:`State` is the rest."""

    student: Student
    objective: Objective
    distillation: DistillationData
    settings: Tune
    seed: int
    on_step: OnStep

    def run(self, state: State, checkpoints: Path | None, identity: str) -> str:
        """Train until a limit is reached; return the reason for stopping."""
        if not state.step and self.distillation.judged and not self._changes_the_aim():
            state.best = (self._judge(state)["loss"], 0, state.parameters.arrays())
        while True:
            ended = self._epoch(state)
            verdict = self._verdict(state)
            if state.exchange.workers.count > 1:
                alike = "its weights differ; all workers must run on machines with identical arithmetic"
                state.exchange.workers.require_same(digest_of(state.parameters), alike)
            if checkpoints is not None:
                save_checkpoint(checkpoints, state, identity)
            if ended:
                return ended
            if verdict is not None and verdict >= (self.settings.stop_at or math.inf):
                return f"agreement of {verdict:.3f} on held-out samples"

    def between(self, state: State, start: Mapping[str, Tensor]) -> float:
        """Interpolate between the first and the current weights and keep the best; return the factor.

        Wortsman et al. (2022): interpolated weights generalize better after training on few samples.
        """
        kept = 1.0
        if state.best is None or self._changes_the_aim():
            return kept
        tensors = state.parameters.tensors
        last = {key: tensor.detach().clone() for key, tensor in tensors.items()}
        for part in PARTS:
            _set(tensors, {key: torch.lerp(start[key], last[key], part) for key in tensors})
            loss = self._judge(state)["loss"]
            if loss < state.best[0]:
                state.best, kept = (loss, state.step, state.parameters.arrays()), part
        _set(tensors, last)
        return kept

    def _changes_the_aim(self) -> bool:
        """Whether the first weights cannot be kept because they lack the required zeros."""
        s = self.settings
        return bool(s.sparsify or s.l1 or s.l2 or s.group_lasso)

    def _progress(self, state: State) -> float:
        by_steps = state.step / self.settings.steps if self.settings.steps else 0.0
        return max(by_steps, state.elapsed_s / self.settings.budget_s)

    def _epoch(self, state: State) -> str:
        workers = state.exchange.workers
        for batch in batches(self.distillation, self.settings.batch, self.seed, state.epoch, workers):
            if (progress := self._progress(state)) >= 1:
                return "steps" if state.step == self.settings.steps else "time"
            started = time.perf_counter()
            rate = self._rate(state, progress)
            zeros = state.zeros
            sparsity = zeros.choose(state.parameters, state.optimizer, state.step, progress) if zeros else 0.0
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

    def _step(self, state: State, batch: Batch, rate: float) -> dict[str, float]:
        """Run one step; return the terms of the loss on the samples of this worker."""
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.zero_grad()
        own = sum(map(len, batch.stacks))
        sums: dict[str, float] = {}
        for numbers in batch.stacks:
            parts = self._parts(state.parameters, numbers)
            (torch.stack(list(parts.values())).sum() * (len(numbers) / batch.size)).backward()
            for name, part in parts.items():
                sums[name] = sums.get(name, 0.0) + part.item() * len(numbers) / own
        state.exchange(list(state.parameters.tensors.values()), state.step)
        # Penalties depend on the weights alone, which are equal on all workers.
        pressure = penalty(state.parameters, self.settings)
        if pressure is not None:
            pressure.backward()
            sums["penalty"] = pressure.item()
        if state.zeros is not None:
            state.zeros.after_backward(state.parameters)
        state.optimizer.step()
        if state.zeros is not None:
            state.zeros.after_step(state.parameters, rate)
        return sums

    def _parts(self, parameters: Parameters, numbers: list[int]) -> dict[str, Tensor]:
        made = self.student(self.distillation.feeds.stacked(numbers), parameters, self.objective.mine)
        teacher_outputs = self.distillation.teacher_outputs.stacked(numbers)
        labels = labels_of(self.distillation, numbers)
        return losses(self.objective, made, teacher_outputs, self.distillation.power, self.settings, labels)

    def _judge(self, state: State) -> dict[str, float]:
        """Loss and agreement on the held-out samples, for the current weights."""
        total, same = 0.0, 0.0
        judged = self.distillation.judged
        size = (
            self.settings.batch
            if self.distillation.together and len(set(self.distillation.shapes)) == 1
            else 1
        )
        with torch.no_grad():
            for start in range(0, len(judged), size):
                numbers = list(judged[start : start + size])
                made = self.student(
                    self.distillation.feeds.stacked(numbers), state.parameters, self.objective.mine
                )
                teacher_outputs = self.distillation.teacher_outputs.stacked(numbers)
                labels = labels_of(self.distillation, numbers)
                parts = losses(
                    self.objective, made, teacher_outputs, self.distillation.power, self.settings, labels
                )
                total += sum(p.item() for p in parts.values()) * len(numbers)
                same += agreement(self.objective.outputs, made, teacher_outputs) * len(numbers)
        # All workers use the result of the first, because theirs may differ in the last bits.
        loss, share = state.exchange.workers.from_first([total / len(judged), same / len(judged)])
        return {"loss": loss, "agreement": share}

    def _verdict(self, state: State) -> float | None:
        """Evaluate the current weights, keep them if they are the best so far; return the agreement."""
        if not self.distillation.judged or not state.log:
            return None
        if state.zeros is not None and not state.zeros.final:
            return None
        verdict = self._judge(state)
        state.log[-1] = replace(state.log[-1], held_out=verdict)
        if state.best is None or verdict["loss"] < state.best[0]:
            state.best = (verdict["loss"], state.step, state.parameters.arrays())
        return verdict["agreement"]

    def _tell(self, state: State) -> None:
        done = self._progress(state)
        total = max(state.step, round(state.step / done)) if done else 0
        left_s = state.elapsed_s / done - state.elapsed_s if done else 0.0
        self.on_step(state.step, total, f"loss {state.log[-1].loss:.4g}, {left_s:.0f} s left")


def _set(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for key, tensor in tensors.items():
            tensor.copy_(values[key])
