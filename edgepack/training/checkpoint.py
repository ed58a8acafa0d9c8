"""Checkpoints of a training run: its log and everything needed to resume it."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from edgepack.config.training import Tune
from edgepack.data.samples import Samples
from edgepack.errors import ConfigError
from edgepack.ir.fingerprint import fingerprint
from edgepack.training.parameters import Parameters
from edgepack.training.state import Entry, State

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
LAYOUT = 2
"""Version of the checkpoint layout; increased with every change of the layout."""


def run_identity(
    model: ir.Model, teacher: ir.Model, samples: Samples, settings: Tune, seed: int, workers: int
) -> str:
    """SHA-256 of everything that determines a run; equal on all ``workers``."""
    described = "\n".join(
        [
            fingerprint(model),
            fingerprint(teacher),
            samples.fingerprint,
            settings.model_dump_json(),
            f"{seed} {workers}",
        ]
    )
    return hashlib.sha256(described.encode()).hexdigest()


def digest_of(parameters: Parameters) -> str:
    """SHA-256 of the current weights."""
    found = hashlib.sha256()
    for array in parameters.arrays().values():
        found.update(array.tobytes())
    return found.hexdigest()


def path_of(folder: Path, state: State) -> Path:
    """Path of this worker's checkpoint: ``checkpoint.pt`` for rank 0, ``checkpoint-1.pt`` for rank 1."""
    workers = state.exchange.workers
    return folder / (CHECKPOINT if workers.first else f"{Path(CHECKPOINT).stem}-{workers.rank}.pt")


def save_checkpoint(folder: Path, state: State, identity: str) -> None:
    """Write a checkpoint atomically; rank 0 writes ``log.jsonl`` as well."""
    folder.mkdir(parents=True, exist_ok=True)
    best: Any = None
    if state.best is not None:
        loss, step, arrays = state.best
        best = (loss, step, {name: torch.from_numpy(array) for name, array in arrays.items()})
    content = {
        "layout": LAYOUT,
        "identity": identity,
        "tensors": {key: tensor.detach() for key, tensor in state.parameters.tensors.items()},
        "masks": state.parameters.masks,
        "returning": state.parameters.returning,
        "zeros": state.zeros.known() if state.zeros is not None else None,
        "optimizer": state.optimizer.state_dict(),
        "lost": state.exchange.lost,
        "bytes": (state.exchange.sent_bytes, state.exchange.float_bytes),
        "epoch": state.epoch,
        "step": state.step,
        "elapsed_s": state.elapsed_s,
        "best": best,
        "log": [asdict(entry) for entry in state.log],
    }
    path = path_of(folder, state)
    draft = path.with_name(f".{path.name}")
    torch.save(content, draft)
    draft.replace(path)
    if not state.exchange.workers.first:
        return
    log = folder / f".{LOG}"
    log.write_text("".join(f"{entry.to_json()}\n" for entry in state.log), encoding="utf-8")
    log.replace(folder / LOG)


def load_checkpoint(folder: Path, state: State, identity: str) -> None:
    """Restore ``state`` from the checkpoint in ``folder``; do nothing if there is none.

    Raises:
        ConfigError: the checkpoint belongs to another run or another version of edgepack, or is unreadable.
    """
    path = path_of(folder, state)
    if not path.exists():
        return
    try:
        content = torch.load(path, weights_only=True)
    except Exception as error:  # torch passes on any error of its unpickler
        raise ConfigError(f"{path}: is not a checkpoint, or is truncated: {error}; remove it") from error
    layout = content.get("layout", 1) if isinstance(content, dict) else None
    if layout != LAYOUT:
        raise ConfigError(
            f"{path}: is from another version of edgepack (layout {layout}, this one has {LAYOUT}); "
            "resume with the version that started the run, or remove the file to start again"
        )
    if content["identity"] != identity:
        raise ConfigError(
            f"{path}: is from a run with another model, samples or settings; remove it, or choose another "
            "folder"
        )
    with torch.no_grad():
        for key, tensor in state.parameters.tensors.items():
            tensor.copy_(content["tensors"][key])
    state.parameters.masks = content["masks"]
    state.parameters.returning = content["returning"]
    if state.zeros is not None:
        state.zeros.know(content["zeros"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.exchange.lost = content["lost"]
    state.exchange.sent_bytes, state.exchange.float_bytes = content["bytes"]
    state.epoch, state.step, state.elapsed_s = content["epoch"], content["step"], content["elapsed_s"]
    if content["best"] is not None:
        loss, step, arrays = content["best"]
        state.best = (loss, step, {name: tensor.numpy() for name, tensor in arrays.items()})
    state.log = [Entry(**entry) for entry in content["log"]]
