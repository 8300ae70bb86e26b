"""The hedgehog map (arXiv:2402.04347) in one pass: softmax(xW) ⊕ softmax(−xW), forward and backward.

The backward is spread: the memory's kernels, which have the features, turn their gradient into one of xW, half as wide;
the exact branch's kernels take that back to x; here it becomes that of W. Where a memory's program has not all features
of a tile, `HedgehogFunction` has a backward of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .feature_maps import Hedgehog
from .fused_triton import Launch, constexpr, jit, laid_out_as, power_of_two, precision, rows_first, tl
from .state import Kernel, features

STEPS = 8  # steps that one program of the backward takes
WALKS = 16  # steps of one that has nothing but W's gradient to find
LAUNCH = {  # chunk: tokens a step
    "hedgehog": Launch(heads=1, chunk=64, warps=4, stages=3),
    "hedgehog_grad": Launch(heads=1, chunk=64, warps=4, stages=1),
    "matrix_grad": Launch(heads=1, chunk=64, warps=4, stages=3),
}
SMALL = LAUNCH | {"hedgehog_grad": Launch(heads=1, chunk=64, warps=4, stages=3)}  # matrices of up to 2048 entries
# and of up to 4096: so many registers that three programs fit, each with its next tokens on their way
MEDIUM = LAUNCH | {"hedgehog_grad": Launch(heads=1, chunk=64, warps=4, stages=2, registers=168)}
SPLIT = 1024  # entries that one program splits
LARGEST = 16384  # entries of a head's matrix that fit into registers


@jit
def matrix_of(Weight, factor, h, d, c, D: constexpr, C: constexpr, CACHE: constexpr):
    """factor · W [D, C] of head h in float32; loads of another CACHE the compiler does not take for the same."""
    at, there = h * D * C + d[:, None] * C + c[None, :], (d < D)[:, None] & (c < C)[None, :]
    return tl.load(Weight + at, mask=there, other=0.0, cache_modifier=CACHE) * factor


@jit
def rounded(x):
    """Float32 as the nearest that bfloat16 has; conversions there and back are slow, as exponentials are."""
    return ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)


@jit
def product_of(x, w, again, PRECISION: constexpr):
    """x [rows, D] times w [D, C]; for 16-bit x as `hedgehog_of` says, with what rounding leaves of w from `again`."""
    z = tl.dot(x, w.to(x.dtype), input_precision=PRECISION)
    if x.dtype != tl.float32:
        z = tl.dot(x, (again - again.to(x.dtype).to(tl.float32)).to(x.dtype), z)
    return z


@jit
def split_kernel(Weight, Out, factor, C: constexpr, SIZE: constexpr, items):
    """factor · W [items of C] as rows of the rounded C entries and of the C that rounding leaves."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    w = tl.load(Weight + i, mask=i < items, other=0.0) * factor
    near = w.to(Out.dtype.element_ty)
    to = Out + i // C * (2 * C) + i % C
    tl.store(to, near, mask=i < items)
    tl.store(to + C, (w - near.to(tl.float32)).to(Out.dtype.element_ty), mask=i < items)


@jit
def parts_at(Weight, h, d, there, C: constexpr, CP: constexpr, D: constexpr):
    """[D, 2 CP] of head h, if it is `there`, from `split_kernel`: the rounded columns, then those of the rest."""
    half, c = tl.arange(0, 2 * CP) // CP, tl.arange(0, 2 * CP) % CP
    at, inside = d[:, None] * (2 * C) + (half * C + c)[None, :], (d < D)[:, None] & (c < C)[None, :]
    return tl.load(Weight + h * D * (2 * C) + at, mask=inside & there, other=0.0)


@jit
def both_halves(z, C: constexpr):
    """The map [rows, 2 CP] of z [rows, CP] in units of log 2: softmax(z) beside softmax(−z)."""
    ROWS: constexpr = z.shape[0]
    CP: constexpr = z.shape[1]
    z = tl.reshape(z, [ROWS, 1, CP])
    z = tl.where((tl.arange(0, 2) == 0)[None, :, None], z, -z)
    if C < CP:
        z = tl.where((tl.arange(0, CP) < C)[None, None, :], z, float("-inf"))
    phi = tl.exp2(z - tl.max(z, 2)[:, :, None])
    phi = phi * (1 / tl.sum(phi, 2))[:, :, None]
    return tl.reshape(phi, [ROWS, 2 * CP])


