"""The loop: step after step on batches of samples, and the weights that judge best are kept."""

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
from edgepack.training.held import Parameters
from edgepack.training.objective import Objective, agreement, losses
from edgepack.training.sparsify import penalty
from edgepack.training.state import Entry, State

WARM_UP = 10
"""Steps over which the learning rate rises."""
PARTS = (0.25, 0.5, 0.75)
"""Of the way from the first weights to the last, at which weights are judged in the end."""
OnStep = Callable[[int, int, str], None]
"""Called with steps done, steps in all as far as one can tell, and a line of text."""


class Student(Protocol):
    """What is trained, as a function of its weights."""

    model: ir.Model
    """The graph that is run."""

    def __call__(self, feeds: Mapping[str, Tensor], held: Parameters, keep: list[str]) -> dict[str, Tensor]:
        """The values named in ``keep``, for stacked samples."""


@dataclass(frozen=True, slots=True)
class Loop:
    """What a run consists of, besides its state."""

    student: Student
    objective: Objective
    distillation: DistillationData
    settings: Tune
    seed: int
    on_step: OnStep

    def run(self, state: State, checkpoints: Path | None, identity: str) -> str:
        """Train epoch after epoch; gives the reason to stop."""
        if not state.step and self.distillation.judged and not self._changes_the_aim():
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
        for batch in batches(self.distillation, self.settings.batch, self.seed, state.epoch, workers):
            if (progress := self._progress(state)) >= 1:
                return "steps" if state.step == self.settings.steps else "time"
            started = time.perf_counter()
            rate = self._rate(state, progress)
            zeros = state.zeros
            sparsity = zeros.choose(state.held, state.optimizer, state.step, progress) if zeros else 0.0
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
        if state.zeros is not None:
            state.zeros.after_backward(state.held)
        state.optimizer.step()
        if state.zeros is not None:
            state.zeros.after_step(state.held, rate)
        return sums

    def _parts(self, held: Parameters, numbers: list[int]) -> dict[str, Tensor]:
        made = self.student(self.distillation.feeds.stacked(numbers), held, self.objective.mine)
        answers = self.distillation.answers.stacked(numbers)
        labels = labels_of(self.distillation, numbers)
        return losses(self.objective, made, answers, self.distillation.power, self.settings, labels)

    def _judge(self, state: State) -> dict[str, float]:
        """Loss and agreement on the held-out samples."""
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
                made = self.student(self.distillation.feeds.stacked(numbers), state.held, self.objective.mine)
                answers = self.distillation.answers.stacked(numbers)
                labels = labels_of(self.distillation, numbers)
                parts = losses(self.objective, made, answers, self.distillation.power, self.settings, labels)
                total += sum(p.item() for p in parts.values()) * len(numbers)
                same += agreement(self.objective.outputs, made, answers) * len(numbers)
        # All keep and stop by one verdict, whatever the last bits of theirs.
        loss, share = state.exchange.workers.from_first([total / len(judged), same / len(judged)])
        return {"loss": loss, "agreement": share}

    def _verdict(self, state: State) -> float | None:
        """Judge the weights as they are and keep them if they are the best so far; gives the agreement."""
        if not self.distillation.judged or not state.log:
            return None
        if state.zeros is not None and not state.zeros.final:
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


def _set(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for key, tensor in tensors.items():
            tensor.copy_(values[key])
