"""The divergence of two LM heads in Triton: logits exist once, a chunk of tokens at a time, in 16 bits.

A program makes both normalisers, KL and cross-entropy of a token's two rows of logits, then overwrites the student's
with their gradient, for which it reads what it has just read. So the gradient is made with the loss, which is told what
every token counts; a backward pass only scales it. Neither log probabilities nor their gradients are written, and
nothing of the size [tokens, vocabulary] is held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .runtime.fused_triton import constexpr, interpreted, jit, power_of_two, tl, triton

COLUMNS, WARPS = 4096, 8  # of the vocabulary that a program reads at once, and by how many warps


def head_weight(head: Callable[[Tensor], Tensor] | None) -> Tensor | None:
    """The matrix [V, d] of a head that is nothing else, whole, and where the kernels can run; else None."""
    if triton is None or type(head) is not nn.Linear or head.bias is not None:
        return None
    weight = head.weight
    # not a shard, nor a parameter that an engine gathers only while its module is called
    plain = type(weight) in (nn.Parameter, Tensor) and weight.shape == (head.out_features, head.in_features)
    return weight if plain and (weight.is_cuda or interpreted()) else None


@jit
def divergence_kernel(Student, Teacher, Labels, OfKl, OfCe, Kl, Ce, inverse, V, COLUMNS: constexpr, WARM: constexpr,
                      GRAD: constexpr):  # fmt: skip
    """Of one token: KL(teacher || student) at the temperature, which is 1 unless WARM, and cross-entropy.

    GRAD: overwrites the student's logits with kl (p_s − p_t) + ce (p − onehot).
    """
    row = tl.program_id(0).to(tl.int64)
    top_s, top_t, top_p = -1e30, -1e30, -1e30
    sum_s, sum_t, sum_p, apart = 0.0, 0.0, 0.0, 0.0
    for first in range(0, V, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        plain = tl.load(Student + row * V + c, mask=c < V, other=float("-inf")).to(tl.float32)
        s = plain * inverse
        t = tl.load(Teacher + row * V + c, mask=c < V, other=float("-inf")).to(tl.float32) * inverse
        new = tl.maximum(top_s, tl.max(s, 0))
        sum_s, top_s = sum_s * tl.exp(top_s - new) + tl.sum(tl.exp(s - new), 0), new
        new = tl.maximum(top_t, tl.max(t, 0))
        shrink, p = tl.exp(top_t - new), tl.exp(t - new)
        apart = apart * shrink + tl.sum(tl.where((c < V) & (p > 0), p * (t - s), 0.0), 0)
        sum_t, top_t = sum_t * shrink + tl.sum(p, 0), new
        if WARM:
            new = tl.maximum(top_p, tl.max(plain, 0))
            sum_p, top_p = sum_p * tl.exp(top_p - new) + tl.sum(tl.exp(plain - new), 0), new
    lse_s, lse_t = top_s + tl.log(sum_s), top_t + tl.log(sum_t)
    lse_p = lse_s
    if WARM:
        lse_p = top_p + tl.log(sum_p)
    label = tl.load(Labels + row)
    chosen = tl.load(Student + row * V + tl.maximum(label, 0)).to(tl.float32)
    tl.store(Kl + row, apart / sum_t - lse_t + lse_s)
    tl.store(Ce + row, lse_p - chosen)
    if GRAD:
        tl.debug_barrier()  # all threads have read the label's logit
        of_kl, of_ce = tl.load(OfKl + row), tl.load(OfCe + row)
        for first in range(0, V, COLUMNS):
            c = first + tl.arange(0, COLUMNS)
            plain = tl.load(Student + row * V + c, mask=c < V, other=float("-inf")).to(tl.float32)
            t = tl.load(Teacher + row * V + c, mask=c < V, other=float("-inf")).to(tl.float32) * inverse
            grad = tl.where(of_kl == 0.0, 0.0, of_kl * (tl.exp(plain * inverse - lse_s) - tl.exp(t - lse_t)))
            hit = tl.where(c == label, 1.0, 0.0)
            grad += tl.where(of_ce == 0.0, 0.0, of_ce * (tl.exp(plain - lse_p) - hit))
            tl.store(Student + row * V + c, grad.to(Student.dtype.element_ty), mask=c < V)


class DivergenceFunction(torch.autograd.Function):
    """Sum over tokens of of_kl kl + of_ce ce, and both without gradients: (scalar, kl [N], ce [N]) in float32.

    student [N, d], teacher [N, d'], weights [V, d] and [V, d'], labels [N], of_kl and of_ce [N] float32. `step` tokens'
    logits exist at once, in `dtype`. A token of which neither counts moves nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor,
        of_kl: Tensor, of_ce: Tensor, temperature: float, step: int, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        N, V = student.shape[0], weight.shape[0]
        given = [x.to(dtype) for x in (student, weight, teacher, teacher_weight)]
        kl, ce = student.new_empty(2, N, dtype=torch.float32)
        asks = ctx.needs_input_grad[:2]
        grad = torch.empty_like(given[0]) if any(asks) else None
        grad_weight = torch.zeros_like(weight) if asks[1] else None
        unit = unit_of(of_kl, of_ce)  # what a token counts may be small in 16 bits: its gradient is scaled later
        scaled = of_kl / (unit * temperature), of_ce / unit
        for i in range(0, N, step):
            logits, target = chunk_logits(given, i, step)
            part = slice(i, i + step)
            divergence_kernel[(len(logits),)](
                logits, target, labels[part], *(x[part] for x in scaled), kl[part], ce[part], 1 / temperature, V,
                COLUMNS=min(COLUMNS, power_of_two(V)), WARM=temperature != 1, GRAD=any(asks), num_warps=WARPS,
            )  # fmt: skip
            if grad is not None:
                grad[part] = logits @ given[1]
            if grad_weight is not None:
                grad_weight += logits.mT @ given[0][part]
        ctx.save_for_backward(*(grad if asked else None for asked, grad in zip(asks, (grad, grad_weight), strict=True)))
        ctx.unit, ctx.dtype = unit, student.dtype
        ctx.mark_non_differentiable(kl, ce)
        loss = sum((of * x).masked_fill(of == 0, 0).sum() for of, x in ((of_kl, kl), (of_ce, ce)))
        return loss, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Scales in place: a second gradient of head matrices beside all activations may not fit. So it runs once."""
        grad, grad_weight = (None if x is None else x.mul_(of_loss * ctx.unit) for x in ctx.saved_tensors)
        return None if grad is None else grad.to(ctx.dtype), grad_weight, *[None] * 8


def unit_of(*weights: Tensor) -> Tensor:
    """A power of two, so that products with it are exact in 16 bits, no less than the largest of the weights [N]."""
    least = weights[0].new_full((1,), torch.finfo(torch.float32).tiny)
    return torch.cat((*weights, least)).amax().log2().ceil().exp2()


def chunk_logits(given: list[Tensor], first: int, step: int) -> tuple[Tensor, Tensor]:
    """Both models' logits [step, V] of the tokens from `first` on."""
    student, weight, teacher, teacher_weight = given
    part = slice(first, first + step)
    return student[part] @ weight.mT, teacher[part] @ teacher_weight.mT


def divergence(
    student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor, of_kl: Tensor,
    of_ce: Tensor, temperature: float, step: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(sum of of_kl kl + of_ce ce; KL(teacher || student) at the temperature, times its square; cross-entropy).

    The last two of every token, [N] float32, without gradients; of_kl and of_ce [N] ≥ 0 have none either. Under
    autocast in its dtype. Labels that do not count may be anything from −100 on; their tokens are computed, too.
    """
    if not torch.is_grad_enabled():
        student, weight = student.detach(), weight.detach()  # a Function's forward is not told
    device = student.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student.dtype
    with torch.autocast(device, enabled=False), torch.cuda.device_of(student):
        loss, kl, ce = DivergenceFunction.apply(
            student, weight, teacher, teacher_weight, labels.contiguous(), of_kl * temperature**2, of_ce, temperature,
            step, dtype,
        )  # fmt: skip
    return loss, kl * temperature**2, ce
