"""Training checkpoints: written aside, synced, renamed; the last two are kept. Tensors and plain data, no code."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import KernelizeError

KEPT = 2
PARAMETERS, OPTIMIZER, STATE = "parameters.safetensors", "optimizer.pt", "state.json"


@dataclass(frozen=True)
class State:
    """Where a run is. `changed` names the original parameters that ended stages have changed."""

    stage: int
    step: int
    position: dict[str, Any]
    recipe: dict[str, Any]
    changed: list[str]


@dataclass(frozen=True)
class Checkpoint(State):
    path: Path

    def load_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Copies the saved values into the parameters of these names."""
        saved = load_file(self.path / PARAMETERS)
        if unknown := sorted(set(saved) - set(parameters)):
            raise KernelizeError(f"{self.path} does not fit the model: it has no parameter {unknown[0]}")
        for name, value in saved.items():
            parameters[name].data = value.to(parameters[name].device)

    def load_optimizer(self, device: torch.device) -> tuple[dict, dict]:
        """The states of optimizer and scheduler."""
        saved = torch.load(self.path / OPTIMIZER, map_location=device, weights_only=True)
        return saved["optimizer"], saved["scheduler"]


def write(
    folder: Path,
    name: str,
    state: State,
    parameters: Mapping[str, Tensor],
    optimizer: dict | None,
    scheduler: dict | None,
) -> Path:
    """Adds a checkpoint to the folder; without optimizer it is the end of a stage. Returns its path."""
    part, path = folder / f"{name}.part", folder / name
    for stale in (part, path):
        shutil.rmtree(stale, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({name: value.detach().contiguous() for name, value in parameters.items()}, part / PARAMETERS)
    if optimizer is not None:
        torch.save({"optimizer": optimizer, "scheduler": scheduler}, part / OPTIMIZER)
    (part / STATE).write_text(json.dumps(dataclasses.asdict(state)), "utf-8")
    for written in (*part.iterdir(), part):
        _sync(written)
    part.rename(path)
    _sync(folder)
    for old in _all(folder)[:-KEPT]:
        shutil.rmtree(old.path)
    return path


def last(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a folder, if there is one."""
    found = _all(folder)
    return found[-1] if found else None


def _all(folder: Path) -> list[Checkpoint]:
    complete = [path for path in folder.glob("*-*") if path.suffix != ".part"]
    found = [Checkpoint(**json.loads((path / STATE).read_text("utf-8")), path=path) for path in complete]
    return sorted(found, key=lambda checkpoint: (checkpoint.stage, checkpoint.step))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
