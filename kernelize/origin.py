"""What a training started from: a run that is resumed with another model or other data would be neither of the two."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import nn

from .errors import InputError
from .recipe import Recipe
from .subject import add_tensor

PIECES, PIECE = 64, 1 << 16  # bytes of a data file that are looked at, evenly spaced: all of a small one


def weight_prints(model: nn.Module) -> dict[str, str]:
    """A hash of every parameter, as `subject.fingerprint` takes it, by name."""
    return {name: _weight_print(name, parameter) for name, parameter in model.named_parameters()}


def _weight_print(name: str, parameter: nn.Parameter) -> str:
    digest = hashlib.blake2b(digest_size=16)
    add_tensor(digest, name, parameter)
    return digest.hexdigest()


def joint_print(prints: Mapping[str, str], without: Collection[str]) -> str:
    """One hash of all but the parameters `without`: those that a checkpoint brings itself."""
    kept = {name: value for name, value in prints.items() if name not in without}
    return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=16).hexdigest()


def data_prints(recipe: Recipe, first: int = 0) -> dict[str, str]:
    """A hash of size and content of every file that the stages from `first` on read, by its path in the recipe."""
    paths = (source.path for stage in recipe.stages[first:] for source in stage.data)
    return {path: _file_print(Path(path)) for path in dict.fromkeys(paths) if path is not None}


def _file_print(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            digest = hashlib.blake2b(str(size).encode(), digest_size=16)
            for number in range(PIECES):
                file.seek(size * number // PIECES)
                digest.update(file.read(PIECE))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()