@jit
def hedgehog_of(x, w, again, c, C: constexpr, PRECISION: constexpr):
    """Both halves [rows, C] of the map of x [rows, D] by matrices w [D, C] in units of log 2.

    For 16-bit x the matrix is the sum of two, the second from `again`: w itself, or the same loaded once more so that
    its registers are free in between.
    """
    z = product_of(x, w, again, PRECISION)
    here = (c < C)[None, :]
    up = tl.exp2(z - tl.max(tl.where(here, z, float("-inf")), 1)[:, None])
    down = tl.exp2(tl.min(tl.where(here, z, float("inf")), 1)[:, None] - z)
    up, down = tl.where(here, up, 0.0), tl.where(here, down, 0.0)
    return up * (1 / tl.sum(up, 1))[:, None], down * (1 / tl.sum(down, 1))[:, None]


@jit
def hedgehog_kernel(
    Input, Weight, Out, factor, sxb, sxh, sxt, T, heads,
    D: constexpr, DP: constexpr, C: constexpr, CP: constexpr, ROWS: constexpr, PRECISION: constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    b, h = row // heads, row % heads
    t, d, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, CP)
    at = Input + b.to(tl.int64) * sxb + h.to(tl.int64) * sxh + t.to(tl.int64)[:, None] * sxt
    x = tl.load(at + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
    w = matrix_of(Weight, factor, h, d, c, D, C, "")
    up, down = hedgehog_of(x, w, w, c, C, PRECISION)
    out = Out + (row.to(tl.int64) * T + t.to(tl.int64))[:, None] * (2 * C) + c[None, :]
    keep = (t < T)[:, None] & (c < C)[None, :]
    tl.store(out, up.to(Out.dtype.element_ty), mask=keep)
    tl.store(out + C, down.to(Out.dtype.element_ty), mask=keep)


@jit
def hedgehog_grad_kernel(
    Input, Weight, Grad, More, GradX, GradW, factor, smb, smh, smt, sgb, sgh, sgt, sxb, sxh, sxt,
    scale, T, heads, splits,
    D: constexpr, DP: constexpr, C: constexpr, CP: constexpr, ROWS: constexpr, STEPS: constexpr, MORE: constexpr,
    PRECISION: constexpr,
):  # fmt: skip
    """Gradients of x, with what its other readers say (MORE), and of W summed over this program's tokens."""
    row, split = tl.program_id(1), tl.program_id(0)
    b, h = row // heads, row % heads
    d, c = tl.arange(0, DP), tl.arange(0, CP)
    w = matrix_of(Weight, factor, h, d, c, D, C, "")
    total = tl.zeros([DP, CP], tl.float32)
    for step in range(STEPS):
        t = (split * STEPS + step) * ROWS + tl.arange(0, ROWS)
        at = Input + b.to(tl.int64) * sxb + h.to(tl.int64) * sxh + t.to(tl.int64)[:, None] * sxt
        x = tl.load(at + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        up, down = hedgehog_of(x, w, w, c, C, PRECISION)
        keep = (t < T)[:, None] & (c < C)[None, :]
        g = Grad + (row.to(tl.int64) * T + t.to(tl.int64))[:, None] * (2 * C) + c[None, :]
        g_up = tl.load(g, mask=keep, other=0.0).to(tl.float32)
        g_down = tl.load(g + C, mask=keep, other=0.0).to(tl.float32)
        g_z = up * (g_up - tl.sum(up * g_up, 1)[:, None]) - down * (g_down - tl.sum(down * g_down, 1)[:, None])
        g_z = g_z.to(x.dtype)
        total = tl.dot(tl.trans(x), g_z, total, input_precision=PRECISION)
        g_x = tl.dot(g_z, tl.trans(w.to(x.dtype)), input_precision=PRECISION) * 0.6931471805599453
        mine = (t < T)[:, None] & (d < D)[None, :]
        if MORE:
            more = More + b.to(tl.int64) * smb + h.to(tl.int64) * smh + t.to(tl.int64)[:, None] * smt + d[None, :]
            g_x += tl.load(more, mask=mine, other=0.0).to(tl.float32)
        out = GradX + b.to(tl.int64) * sgb + h.to(tl.int64) * sgh + t.to(tl.int64)[:, None] * sgt + d[None, :]
        tl.store(out, g_x.to(GradX.dtype.element_ty), mask=mine)
    out = GradW + (row.to(tl.int64) * splits + split) * D * C + d[:, None] * C + c[None, :]
    tl.store(out, total * scale, mask=(d < D)[:, None] & (c < C)[None, :])


@jit
def logits_grad(phi, grad, scale):
    """(gradient of the logits [rows, C], Σ phi · grad [rows]) from the map [rows, 2 C] of scale times the logits, and
    its gradient, in float32."""
    ROWS: constexpr = phi.shape[0]
    C: constexpr = phi.shape[1] // 2
    phi, grad = tl.reshape(phi, [ROWS, 2, C]), tl.reshape(grad, [ROWS, 2, C])
    said = phi * grad
    turns = tl.sum(said, 2)
    said = said - phi * turns[:, :, None]
    return tl.sum(tl.where((tl.arange(0, 2) == 0)[None, :, None], said, -said), 1) * scale, tl.sum(turns, 1)


@jit
def of_halves(f, C: constexpr, CP: constexpr):
    """The features at the places f of two halves of CP, each for C; 2 C, which is beyond all, where there is none."""
    if C < CP:
        return tl.where(f % CP < C, f // CP * C + f % CP, 2 * C)
    else:
        return f


@jit
def matrix_grad_kernel(
    Input, GradZ, GradW, sxb, sxh, sxt, T, heads, splits, steps,
    D: constexpr, DP: constexpr, C: constexpr, CP: constexpr, ROWS: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Gradient of W from that of the logits, summed over this program's tokens."""
    row, split = tl.program_id(1).to(tl.int64), tl.program_id(0)
    d, c, r = tl.arange(0, DP), tl.arange(0, CP), tl.arange(0, ROWS)
    own = Input + row // heads * sxb + row % heads * sxh
    total = tl.zeros([DP, CP], tl.float32)
    for step in tl.range(steps):
        first = (split * steps + step) * ROWS
        live = first + r < T
        x = tl.load(own + first.to(tl.int64) * sxt + (r[:, None] * sxt + d[None, :]),
                    mask=live[:, None] & (d < D)[None, :], other=0.0)  # fmt: skip
        g_z = tl.load(GradZ + (row * T + first) * C + (r[:, None] * C + c[None, :]),
                      mask=live[:, None] & (c < C)[None, :], other=0.0)  # fmt: skip
        total = tl.dot(tl.trans(x), g_z, total, input_precision=PRECISION)
    out = GradW + (row * splits + split) * D * C + d[:, None] * C + c[None, :]
    tl.store(out, total, mask=(d < D)[:, None] & (c < C)[None, :])


def launch_of(name: str, sizes: dict[str, int]) -> Launch:
    entries = sizes["DP"] * sizes["CP"]
    return (SMALL if entries <= 2048 else MEDIUM if entries <= 4096 else LAUNCH)[name]


def sizes_of(x: Tensor, weight: Tensor) -> dict[str, int]:
    """The kernels' compile-time sizes, of x [..., D] and weight [H, D, C]."""
    D, C = x.shape[-1], weight.shape[2]
    return {"D": D, "DP": power_of_two(D), "C": C, "CP": power_of_two(C)}


def hedgehog(x: Tensor, weight: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """phi [B, H, T, 2C] of `dtype`, of x [B, H, T, D] by weight [H, D, C] in float32."""
    (B, H, T, _), sizes = x.shape, sizes_of(x, weight)
    out = torch.empty(B, H, T, 2 * sizes["C"], device=x.device, dtype=dtype)
    launch = launch_of("hedgehog", sizes)
    hedgehog_kernel[(-(-T // launch.chunk), B * H)](
        x, weight, out, factor_of(scale), *x.stride()[:3], T, H, **sizes, ROWS=launch.chunk,
        PRECISION=precision(x.dtype), **launch.options,
    )  # fmt: skip
    return out


class HedgehogFunction(torch.autograd.Function):
    """x [B, H, T, D], weight [H, D, C] float32 -> (phi [B, H, T, 2C] of `dtype`, x).

    Who reads the x that comes back has its gradient added inside the backward's kernel, not by another pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.scale = scale
        ctx.set_materialize_grads(False)  # of what nobody looks at
        return hedgehog(x, weight, scale, dtype), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, more: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return more, None, None, None
        x, weight = ctx.saved_tensors
        (B, H, T, D), sizes = x.shape, sizes_of(x, weight)
        launch = launch_of("hedgehog_grad", sizes)
        splits = -(-T // (launch.chunk * STEPS))
        grad_x, added = laid_out_as(x), x if more is None else rows_first(more)  # what is missing is not read
        grad_w = torch.empty(B, H, splits, D, weight.shape[2], device=x.device, dtype=torch.float32)
        hedgehog_grad_kernel[(splits, B * H)](
            x, weight, grad.contiguous(), added, grad_x, grad_w, factor_of(ctx.scale),
            *added.stride()[:3], *grad_x.stride()[:3], *x.stride()[:3], ctx.scale, T, H, splits,
            **sizes, ROWS=launch.chunk, STEPS=STEPS, MORE=more is not None, PRECISION=precision(x.dtype),
            **launch.options,
        )  # fmt: skip
        return grad_x, grad_w.sum((0, 2)), None, None


def matrix_grad(x: Tensor, weight: Tensor, grad_z: Tensor) -> Tensor:
    """Gradient of weight [H, D, C], from that of x @ weight [B, H, T, C]; x [B, H, T, D]."""
    (B, H, T, D), sizes = x.shape, sizes_of(x, weight)
    launch = LAUNCH["matrix_grad"]
    steps = min(WALKS, -(-T // launch.chunk))
    splits = -(-T // (launch.chunk * steps))
    grad_w = torch.empty(B, H, splits, D, sizes["C"], device=x.device, dtype=torch.float32)
    matrix_grad_kernel[(splits, B * H)](
        x, grad_z.contiguous(), grad_w, *x.stride()[:3], T, H, splits, steps, **sizes, ROWS=launch.chunk,
        PRECISION=precision(x.dtype), **launch.options,
    )  # fmt: skip
    return grad_w.sum((0, 2))


def fits(mapping: Callable[[Tensor, Tensor], Tensor] | None) -> TypeGuard[Hedgehog]:
    """Whether the kernels do this map themselves."""
    return type(mapping) is Hedgehog and power_of_two(mapping.columns) * power_of_two(mapping.head_dim) <= LARGEST


def plain(mapping: Hedgehog) -> Tensor:
    """Its matrices [H, D, C] in float32."""
    return mapping.weight.float().contiguous()


def split_matrices(weight: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """factor · weight [H, D, C] as [H, D, 2, C] of a 16-bit dtype: rounded, and what that leaves."""
    H, D, C = weight.shape
    out = torch.empty(H, D, 2, C, device=weight.device, dtype=dtype)
    split_kernel[(-(-weight.numel() // SPLIT),)](weight, out, factor, C=C, SIZE=SPLIT, items=weight.numel())
    return out


def factor_of(scale: float) -> float:
    """Of a map's matrices: in units of log 2."""
    return scale * math.log2(math.e)


def mapped(
    kernel: Kernel,
    mapping: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    pos: Callable[[], Tensor],
    dtype: torch.dtype,
    alone: bool = False,
) -> tuple[Tensor, Tensor]:
    """(phi of x [B, H, T, D] at pos() [B, 1 or H, T]: [B, H, T, F] of `dtype`; x, for who else reads it).

    `alone`: without a backward, for others make it.
    """
    if not fits(mapping):
        return features(kernel, mapping, x, pos()).to(dtype).contiguous(), x
    rows, matrices, scale = rows_first(x), plain(mapping), kernel.scaling**0.5
    if alone:
        return hedgehog(rows.detach(), matrices.detach(), scale, dtype), x
    phi, same = HedgehogFunction.apply(rows, matrices, scale, dtype)
    return phi, same if x.requires_grad else x  # where the map alone is trained, nobody need say anything about x
