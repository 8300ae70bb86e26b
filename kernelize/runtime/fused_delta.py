"""The delta rule for the fused kernels: what every token really adds to the memory when it dies.

As `chunked.corrected` (arXiv:2102.11174; the WY form, 2406.06484; decays as in 2412.06464), by the tiles in which the
memory takes tokens in. Inside a tile the corrections solve a triangular system, for all tiles at once and in torch;
from tile to tile a program walks along with the memory in its registers. With the values so corrected the rule is
additive, and the additive kernels read it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fused_memory import split
from .fused_select import TILE
from .fused_triton import Launch, constexpr, jit, power_of_two, precision, tl
from .reference import take
from .state import unit

LAUNCH = {  # chunk: entries of the memory that one program holds; few: it walks, and float32 takes registers
    "correct": Launch(heads=1, chunk=1024, warps=4, stages=2),
    "correct_grad": Launch(heads=1, chunk=2048, warps=4, stages=2),
}


@jit
def block_at(X, tile, row, n, a, c, ROWS: constexpr, COLUMNS: constexpr):
    """[rows a, columns c] of one tile's matrix [ROWS, COLUMNS], zero beyond."""
    at = X + (row * n + tile) * ROWS * COLUMNS + (a[:, None] * COLUMNS + c[None, :])
    return tl.load(at, mask=(a < ROWS)[:, None] & (c < COLUMNS)[None, :], other=0.0)


