"""The hedgehog map (arXiv:2402.04347) in one pass: softmax(xW) ⊕ softmax(−xW), forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .feature_maps import Hedgehog
from .fused_triton import constexpr, jit, power_of_two, precision, rows_first, tl
from .state import Kernel, features

ROWS = 64  # tokens a step
STEPS = 8  # steps that one program of the backward takes
LARGEST = 16384  # entries of a head's matrix that fit into registers


@jit
def projected(x, Weight, h, d, c, D: constexpr, C: constexpr, PRECISION: constexpr):
    """x [rows, D] by the head's float32 matrix; a 16-bit x takes it as the sum of two 16-bit matrices."""
    w = tl.load(Weight + h * D * C + d[:, None] * C + c[None, :], mask=(d < D)[:, None] & (c < C)[None, :], other=0.0)
    if x.dtype == tl.float32:
        return tl.dot(x, w, input_precision=PRECISION)
    high = w.to(x.dtype)
    return tl.dot(x, high) + tl.dot(x, (w - high.to(tl.float32)).to(x.dtype))


@jit
def softmax_rows(z):
    e = tl.exp(z - tl.max(z, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@jit
def hedgehog_kernel(
    Input, Weight, Out, sxb, sxh, sxt, scale, T, heads,
    D: constexpr, DP: constexpr, C: constexpr, CP: constexpr, ROWS: constexpr, PRECISION: constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    b, h = row // heads, row % heads
    t, d, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, CP)
    at = Input + b.to(tl.int64) * sxb + h.to(tl.int64) * sxh + t.to(tl.int64)[:, None] * sxt
    x = tl.load(at + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
    z = projected(x, Weight, h, d, c, D, C, PRECISION) * scale
    out = Out + (row.to(tl.int64) * T + t.to(tl.int64))[:, None] * (2 * C) + c[None, :]
    keep = (t < T)[:, None] & (c < C)[None, :]
    tl.store(out, softmax_rows(tl.where((c < C)[None, :], z, float("-inf"))).to(Out.dtype.element_ty), mask=keep)
    tl.store(out + C, softmax_rows(tl.where((c < C)[None, :], -z, float("-inf"))).to(Out.dtype.element_ty), mask=keep)


@jit
def hedgehog_grad_kernel(
    Input, Weight, Grad, GradX, GradW, sxb, sxh, sxt, scale, T, heads, splits,
    D: constexpr, DP: constexpr, C: constexpr, CP: constexpr, ROWS: constexpr, STEPS: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Gradients of x, and of W summed over this program's tokens."""
    row, split = tl.program_id(1), tl.program_id(0)
    b, h = row // heads, row % heads
    d, c = tl.arange(0, DP), tl.arange(0, CP)
    w = tl.load(Weight + h * D * C + d[:, None] * C + c[None, :], mask=(d < D)[:, None] & (c < C)[None, :], other=0.0)
    total = tl.zeros([DP, CP], tl.float32)
    for step in range(STEPS):
        t = (split * STEPS + step) * ROWS + tl.arange(0, ROWS)
        at = Input + b.to(tl.int64) * sxb + h.to(tl.int64) * sxh + t.to(tl.int64)[:, None] * sxt
        x = tl.load(at + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        z = projected(x, Weight, h, d, c, D, C, PRECISION) * scale
        up = softmax_rows(tl.where((c < C)[None, :], z, float("-inf")))
        down = softmax_rows(tl.where((c < C)[None, :], -z, float("-inf")))
        keep = (t < T)[:, None] & (c < C)[None, :]
        g = Grad + (row.to(tl.int64) * T + t.to(tl.int64))[:, None] * (2 * C) + c[None, :]
        g_up = tl.load(g, mask=keep, other=0.0).to(tl.float32)
        g_down = tl.load(g + C, mask=keep, other=0.0).to(tl.float32)
        g_z = up * (g_up - tl.sum(up * g_up, 1)[:, None]) - down * (g_down - tl.sum(down * g_down, 1)[:, None])
        g_z = (g_z * scale).to(x.dtype)
        total += tl.dot(tl.trans(x), g_z, input_precision=PRECISION)
        g_x = tl.dot(g_z, tl.trans(w.to(x.dtype)), input_precision=PRECISION)
        out = GradX + (row.to(tl.int64) * T + t.to(tl.int64))[:, None] * D + d[None, :]
        tl.store(out, g_x.to(GradX.dtype.element_ty), mask=(t < T)[:, None] & (d < D)[None, :])
    out = GradW + (row.to(tl.int64) * splits + split) * D * C + d[:, None] * C + c[None, :]
    tl.store(out, total, mask=(d < D)[:, None] & (c < C)[None, :])


class HedgehogFunction(torch.autograd.Function):
    """x [B, H, T, D], weight [H, D, C] float32 -> phi [B, H, T, 2C] of `dtype`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        B, H, T, D = x.shape
        C = weight.shape[2]
        out = torch.empty(B, H, T, 2 * C, device=x.device, dtype=dtype)
        sizes = {"D": D, "DP": power_of_two(D), "C": C, "CP": power_of_two(C), "ROWS": ROWS}
        hedgehog_kernel[(-(-T // ROWS), B * H)](
            x, weight, out, *x.stride()[:3], scale, T, H, **sizes, PRECISION=precision(x.dtype)
        )
        ctx.save_for_backward(x, weight)
        ctx.scale, ctx.sizes = scale, sizes
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        B, H, T, D = x.shape
        splits = -(-T // (ROWS * STEPS))
        grad_x = torch.empty(B, H, T, D, device=x.device, dtype=x.dtype)
        grad_w = torch.empty(B, H, splits, D, weight.shape[2], device=x.device, dtype=torch.float32)
        hedgehog_grad_kernel[(splits, B * H)](
            x, weight, grad.contiguous(), grad_x, grad_w, *x.stride()[:3], ctx.scale, T, H, splits,
            **ctx.sizes, STEPS=STEPS, PRECISION=precision(x.dtype), num_warps=8, num_stages=1,
        )  # fmt: skip
        return grad_x, grad_w.sum((0, 2)), None, None


def mapped(
    kernel: Kernel,
    mapping: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    pos: Callable[[], Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """phi of x [B, H, T, D] at pos() [B, 1 or H, T] -> [B, H, T, F] of `dtype`; a hedgehog map in one pass."""
    if type(mapping) is Hedgehog and power_of_two(mapping.columns) * power_of_two(mapping.head_dim) <= LARGEST:
        return HedgehogFunction.apply(rows_first(x), mapping.weight.float().contiguous(), kernel.scaling**0.5, dtype)
    return features(kernel, mapping, x, pos()).to(dtype).contiguous()
