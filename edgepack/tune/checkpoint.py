"""A run on disk: its log, and all that is needed to go on with it."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from edgepack.config_tune import Tune
from edgepack.data import Samples
from edgepack.errors import ConfigError
from edgepack.model import fingerprint
from edgepack.tune.state import Entry, State

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"


def run_identity(model: ir.Model, teacher: ir.Model, samples: Samples, settings: Tune, seed: int) -> str:
    """SHA-256 of all that decides how a run goes."""
    told = "\n".join(
        [fingerprint(model), fingerprint(teacher), samples.fingerprint, settings.model_dump_json(), str(seed)]
    )
    return hashlib.sha256(told.encode()).hexdigest()


def save_checkpoint(folder: Path, state: State, identity: str) -> None:
    """Write ``checkpoint.pt`` and ``log.jsonl``; an earlier checkpoint stays until the new one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    best: Any = None
    if state.best is not None:
        loss, step, arrays = state.best
        best = (loss, step, {name: torch.from_numpy(array) for name, array in arrays.items()})
    content = {
        "identity": identity,
        "tensors": {key: tensor.detach() for key, tensor in state.held.tensors.items()},
        "masks": state.held.masks,
        "returning": state.held.returning,
        "optimizer": state.optimizer.state_dict(),
        "epoch": state.epoch,
        "step": state.step,
        "elapsed_s": state.elapsed_s,
        "best": best,
        "log": [asdict(entry) for entry in state.log],
    }
    draft = folder / f".{CHECKPOINT}"
    torch.save(content, draft)
    draft.replace(folder / CHECKPOINT)
    log = folder / f".{LOG}"
    log.write_text("".join(f"{entry.to_json()}\n" for entry in state.log), encoding="utf-8")
    log.replace(folder / LOG)


def load_checkpoint(folder: Path, state: State, identity: str) -> None:
    """Put ``state`` where the run in ``folder`` stopped; nothing changes where there is none.

    Raises:
        ConfigError: the checkpoint is that of another run, or cannot be read.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return
    try:
        content = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises what its unpickler does
        raise ConfigError(f"{path}: is not a checkpoint, or is cut short: {error}; remove it") from error
    if content["identity"] != identity:
        raise ConfigError(
            f"{path}: is that of a run with another model, samples or settings; remove it, or name another "
            "folder"
        )
    with torch.no_grad():
        for key, tensor in state.held.tensors.items():
            tensor.copy_(content["tensors"][key])
    state.held.masks = content["masks"]
    state.held.returning = content["returning"]
    state.optimizer.load_state_dict(content["optimizer"])
    state.epoch, state.step, state.elapsed_s = content["epoch"], content["step"], content["elapsed_s"]
    if content["best"] is not None:
        loss, step, arrays = content["best"]
        state.best = (loss, step, {name: tensor.numpy() for name, tensor in arrays.items()})
    state.log = [Entry(**entry) for entry in content["log"]]
