"""Training checkpoints: written aside, synced, renamed; checksummed; the last two are kept. Tensors and plain data,
no code, and no pickles."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import InputError, KernelizeError
from .files import PART, new_folder, sync

KEPT = 2
PARAMETERS, OPTIMIZER, STATE = "parameters.safetensors", "optimizer.safetensors", "state.json"
NAME = re.compile(r"(\d+)-[a-z0-9_]+-(\d+)")  # number and name of the stage, and the step
SUMS = "SHA256SUMS"  # of all other files, as `sha256sum --check` reads it


@dataclass(frozen=True)
class State:
    """Where a run is. `changed` names the original parameters that ended stages have changed; `moving` is what
    optimizer and scheduler hold besides tensors, None at the end of a stage. `origin` is a hash of the parameters that
    the checkpoint does not hold, `texts` one of each data file; a checkpoint of an earlier release has neither."""

    stage: int
    step: int
    position: dict[str, Any]
    recipe: dict[str, Any]
    changed: list[str]
    moving: dict[str, Any] | None = None
    origin: str | None = None
    texts: dict[str, str] | None = None


@dataclass(frozen=True)
class Checkpoint(State):
    path: Path = Path()

    def names(self) -> set[str]:
        """Of the parameters that it holds."""
        with safe_open(self.path / PARAMETERS, "pt") as file:
            return set(file.keys())

    def load_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Copies the saved values into the parameters of these names."""
        saved = load_file(self.path / PARAMETERS)
        if unknown := sorted(set(saved) - set(parameters)):
            raise KernelizeError(f"{self.path} does not fit the model: it has no parameter {unknown[0]}")
        for name, value in saved.items():
            if value.shape != parameters[name].shape:
                has, fits = list(value.shape), list(parameters[name].shape)
                raise KernelizeError(f"{self.path} does not fit the model: {name} is {has} there and {fits} here")
        for name, value in saved.items():
            parameters[name].data = value.to(parameters[name].device)

    def load_optimizer(self, device: torch.device) -> tuple[dict, dict]:
        """The states of optimizer and scheduler. KernelizeError where a stage has ended, which has none."""
        if self.moving is None:
            raise KernelizeError(f"{self.path} is the end of a stage and has no optimizer")
        on = device.type if device.type == "cpu" else str(device)  # accelerate numbers CPUs too, safetensors does not
        tensors = load_file(self.path / OPTIMIZER, device=on)
        state: dict[int, dict[str, Any]] = {int(index): fields for index, fields in self.moving["state"].items()}
        for name, value in tensors.items():
            index, _, field = name.partition(".")
            state[int(index)][field] = value
        return {"state": state, "param_groups": self.moving["param_groups"]}, self.moving["scheduler"]


def write(
    folder: Path,
    stage: str,
    state: State,
    parameters: Mapping[str, Tensor],
    optimizer: dict | None,
    scheduler: dict | None,
) -> Path:
    """Adds a checkpoint of `stage` to the folder; without optimizer it is the end of a stage. Returns its path.

    KernelizeError if it cannot be written; those that were there then still are.
    """
    path = folder / f"{state.stage}-{stage}-{state.step}"
    if path.exists():
        _remove(path)
    with new_folder(path) as part:
        save_file({name: value.detach().contiguous() for name, value in parameters.items()}, part / PARAMETERS)
        if optimizer is not None:
            tensors, plain = _split(optimizer["state"])
            save_file(tensors, part / OPTIMIZER)
            moving = {"state": plain, "param_groups": optimizer["param_groups"], "scheduler": scheduler}
            state = dataclasses.replace(state, moving=moving)
        (part / STATE).write_text(json.dumps(dataclasses.asdict(state)), "utf-8")
        sums = {file.name: _sum(file) for file in sorted(part.iterdir())}
        (part / SUMS).write_text("".join(f"{value}  {name}\n" for name, value in sums.items()), "utf-8")
    sync(folder.parent)
    for old in _written(folder)[:-KEPT]:
        _remove(old)
    for half in folder.glob(f".*{PART}"):  # of runs that were killed here
        shutil.rmtree(half)
    return path


def some(folder: Path) -> bool:
    """Whether a folder holds checkpoints, whole or not."""
    return bool(_written(folder))


def last(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """(the newest checkpoint of a folder that is as it was written, what is wrong with each that is newer).

    InputError if there are some, and all are damaged.
    """
    damaged: list[str] = []
    for path in reversed(_written(folder)):
        problem = _problem(path)
        if problem is None:
            return Checkpoint(**_read_state(path), path=path), damaged
        damaged.append(f"{path} is damaged: {problem}")
    if damaged:
        raise InputError(f"no checkpoint is whole: {damaged[0]}; start the run anew")
    return None, damaged


def _split(state: Mapping[int, Mapping[str, Any]]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The tensors of an optimizer's state as index.field, and the rest by index."""
    fields = [(index, field, value) for index, entry in state.items() for field, value in entry.items()]
    tensors = {f"{index}.{field}": value.contiguous() for index, field, value in fields if isinstance(value, Tensor)}
    plain: dict[str, dict[str, Any]] = {str(index): {} for index in state}
    for index, field, value in fields:
        if not isinstance(value, Tensor):
            plain[str(index)][field] = value
    return tensors, plain


def _written(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first; complete ones, if the disk has kept its promises."""
    found = [(match, path) for path in folder.glob("*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda pair: (int(pair[0][1]), int(pair[0][2])))]


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if they are as they were written."""
    try:
        lines = (path / SUMS).read_text("utf-8").splitlines()
        sums = {name: value for value, _, name in (line.partition("  ") for line in lines)}
        for name in (PARAMETERS, STATE, *sums):
            if not (path / name).is_file():
                return f"{name} is missing"
            if _sum(path / name) != sums.get(name):
                return f"{name} is not what was written"
    except (OSError, ValueError) as error:
        return f"{SUMS} cannot be read ({error})"
    return None


def _read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / STATE).read_text("utf-8"))


def _sum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _remove(path: Path) -> None:
    """At once, for those who look; a kill in between leaves no half of it under its name."""
    aside = path.with_name(f".{path.name}.old{PART}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)
