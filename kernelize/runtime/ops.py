"""Picks the implementation of the operation: fused on a GPU with Triton, else chunked.

One token at a time is a step: `fused_step` there, else the reference's. The choice can be forced with
`force("reference" | "chunked" | "fused")`, or for a process with KERNELIZE_IMPLEMENTATION. What the fused kernels
cannot do goes to the others, and the log says so, once for each reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from .chunked import attend as chunked_attend
from .fused import attend as fused_attend
from .fused import autocast, supports, unsupported
from .fused_step import lacks as step_lacks
from .fused_step import step as fused_step
from .fused_step import supports as step_supports
from .fused_triton import interpreted, triton
from .reference import attend as reference_attend
from .reference import step
from .spec import KernelSpec, SpecError, choose
from .state import AttentionOutput, Kernel, State

log = logging.getLogger(__name__)
IMPLEMENTATIONS = {"reference": reference_attend, "chunked": chunked_attend, "fused": fused_attend}
_forced: str | None = None


def forced() -> str | None:
    """The implementation that somebody insists on; SpecError when there is none of that name."""
    name = _forced or os.environ.get("KERNELIZE_IMPLEMENTATION") or None
    if name is not None:
        choose("KERNELIZE_IMPLEMENTATION", name, IMPLEMENTATIONS)
    return name


def describe(spec: KernelSpec) -> str:
    """Which implementation a prefill of such a layer uses on this machine, and why; for people to read."""
    if forced():
        return f"{forced()} (forced)"
    if not torch.cuda.is_available():
        return "chunked (no GPU)"
    if triton is None:
        return "chunked (Triton is not installed)"
    reason = unsupported(spec)
    return f"chunked ({reason})" if reason else "fused"


def implementation(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> str:
    """The name of the implementation that a prefill of these tensors uses now."""
    name = forced()
    if name and name != "fused":
        return name
    reason = supports(kernel, q, k, v)
    if reason and name == "fused":
        raise SpecError(f"implementation='fused' was asked for, but {reason}")
    if reason and q.is_cuda:
        tell(reason)
    return "chunked" if reason else "fused"


@lru_cache
def tell(reason: str, instead: str = "chunked instead of fused kernels") -> None:
    log.info("%s: %s", instead, reason)


def describe_step(spec: KernelSpec) -> str:
    """Which implementation a decoding step of such a layer uses on this machine, and why; for people to read."""
    if forced() not in (None, "fused"):
        return "reference (forced)"
    if not torch.cuda.is_available():
        return "reference (no GPU)"
    reason = "Triton is not installed" if triton is None else step_lacks(spec)
    return f"reference ({reason})" if reason else "fused_step"


def attend_one(
    q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, state: State, valid: Tensor | None, branches: bool, in_place: bool
) -> tuple[AttentionOutput, State]:
    """One token: q [B, H, 1, D], k and v [B, Hk, 1, D], valid [B] -> as `attend`."""
    compiled = torch.compiler.is_compiling()  # torch.compile fuses the reference's step itself
    if compiled or branches or forced() not in (None, "fused") or not (q.is_cuda or interpreted()):
        return step(q, k, v, kernel, state, valid, in_place)
    if reason := step_supports(kernel, q, k, v, state):
        tell(reason, "the reference's step instead of the fused one")
        return step(q, k, v, kernel, state, valid, in_place)
    return fused_step(q, k, v, kernel, state, valid, in_place)


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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Kernel,
    state: State | None = None,
    valid: Tensor | None = None,
    branches: bool = True,
    keep: bool = True,
    in_place: bool = False,
) -> tuple[AttentionOutput, State]:
    """q [B, H, T, D], k and v [B, Hk, T, D], valid [B, T] bool -> (AttentionOutput over T, state after T).

    Whoever needs neither the output's `branches` nor wants to `keep` the state says so: where that saves time, the
    branches are empty then, and the state that of before. With `in_place` the state given may be overwritten.
    """
    if q.shape[2] == 1 and state is not None:
        return attend_one(q, k, v, kernel, state, None if valid is None else valid[:, 0], branches, in_place)
    q, k, v = autocast(q, k, v)
    name = implementation(kernel, q, k, v)
    if name == "fused":
        return fused_attend(q, k, v, kernel, state, valid, branches, keep=keep)
    with torch.autocast(q.device.type, enabled=False):  # what is added up over a sequence stays float32
        if name == "chunked":
            return chunked_attend(q, k, v, kernel, state, valid, branches)
        return reference_attend(q, k, v, kernel, state, valid)
