"""Tensors that calls share and keep, such as the bookkeeping of new sequences; and who needs them to stay.

A CUDA graph reads the memory of what its capture found here, so the graph must hold it: the next call may find the
shelf full, and throw it out. And what a capture *makes* is no value but a place that the replay fills.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from typing import Any, TypeVar

Made = TypeVar("Made")


@dataclass(eq=False)  # one is only itself
class Held:
    """What the functions of `kept` gave within `holding`, and the names of those that made it only then."""

    found: list[Any] = field(default_factory=list)
    made: list[str] = field(default_factory=list)


_holding: list[Held] = []


def kept(maxsize: int) -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    """Decorator: the `maxsize` results that were asked for last are remembered, by positional arguments."""

    def wrap(make: Callable[..., Made]) -> Callable[..., Made]:
        def noted(*key: Any) -> Made:
            for held in _holding:
                held.made.append(make.__name__)
            return make(*key)

        remembered = lru_cache(maxsize)(noted)

        @wraps(make)
        def get(*key: Any) -> Made:
            found = remembered(*key)
            for held in _holding:
                held.found.append(found)
            return found

        return get

    return wrap


@contextmanager
def holding() -> Iterator[Held]:
    """Within the context whatever a function of `kept` gives is noted, and lives as long as what the context gives."""
    held = Held()
    _holding.append(held)
    try:
        yield held
    finally:
        _holding.remove(held)
