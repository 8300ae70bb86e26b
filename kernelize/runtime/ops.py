"""Picks the implementation of the operation: fused on a GPU with Triton, else chunked; one token at a time: the step.

The choice can be forced with `force("reference" | "chunked")`, or for a process with KERNELIZE_IMPLEMENTATION.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from .chunked import attend as chunked_attend
from .reference import attend as reference_attend
from .reference import step
from .spec import choose
from .state import AttentionOutput, Kernel, State

IMPLEMENTATIONS = {"reference": reference_attend, "chunked": chunked_attend}
_forced: str | None = None


def implementation() -> str:
    """The name of the implementation that a prefill uses now; SpecError when a forced one does not exist."""
    name = _forced or os.environ.get("KERNELIZE_IMPLEMENTATION") or "chunked"
    choose("KERNELIZE_IMPLEMENTATION", name, IMPLEMENTATIONS)
    return name


@contextmanager
def force(name: str) -> Iterator[None]:
    """Within the context every layer uses the implementation `name`."""
    global _forced
    choose("implementation", name, IMPLEMENTATIONS)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def attend(
    q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, state: State | None = None, valid: Tensor | None = None
) -> tuple[AttentionOutput, State]:
    """q [B, H, T, D], k and v [B, Hk, T, D], valid [B, T] bool -> (AttentionOutput over T, state after T)."""
    if q.shape[2] == 1 and state is not None:
        return step(q, k, v, kernel, state, None if valid is None else valid[:, 0])
    return IMPLEMENTATIONS[implementation()](q, k, v, kernel, state, valid)