@jit
def correct_kernel(
    Own, Reads, Left, Shrink, Start, Added, Before, n,
    F: constexpr, FP: constexpr, D: constexpr, DV: constexpr, TILE: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """What each tile's tokens add, of DV channels, and the memory before each tile; Left is [F, TILE]."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    f, d, r = tl.arange(0, FP), part * DV + tl.arange(0, DV), tl.arange(0, TILE)
    wide = (f < F)[:, None] & (d < D)[None, :]
    memory = tl.load(Start + row * F * D + (f[:, None] * D + d[None, :]), mask=wide, other=0.0)
    for tile in tl.range(n):
        tl.store(Before + (row * n + tile) * F * D + (f[:, None] * D + d[None, :]), memory, mask=wide)
        reads, left = block_at(Reads, tile, row, n, r, f, TILE, F), block_at(Left, tile, row, n, f, r, F, TILE)
        added = block_at(Own, tile, row, n, r, d, TILE, D) - tl.dot(reads, memory, input_precision=PRECISION)
        tl.store(Added + (row * n + tile) * TILE * D + (r[:, None] * D + d[None, :]), added, mask=(d < D)[None, :])
        memory = memory * tl.load(Shrink + row * n + tile) + tl.dot(left, added, input_precision=PRECISION)


@jit
def correct_grad_kernel(
    Reads, Left, Shrink, Added, Before, Grad, GradOwn, GradReads, GradLeft, GradShrink, GradStart, n,
    F: constexpr, FP: constexpr, D: constexpr, DV: constexpr, TILE: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """From the last tile to the first; Reads is [F, TILE], Left [TILE, F]. All but GradOwn and GradStart are this
    part's."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    f, d, r = tl.arange(0, FP), part * DV + tl.arange(0, DV), tl.arange(0, TILE)
    wide, mine = (f < F)[:, None] & (d < D)[None, :], (d < D)[None, :]
    of_part = (part * tl.num_programs(1) + row) * n
    memory_grad = tl.zeros([FP, DV], tl.float32)
    for step in tl.range(n):
        tile = n - 1 - step
        rows = (row * n + tile) * TILE * D + (r[:, None] * D + d[None, :])
        left, reads = block_at(Left, tile, row, n, r, f, TILE, F), block_at(Reads, tile, row, n, f, r, F, TILE)
        before = block_at(Before, tile, row, n, f, d, F, D)
        added = tl.load(Added + rows, mask=mine, other=0.0)
        grad = tl.load(Grad + rows, mask=mine, other=0.0) + tl.dot(left, memory_grad, input_precision=PRECISION)
        tl.store(GradOwn + rows, grad, mask=mine)
        to = (of_part + tile) * TILE * F + (r[:, None] * F + f[None, :])
        of_left = tl.dot(added, tl.trans(memory_grad), input_precision=PRECISION)
        tl.store(GradLeft + to, of_left, mask=(f < F)[None, :])
        of_reads = tl.dot(grad, tl.trans(before), input_precision=PRECISION)
        tl.store(GradReads + to, -of_reads, mask=(f < F)[None, :])
        tl.store(GradShrink + of_part + tile, tl.sum(tl.sum(memory_grad * before, 1), 0))
        shrink = tl.load(Shrink + row * n + tile)
        memory_grad = memory_grad * shrink - tl.dot(reads, grad, input_precision=PRECISION)
    tl.store(GradStart + row * F * D + (f[:, None] * D + d[None, :]), memory_grad, mask=wide)


class CorrectFunction(torch.autograd.Function):
    """own [R, n, TILE, D], reads and left [R, n, TILE, F], shrink [R, n], start [R, F, D], float32 -> added
    [R, n, TILE, D]: added = own − reads M and M <- shrink M + leftᵀ added, tile after tile."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, reads: Tensor, left: Tensor, shrink: Tensor, start: Tensor) -> Tensor:
        own, reads, left, shrink, start = (x.contiguous() for x in (own, reads, left, shrink, start))
        (R, n, _, D), F = own.shape, reads.shape[-1]
        added, before = torch.empty_like(own), own.new_empty(R, n, F, D)
        launch = LAUNCH["correct"]
        DV, parts = split(D, F, launch.chunk)
        correct_kernel[(parts, R)](
            own, reads, left.mT.contiguous(), shrink, start, added, before, n,
            F=F, FP=power_of_two(F), D=D, DV=DV, TILE=TILE, PRECISION=precision(own.dtype), **launch.options,
        )  # fmt: skip
        ctx.save_for_backward(reads, left, shrink, added, before)
        return added

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        reads, left, shrink, added, before = ctx.saved_tensors
        R, n, F, D = before.shape
        launch = LAUNCH["correct_grad"]
        DV, parts = split(D, F, launch.chunk)
        g_own, g_start = torch.empty_like(added), before.new_empty(R, F, D)
        g_reads, g_left = (added.new_empty(parts, R, n, TILE, F) for _ in range(2))
        g_shrink = added.new_empty(parts, R, n)
        correct_grad_kernel[(parts, R)](
            reads.mT.contiguous(), left, shrink, added, before, grad.contiguous(),
            g_own, g_reads, g_left, g_shrink, g_start, n,
            F=F, FP=power_of_two(F), D=D, DV=DV, TILE=TILE, PRECISION=precision(added.dtype), **launch.options,
        )  # fmt: skip
        return g_own, g_reads.sum(0), g_left.sum(0), g_shrink.sum(0), g_start


class Tokens(NamedTuple):
    """Of the store: what the rule asks of every token."""

    phi: Tensor  # [B, Hk, X, F]
    v: Tensor  # [B, Hk, X, D]
    clock: Tensor  # [B, Hk, X]
    beta: Tensor  # [B, Hk, X]
    pos: Tensor  # [B, 1 or Hk, X]


class Deaths(NamedTuple):
    """What the memory takes in, by the order [B, Hk, n·tile] in which tokens die."""

    order: Tensor  # [R, n·tile] int32: its own places, −1 where nobody dies
    phi: Tensor  # [B, Hk, n·tile, F] float32 of length one
    added: Tensor  # [B, Hk, n·tile, D] float32
    clock: Tensor  # [B, Hk, n·tile] then


def by_position(order: Tensor, pos: Tensor, block: int) -> Tensor:
    """The order [B, Hk, n·tile] of deaths with each block's tokens by their positions, −1 last."""
    known = pos.expand(*order.shape[:2], -1).gather(2, order.clamp(min=0).long())
    known = torch.where(order < 0, torch.iinfo(torch.int64).max, known).unflatten(2, (-1, block))
    return order.unflatten(2, (-1, block)).gather(3, known.argsort(3)).flatten(2)


def corrected(order: Tensor, block: int, tokens: Tokens, clock_end: Tensor, start: Tensor) -> Deaths:
    """order [R, n·tile] int32 are the tokens by the block at which they die, clock_end [B, Hk, blocks] the clock at the
    end of each block, start [B, Hk, F, D] the memory before the first.

    Where nobody dies beta is zero, and with it all that comes of that place.
    """
    (B, Hk), n = tokens.v.shape[:2], order.shape[1] // TILE
    order = by_position(order.view(B, Hk, -1), tokens.pos, block)
    here, at = order >= 0, order.clamp(min=0).long()
    edges = torch.cat([torch.zeros_like(clock_end[:, :, :1]), clock_end], 2)
    begin = edges[:, :, :-1].repeat_interleave(block, 2)  # the clock when the block of its death begins
    left_at = tokens.clock.gather(2, at)
    clock = torch.where(here, torch.minimum(begin, left_at), begin)  # who dies on leaving is folded at its own time
    aged, beta = (clock - left_at).clamp(max=0).exp(), tokens.beta.float().gather(2, at) * here
    phi, v = unit(take(tokens.phi, at).float()), take(tokens.v, at).float()

    def tiles(x: Tensor) -> Tensor:  # [B, Hk, n·tile, ...] -> [R, n, tile, ...]
        return x.unflatten(2, (n, TILE)).flatten(0, 1)

    border = edges[:, :, :: TILE // block].flatten(0, 1)  # [R, n + 1]
    given = systems(tiles(phi), tiles(v), tiles(clock), tiles(aged), tiles(beta), border)
    added = CorrectFunction.apply(*given, start.flatten(0, 1).float())
    places = torch.arange(n * TILE, device=order.device, dtype=torch.int32)
    return Deaths(torch.where(here, places, -1).flatten(0, 1), phi, added.view(B, Hk, n * TILE, -1), clock)


def systems(
    phi: Tensor, v: Tensor, now: Tensor, aged: Tensor, beta: Tensor, border: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(own, reads, left, shrink) of `CorrectFunction`, each tile's triangular system solved.

    phi [R, n, tile, F], v [R, n, tile, D]; now, aged (a value's decay until now) and beta [R, n, tile]; border
    [R, n + 1] the clock at the tiles' borders. The system is inverted: it has fewer columns than what it is solved for.
    """
    since, until = border[:, :-1, None], border[:, 1:, None]
    decay = (now[..., :, None] - now[..., None, :]).clamp(max=0).exp()
    earlier = beta[..., None] * decay * (phi @ phi.mT)  # whose diagonal and what is above it nobody reads
    solved = torch.linalg.solve_triangular(earlier, torch.diag_embed(beta), upper=False, unitriangular=True)
    own = (solved * aged[..., None, :]) @ v
    reads = (solved * (now - since).clamp(max=0).exp()[..., None, :]) @ phi
    return own, reads, phi * (until - now).clamp(max=0).exp()[..., None], (until - since)[..., 0].exp()
