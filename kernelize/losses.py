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

from .fused_losses import divergence, head_weight
from .recipe import DistilWeights, TransferWeights
from .runtime.attention import KernelAttention
from .runtime.layout import Layout
from .runtime.spec import KernelSpec
from .runtime.state import EMPTY, AttentionOutput, Seen, capped, forecast, host_may_look

# attention scores that the teacher's softmax holds at once: what a CPU's cache keeps (four times as fast as 1 << 24),
# and elsewhere few launches
SCORES_HELD = {"cpu": 1 << 21}
SCORES_HELD_ELSEWHERE = 1 << 26
# logits of each model that the divergence holds at once: a GPU waits for the host between small chunks
LOGITS_HELD = {"cpu": 1 << 25}
LOGITS_HELD_ELSEWHERE = 1 << 28
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


# --- forecast ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def received_later(seen: Seen, spec: KernelSpec, asked: Tensor | None = None) -> Tensor:
    """The most that softmax pays to each token, from any query of its group past the token's window: [B, Hk, T].

    Rows are whole documents. With `asked` [B, T] bool only those queries count. 0 where none comes. A block of queries
    at a time.
    """
    batch, heads, length, _ = seen.query.shape
    query = seen.query.unflatten(1, (seen.key.shape[1], -1))
    step = max(1, SCORES_HELD.get(query.device.type, SCORES_HELD_ELSEWHERE) // (batch * heads * length))
    position = torch.arange(length, device=query.device)
    leaves = (position // spec.block + spec.back + 1) * spec.block
    most = torch.zeros(*query.shape[:2], length, device=query.device)
    for start in range(0, length, step):
        end = min(start + step, length)
        visible = _visible(start, end, query.device, None)
        p, _ = softmax_weights(query[..., start:end, :], seen.key[:, :, :end], seen, visible)
        unseen = leaves[:end] > position[start:end, None]
        if asked is not None:
            unseen = unseen | ~asked[:, None, None, start:end, None]
        p = p.masked_fill(unseen, 0).amax((2, 3))
        most[:, :, :end] = torch.maximum(most[:, :, :end], p)
    return most


class ForecastTerms(NamedTuple):
    """One layer's forecast against what came: summed over the rows of the batch."""

    error: Tensor  # see `forecast_terms` and `asked_error`, mean over KV heads
    correlation: Tensor  # of the two over a row's tokens, mean over KV heads


class ForecastProbe:
    """Stands in a layer's `kernelize.probe` and `watch`: fits the forecast, and passes softmax attention on.

    The target is the largest attention that a token receives after it has left the window, as in Locret
    (arXiv:2410.01805): what is needed once, much later, counts as much as what is needed all the time. With `asked`
    [B, T] only queries there ask: then it is a share of what they look at, and heads count by how much that is.
    """

    wants_output = True  # what is watched comes from its computation

    def __init__(self) -> None:
        self.terms: ForecastTerms | None = None
        self.asked: Tensor | None = None
        self.leaving: list[tuple[dict[str, Tensor], Tensor, Tensor, Tensor]] = []

    def watch(self, statistics: dict[str, Tensor], key: Tensor, value: Tensor, pos: Tensor) -> None:
        self.leaving.append((statistics, key.detach(), value.detach(), pos))

    def __call__(
        self,
        layer: KernelAttention,
        seen: Seen,
        output: AttentionOutput,
    ) -> Tensor:
        target = received_later(seen, layer.spec, self.asked)
        arithmetic = layer.kernel_for(seen)
        found = []
        with torch.autocast(target.device.type, enabled=False):
            for statistics, key, value, pos in self.leaving:
                came = target.gather(2, pos.expand(target.shape[:2] + pos.shape[2:]).clamp(min=0))
                found.append((forecast(arithmetic, statistics, key, value, pos), came, (pos != EMPTY).expand_as(came)))
        self.leaving = []
        said, came, counts = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
        logs = forecast_terms(said, (came + LEAST_MASS).log(), counts.to(said))
        self.terms = logs if self.asked is None else logs._replace(error=asked_error(said, came, counts))
        return softmax_attention(seen)[0]


def asked_error(said: Tensor, came: Tensor, counts: Tensor) -> Tensor:
    """KL of the softmax of scores `said` from the shares of the attention `came` [B, Hk, X], over tokens that count.

    A head whose queries look at nothing far back has nothing to learn: it counts by their mass, up to 1. Mean over the
    heads, summed over the rows.
    """
    came = came * counts
    mass = came.sum(2, keepdim=True)
    share = came / mass.clamp(min=LEAST_MASS)
    guess = said.masked_fill(~counts, -torch.inf).log_softmax(2).masked_fill(~counts, 0)
    kl = (torch.xlogy(share, share) - share * guess).sum(2)
    return (kl * mass[..., 0].clamp(max=1)).mean(1).sum()


def forecast_terms(said: Tensor, came: Tensor, counts: Tensor) -> ForecastTerms:
    """Variance of the difference, and correlation, over the tokens of each row and head [B, Hk, X] that count; summed
    over the rows.

    A head's slots go by the order of its scores, so its mean is free.
    """
    n = counts.sum(2, keepdim=True).clamp(min=1)
    a, b = ((x - (x * counts).sum(2, keepdim=True) / n) * counts for x in (said, came))
    correlation = (a * b).sum(2) / (a.norm(dim=2) * b.norm(dim=2)).clamp(min=1e-9)
    return ForecastTerms((a - b).square().div(n).sum(2).mean(1).sum(), correlation.mean(1).sum())


def _documents(layout: Layout | None) -> Tensor | None:
    """The number of each token's document [B, T], -1 at padding; None where every row is one whole document."""
    if layout is None or layout.documents is not None:
        return None if layout is None else layout.documents
    return None if layout.valid is None else layout.valid.long() - 1


# --- distil -----------------------------------------------------------------------------------------------------------


class Distilled(NamedTuple):
    """The loss; and sums over the tokens that count, `answer`'s over those of answers, without gradients."""

    loss: Tensor
    kl: Tensor
    ce: Tensor
    answer: Tensor


Head = Callable[[Tensor], Tensor]  # features [N, d] -> logits [N, V]


def distillation(
    student: Tensor,  # [N, d]
    teacher: Tensor | None,  # [N, d'], or None where every token is beyond its context
    labels: Tensor,  # [N], the token that follows; -100 does not count
    asked: Tensor,  # [N] bool, where that token belongs to an answer
    beyond: Tensor,  # [N] bool, where the teacher is past its own context and has nothing to teach
    student_head: Head,
    teacher_head: Head | None,
    weights: DistilWeights,
    vocabulary: int,
    counts: Tensor | None = None,  # [2]: what to divide by, of all tokens and of answers' tokens; None: 1
) -> Distilled:
    """KL(teacher || student) at a temperature, times its square (arXiv 1503.02531), plus next-token cross-entropy, of
    all tokens, of answers' and of those beyond the teacher's context, where it stands for the KL.

    A chunk of tokens at a time: the logits of all tokens never exist at once. On a GPU, where both heads are plain
    matrices, in Triton kernels that make the gradient with the loss; else logits are computed again for it.
    """
    step = max(1, LOGITS_HELD.get(student.device.type, LOGITS_HELD_ELSEWHERE) // vocabulary)
    with_ce = weights.ce > 0 or weights.answer > 0 or weights.beyond is not None
    tokens, heads = (student, teacher, labels, asked, beyond), (student_head, teacher_head)
    mine, theirs = map(head_weight, heads)
    of_all, of_answers = (1.0, 1.0) if counts is None else counts.unbind()
    of_beyond = weights.beyond or 0.0
    if teacher is None or mine is None or theirs is None:
        totals = _chunked_totals(tokens, heads, weights.temperature, with_ce, step)
        kl, ce, answer, past = totals
        loss = (kl * weights.kl + ce * weights.ce + past * of_beyond) / of_all + answer * weights.answer / of_answers
    else:
        counted = (labels != -100).float()
        of_kl = counted * ~beyond * (weights.kl / of_all)
        of_ce = counted * ((weights.ce + beyond * of_beyond) / of_all + asked * (weights.answer / of_answers))
        loss, kl, ce = divergence(student, mine, teacher, theirs, labels, of_kl, of_ce, weights.temperature, step)
        kl, ce = (x.masked_fill(labels == -100, 0) for x in (kl, ce))
        totals = _totals(kl, ce if with_ce else torch.zeros_like(ce), asked, beyond)
    return Distilled(loss, *totals.detach()[:3])


def _chunked_totals(
    tokens: tuple[Tensor | None, ...], heads: tuple[Head, Head | None], temperature: float, with_ce: bool, step: int
) -> Tensor:
    """The sums of `_totals`; tokens are those of `distillation`. Those that do not count are left out where it costs
    nothing to find them."""
    student, _, labels, *_ = tokens
    assert student is not None
    assert labels is not None
    if host_may_look(labels):
        counted = (labels != -100).nonzero()[:, 0]
        tokens = tuple(None if part is None else part[counted] for part in tokens)
    totals = student.new_zeros(4, dtype=torch.promote_types(student.dtype, torch.float32))
    for start in range(0, len(tokens[2]), step):  # type: ignore[arg-type]
        chunk = (None if part is None else part[start : start + step] for part in tokens)
        # nothing is drawn, and a look at the generator cannot be captured
        totals = totals + checkpoint(
            _divergence, *chunk, *heads, temperature, with_ce, use_reentrant=False, preserve_rng_state=False
        )
    return totals


def _totals(kl: Tensor, ce: Tensor, asked: Tensor, beyond: Tensor) -> Tensor:
    """Sums [4] over the tokens [N]: KL where the teacher can teach; cross-entropy, that of answers, that beyond."""
    return torch.stack((kl.masked_fill(beyond, 0).sum(), ce.sum(), (ce * asked).sum(), (ce * beyond).sum()))


def _divergence(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    asked: Tensor,
    beyond: Tensor,
    student_head: Head,
    teacher_head: Head | None,
    temperature: float,
    with_ce: bool,
) -> Tensor:
    logits = student_head(student)
    kl = logits.new_zeros(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
    if teacher is not None and teacher_head is not None:
        with torch.no_grad():
            target = _log_probabilities(teacher_head(teacher), temperature)
        kl = F.kl_div(_log_probabilities(logits, temperature), target, reduction="none", log_target=True).sum(-1)
        kl = kl * temperature**2
    ce = F.cross_entropy(logits.to(kl), labels, reduction="none") if with_ce else torch.zeros_like(kl)
    kl, ce = (x.masked_fill(labels == -100, 0) for x in (kl, ce))
    return _totals(kl, ce, asked, beyond)


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)
