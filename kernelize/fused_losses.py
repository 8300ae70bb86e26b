"""The divergence of two LM heads in Triton: logits exist a chunk at a time, in 16 bits, and are read twice.

Forward: one kernel makes both normalisers, KL and cross-entropy of a token's two rows of logits, in one pass. Backward:
the logits of a chunk are made again, and a second kernel overwrites the student's with their gradient. So neither log
probabilities nor their gradients are written, and nothing of the size [tokens, vocabulary] is held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .runtime.fused_triton import constexpr, interpreted, jit, power_of_two, tl, triton

COLUMNS = 4096  # of the vocabulary that a program reads at once


def head_weight(head: Callable[[Tensor], Tensor] | None) -> Tensor | None:
    """The matrix [V, d] of a head that is nothing else, whole, and where the kernels can run; else None."""
    if triton is None or type(head) is not nn.Linear or head.bias is not None:
        return None
    weight = head.weight
    # not a shard, nor a parameter that an engine gathers only while its module is called
    plain = type(weight) in (nn.Parameter, Tensor) and weight.shape == (head.out_features, head.in_features)
    return weight if plain and (weight.is_cuda or interpreted()) else None


@jit
def divergence_kernel(Student, Teacher, Labels, LseStudent, LseTeacher, LsePlain, Kl, Ce, inverse, V,
                      COLUMNS: constexpr, WARM: constexpr):  # fmt: skip
    """Of one token: log normalisers at the temperature and (WARM) without, KL(teacher || student), cross-entropy."""
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
    tl.store(LseStudent + row, lse_s)
    tl.store(LseTeacher + row, lse_t)
    tl.store(LsePlain + row, lse_p)
    tl.store(Kl + row, apart / sum_t - lse_t + lse_s)
    tl.store(Ce + row, lse_p - chosen)


@jit
def divergence_grad_kernel(Student, Teacher, Labels, LseStudent, LseTeacher, LsePlain, OfKl, OfCe, inverse, V,
                           COLUMNS: constexpr):  # fmt: skip
    """Overwrites a token's logits of the student with kl (p_s − p_t) + ce (p − onehot)."""
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = Student + row * V + c
    plain = tl.load(at, mask=c < V, other=float("-inf")).to(tl.float32)
    t = tl.load(Teacher + row * V + c, mask=c < V, other=float("-inf")).to(tl.float32) * inverse
    of_kl, of_ce = tl.load(OfKl + row), tl.load(OfCe + row)
    grad = of_kl * (tl.exp(plain * inverse - tl.load(LseStudent + row)) - tl.exp(t - tl.load(LseTeacher + row)))
    hit = tl.where(c == tl.load(Labels + row), 1.0, 0.0)
    grad += tl.where(of_ce == 0.0, 0.0, of_ce * (tl.exp(plain - tl.load(LsePlain + row)) - hit))
    tl.store(at, grad.to(Student.dtype.element_ty), mask=c < V)


class DivergenceFunction(torch.autograd.Function):
    """student [N, d], teacher [N, d'], weights [V, d] and [V, d'], labels [N], T² outside -> (kl [N], ce [N]) float32.

    `step` tokens' logits exist at once, in `dtype`. A token whose gradients are both 0 moves nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor,
        temperature: float, step: int, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        N, V = student.shape[0], weight.shape[0]
        given = [x.to(dtype) for x in (student, weight, teacher, teacher_weight)]
        lses, kl, ce = student.new_empty(3, N, dtype=torch.float32), *student.new_empty(2, N, dtype=torch.float32)
        for i in range(0, N, step):
            logits, target = chunk_logits(given, i, step)
            part = slice(i, i + step)
            divergence_kernel[(len(logits),)](
                logits, target, labels[part], *lses[:, part].unbind(), kl[part], ce[part], 1 / temperature, V,
                COLUMNS=min(COLUMNS, power_of_two(V)), WARM=temperature != 1, num_warps=8,
            )  # fmt: skip
        ctx.save_for_backward(*given, labels, lses)
        ctx.temperature, ctx.step, ctx.dtypes = temperature, step, (student.dtype, weight.dtype)
        return kl, ce

    @staticmethod
    def backward(ctx: Any, of_kl: Tensor, of_ce: Tensor) -> tuple[Tensor | None, ...]:
        *given, labels, lses = ctx.saved_tensors
        student, weight, step, V = given[0], given[1], ctx.step, given[1].shape[0]
        columns = min(COLUMNS, power_of_two(V))
        of_kl, of_ce = (of_kl / ctx.temperature).contiguous(), of_ce.contiguous()
        grad = torch.empty_like(student)
        grad_weight = torch.zeros_like(weight, dtype=ctx.dtypes[1])
        for i in range(0, len(student), step):
            logits, target = chunk_logits(given, i, step)
            part = slice(i, i + step)
            divergence_grad_kernel[(len(logits), -(-V // columns))](
                logits, target, labels[part], *lses[:, part].unbind(), of_kl[part], of_ce[part],
                1 / ctx.temperature, V, COLUMNS=columns, num_warps=8,
            )  # fmt: skip
            grad[part] = logits @ weight
            grad_weight += logits.mT @ student[part]
        return grad.to(ctx.dtypes[0]), grad_weight, *[None] * 6


def chunk_logits(given: list[Tensor], first: int, step: int) -> tuple[Tensor, Tensor]:
    """Both models' logits [step, V] of the tokens from `first` on."""
    student, weight, teacher, teacher_weight = given
    part = slice(first, first + step)
    return student[part] @ weight.mT, teacher[part] @ teacher_weight.mT


def divergence(
    student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor, temperature: float,
    step: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(KL(teacher || student) at the temperature, times its square; cross-entropy) of every token, [N] float32.

    Under autocast in its dtype. Labels that do not count may be anything from −100 on; their tokens are computed, too.
    """
    device = student.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student.dtype
    with torch.autocast(device, enabled=False), torch.cuda.device_of(student):
        kl, ce = DivergenceFunction.apply(
            student, weight, teacher, teacher_weight, labels.contiguous(), temperature, step, dtype
        )
    return kl * temperature**2, ce
