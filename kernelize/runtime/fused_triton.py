"""Triton, where it is installed; kernels are then compiled on a GPU, or interpreted on the CPU for tests."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:
    triton = tl = constexpr = None

LENGTHS = ("W", "X", "T", "n", "length", "segments", "tiles", "lists", "blocks", "front", "splits", "first",
           "capacity", "width", "chunks", "limit", "items", "groups", "in_row", "in_step", "share",
           "places")  # fmt: skip


def jit(function: Any) -> Any:
    """A kernel that is not compiled anew for each length or slot count; without Triton never called."""
    return function if triton is None else triton.jit(function, do_not_specialize=LENGTHS)


def interpreted() -> bool:
    """Whether Triton runs kernels in Python (TRITON_INTERPRET=1, read when it was imported)."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def precision(dtype: torch.dtype) -> str:
    """How a product of two float32 matrices is computed; others are exact in float32 anyway."""
    return "ieee" if interpreted() or dtype != torch.float32 else "tf32x3"


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two from `least` on that holds n."""
    return max(least, 1 << max(n - 1, 0).bit_length())


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may take on a GPU; 0 for what only stands in for one."""
    if device.type != "cuda":
        return 0
    return triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]


def rows_first(x: Tensor) -> Tensor:
    """x with a contiguous last axis, as the kernels need it; a copy only where it has none."""
    return x if x.stride(-1) == 1 else x.contiguous()


def laid_out_as(x: Tensor) -> Tensor:
    """Room for a tensor like x, in the layout of x: what made x takes its gradient like that without a copy."""
    return rows_first(torch.empty_like(x))


AMPLE = 200_000  # bytes of shared memory, as on Hopper, in which loads may be stages ahead
LONG = 64  # tokens of a tile, and the most of a block


class Launch(NamedTuple):
    """How a kernel is launched; `benchmarks/layer.py tune` tries others."""

    heads: int  # of a group that one program takes
    chunk: int  # keys, or entries, that are read together
    warps: int
    stages: int  # chunks that are on their way at once
    registers: int | None = None  # of a thread, at most: fewer let more programs stand on a multiprocessor
    tile: int = LONG  # tokens, of each of its heads
    near: int = 0  # keys of the window before the tile, at most, that the exact branch reads together with the tile's
    split: bool = False  # the queries' matrices are cut in two by a launch of its own, where many programs read them

    def of_group(self, group: int, block: int, window: int) -> Launch:
        """For `group` heads a key head, for blocks, and for queries that look back so far.

        `warps` are then all of them. Short tiles look at fewer keys; long ones, of as many heads less, are for small
        groups, whose rows would not fill a program, and for those that padding makes cost more.
        """
        times = LONG // self.tile
        long = self
        if times > 1:  # whose own keys leave no room for earlier ones
            long = self._replace(heads=max(self.heads // times, 1), warps=self.warps * times, tile=LONG, near=0)
        few = power_of_two(group, 1)
        short = block <= self.tile and few >= self.heads
        best = self if short and self.work(group, window) < long.work(group, window) else long
        heads = min(few, best.heads)
        return best._replace(heads=heads, warps=best.warps * heads)

    def of_places(self, places: int) -> Launch:
        """For so many places: by half chunks where the last whole one would be half empty."""
        half = max(self.chunk // 2, LONG)
        return self if -(-places // half) * half % self.chunk == 0 else self._replace(chunk=half, warps=self.warps // 2)

    def work(self, group: int, window: int) -> int:
        """Scores through the window for each token of a group."""
        return -(-group // self.heads) * self.heads * self.reach(window) * self.tile

    def reach(self, window: int) -> int:
        """Tiles of keys that a tile sees: its own, and those that begin no more than a window before it."""
        return -(-window // self.tile) + 1

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}
