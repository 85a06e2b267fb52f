"""Checkpoints of a training run: everything that a bit-exact resume needs, written atomically."""

from __future__ import annotations

import dataclasses
import os
import pickle
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from runtime.errors import InputError

if TYPE_CHECKING:
    from refusion.train import Trainer

# Settings that may differ on resume: they change what is recorded or how fast, not what is learned.
_FREE = {
    "out", "resume", "data", "dev", "dev_every", "dev_limit", "device", "threads", "cache_gb", "recompute",
    "checkpoint_every", "log_every", "skip_bad", "init",
}  # fmt: skip


def _settings(trainer: Trainer) -> dict[str, Any]:
    settings = dataclasses.asdict(trainer.config)
    return {name: value for name, value in settings.items() if name not in _FREE} | {"pairs": trainer.fusion_steps}


def save_checkpoint(path: Path, trainer: Trainer) -> None:
    """Write networks, optimizers, position (it gives the schedule), accumulated gradients and random states."""
    state = {
        "settings": _settings(trainer),
        "networks": {name: net.state_dict() for name, net in trainer.networks.items()},
        "optimizers": {name: o.state_dict() for name, o in trainer.optimizers.items()},
        "scaler": trainer.scaler.state_dict(),
        "accumulated": trainer.accumulated,
        "position": dataclasses.asdict(trainer.position),
        "best": trainer.best,
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state_all() if trainer.device.type == "cuda" else [],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def load_checkpoint(path: Path, trainer: Trainer) -> None:
    """Put a run into the state of a checkpoint. Raises InputError for a damaged file or one of other settings."""
    try:
        state = torch.load(path, map_location=trainer.device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise InputError(
            f"{path}: damaged checkpoint ({type(error).__name__}): start again with another out"
        ) from error
    for name, value in _settings(trainer).items():
        saved = state["settings"].get(name)
        if saved != value:
            raise InputError(f"{path}: was made with {name} = {saved}, now it is {value}: give the same settings")
    for name, net in trainer.networks.items():
        net.load_state_dict(state["networks"][name])
    for name, optimizer in trainer.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    trainer.scaler.load_state_dict(state["scaler"])
    for total, saved in zip(trainer.accumulated, state["accumulated"], strict=True):
        total.copy_(saved)
    trainer.position = type(trainer.position)(**state["position"])
    trainer.best = state["best"]
    torch.set_rng_state(state["rng"].cpu())
    if state["rng_cuda"] and trainer.device.type == "cuda":
        torch.cuda.set_rng_state_all([s.cpu() for s in state["rng_cuda"]])
