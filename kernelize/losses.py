"""What training minimises: a layer's error against softmax on the same q, k, v; and the divergence from the teacher.

Every loss is a sum (over rows, or over tokens), so that dividing by the count in the global batch gives the same
number for every micro-batch size and every number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .recipe import DistilWeights, TransferWeights
from .runtime.attention import KernelAttention
from .runtime.layout import Layout
from .runtime.state import AttentionOutput, Seen, capped

# attention scores that the teacher's softmax holds at once: what a CPU's cache keeps (four times as fast as 1 << 24),
# and elsewhere few launches
SCORES_HELD = {"cpu": 1 << 21}
SCORES_HELD_ELSEWHERE = 1 << 26
LOGITS_HELD = 1 << 25  # logits of each model that the divergence holds at once
LEAST_MASS = 1e-4  # out-of-window mass below which a token has no target: there the quotients are rounding alone


# --- transfer ---------------------------------------------------------------------------------------------------------


def softmax(seen: Seen) -> tuple[Tensor, Tensor]:
    """The layer's original attention, causal and inside each document, and its log-sum-exp: [B, H, T, Dv], [B, H, T].

    A block of queries at a time: nothing T x T is held, and keys and values are not repeated for grouped heads.
    """
    batch, heads, length, _ = seen.query.shape
    query = seen.query.unflatten(1, (seen.key.shape[1], -1))
    documents = _documents(seen.layout)
    held = SCORES_HELD.get(query.device.type, SCORES_HELD_ELSEWHERE)
    step = max(1, held // (batch * heads * length))
    parts = []
    for start in range(0, length, step):
        end = min(start + step, length)
        visible = _visible(start, end, query.device, documents)
        p, lse = softmax_weights(query[..., start:end, :], seen.key[..., :end, :], seen, visible)
        parts.append((torch.einsum("bkgqt,bktd->bkgqd", p, seen.value[..., :end, :]), lse))
    y, lse = (torch.cat(part, dim) for part, dim in zip(zip(*parts, strict=True), (-2, -1), strict=True))
    return y.flatten(1, 2), lse.flatten(1, 2)


softmax_attention = torch.no_grad()(softmax)


def _visible(start: int, end: int, device: torch.device, documents: Tensor | None) -> Tensor:
    """Which of the keys 0 … end-1 the queries start … end-1 see: [1 or B, 1, 1, queries, keys]."""
    positions = torch.arange(end, device=device)
    causal = (positions <= positions[start:, None])[None]
    if documents is not None:
        causal = causal & (documents[:, start:end, None] == documents[:, None, :end])
    return causal[:, None, None]


def softmax_weights(query: Tensor, key: Tensor, seen: Seen, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [B, Hk, G, queries, keys] under the scaling, soft cap and sinks of `seen`, and their log-sum-exp.

    query [B, Hk, G, queries, D], key [B, Hk, keys, D]; with sinks the probabilities of a query sum to less than 1.
    """
    scores = capped(torch.einsum("bkgqd,bktd->bkgqt", query, key) * seen.scaling, seen.softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    if seen.sink_logits is not None:
        lse = torch.logaddexp(lse, seen.sink_logits.to(lse).view(*query.shape[1:3], 1))
    return (scores - lse[..., None]).exp(), lse


class Far(NamedTuple):
    """What softmax attention takes from outside the student's exact set: the memory's target."""

    y: Tensor  # [B, H, T, D]
    lse: Tensor  # [B, H, T]
    mass: Tensor  # [B, H, T], the share of the whole; 0 where there is nothing to learn


def far_part(y: Tensor, lse: Tensor, exact: Tensor, exact_lse: Tensor, seen: Tensor) -> Far:
    """The softmax over all keys, (y, lse), less the student's part of it, (exact, exact_lse).

    (e^lse y - e^exact_lse exact) / (e^lse - e^exact_lse), through the share of mass, which never overflows.
    `seen` [B, H, T] marks the queries that have a target at all.
    """
    mass = -torch.expm1((exact_lse - lse).clamp(max=0))
    there = seen & (mass > LEAST_MASS)
    divisor = mass.where(there, 1)
    target = (y - (1 - mass)[..., None] * exact) / divisor[..., None]
    return Far(target, lse + divisor.log(), mass.where(there, 0))


class TransferTerms(NamedTuple):
    """One layer's errors, each summed over the rows of the batch."""

    output: Tensor
    far: Tensor
    mass: Tensor

    def weighted(self, weights: TransferWeights) -> Tensor:
        return self.output * weights.output + self.far * weights.far + self.mass * weights.mass


def transfer_terms(teacher: Tensor, far: Far, output: AttentionOutput, valid: Tensor) -> TransferTerms:
    """The errors of `output` against the teacher's attention [B, H, T, D]; `valid` [B, 1, T] leaves padding out.

    - output: |y - teacher|^2 / |teacher|^2
    - far: the out-of-window part alone, weighted by its mass p: sum p |memory - target|^2 / sum p |target|^2
    - mass: sum p (memory_lse - target_lse)^2 / sum p
    """
    keep = valid.to(teacher.dtype)
    mass = far.mass * keep
    memory_lse = output.memory_lse.to(far.lse).where(mass > 0, 0)
    far_lse = far.lse.where(mass > 0, 0)
    return TransferTerms(
        _ratio(_squares(output.y.to(teacher) - teacher) * keep, _squares(teacher) * keep),
        _ratio(_squares(output.memory.to(teacher) - far.y) * mass, _squares(far.y) * mass),
        _ratio((memory_lse - far_lse).square() * mass, mass),
    )


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(-1)


def _ratio(error: Tensor, scale: Tensor) -> Tensor:
    """Both [B, H, T]: the quotient of their sums in each row, 0 for a row without scale, summed over the rows."""
    error, scale = error.flatten(1).sum(1), scale.flatten(1).sum(1)
    return (error / scale.where(scale > 0, 1)).sum()


class TransferProbe:
    """Stands in a layer's `kernelize.probe`: measures its errors, and passes the teacher's output on.

    So every layer sees the hidden states that it would see in the teacher, and its error depends on no other layer:
    no second model is needed, and gradients reach the layer's own new parameters alone.
    """

    wants_output = True

    def __init__(self) -> None:
        self.terms: TransferTerms | None = None

    def __call__(
        self,
        layer: KernelAttention,
        seen: Seen,
        output: AttentionOutput,
    ) -> Tensor:
        query, documents = seen.query, _documents(seen.layout)
        # in reduced precision the difference of two log-sum-exps, which is what the memory learns, would be noise
        with torch.autocast(query.device.type, enabled=False):
            wide = torch.promote_types(query.dtype, torch.float32)
            inputs = {name: getattr(seen, name).to(wide) for name in ("query", "key", "value")}
            y, lse = softmax_attention(seen._replace(**inputs))
            with torch.no_grad():
                filled = output.memory_lse.isfinite()
                far = far_part(y, lse, output.exact.to(wide), output.exact_lse.to(wide), filled)
                valid = torch.ones_like(lse[:, :1], dtype=torch.bool) if documents is None else documents[:, None] >= 0
            self.terms = transfer_terms(y, far, output, valid)
        return y.to(query.dtype)


def _documents(layout: Layout | None) -> Tensor | None:
    """The number of each token's document [B, T], -1 at padding; None where every row is one whole document."""
    if layout is None or layout.documents is not None:
        return None if layout is None else layout.documents
    return None if layout.valid is None else layout.valid.long() - 1


# --- distil -----------------------------------------------------------------------------------------------------------


class Distilled(NamedTuple):
    """Sums over the tokens that count."""

    loss: Tensor
    kl: Tensor
    ce: Tensor


Head = Callable[[Tensor], Tensor]  # features [N, d] -> logits [N, V]


def distillation(
    student: Tensor,  # [N, d]
    teacher: Tensor,  # [N, d']
    labels: Tensor,  # [N], the token that follows; -100 does not count
    student_head: Head,
    teacher_head: Head,
    weights: DistilWeights,
    vocabulary: int,
) -> Distilled:
    """KL(teacher || student) at a temperature, times its square (arXiv 1503.02531), plus next-token cross-entropy.

    A chunk of tokens at a time, recomputed for the gradient: the logits of all tokens never exist at once.
    """
    counted = labels != -100
    student, teacher, labels = student[counted], teacher[counted], labels[counted]
    step = max(1, LOGITS_HELD // vocabulary)
    totals = student.new_zeros(2, dtype=torch.promote_types(student.dtype, torch.float32))
    for start in range(0, len(labels), step):
        chunk = (part[start : start + step] for part in (student, teacher, labels))
        totals = totals + checkpoint(
            _divergence, *chunk, student_head, teacher_head, weights.temperature, weights.ce > 0, use_reentrant=False
        )
    kl, ce = totals
    return Distilled(kl * weights.kl + ce * weights.ce, kl.detach(), ce.detach())


def _divergence(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    student_head: Head,
    teacher_head: Head,
    temperature: float,
    with_ce: bool,
) -> Tensor:
    with torch.no_grad():
        target = _log_probabilities(teacher_head(teacher), temperature)
    logits = student_head(student)
    kl = F.kl_div(_log_probabilities(logits, temperature), target, reduction="sum", log_target=True)
    ce = F.cross_entropy(logits.to(target), labels, reduction="sum") if with_ce else torch.zeros_like(kl)
    return torch.stack((kl * temperature**2, ce))


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)
