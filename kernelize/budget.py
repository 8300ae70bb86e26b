"""Slot budgets that differ by layer, or by KV head: what a slot is worth there, measured in one backward pass.

What a layer's attention error δ costs at the output is, to second order, ½ E (g·δ)² with g the gradient of the log
probability of a token drawn from the teacher (the Fisher information). One backward through the teacher gives g for
every layer at once, and δ comes from the layer's own q, k, v under each number of slots: no layer is tried alone. Of a
single KV head it is the same with the δ of its query heads alone.
Texts whose answer stands far back (`retrieval_text`) weigh in with the cost of the answer alone, since perplexity
hardly notices retrieval.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .calibrate import reading_device
from .losses import softmax, softmax_attention
from .plan import ConversionPlan
from .runtime import ops
from .runtime.attention import KernelAttention
from .runtime.modeling import kernelized_layers, plan_entry, plan_of
from .runtime.spec import mean_slots
from .runtime.state import Seen

SIZES = (16, 64, 176, 416)  # slots at which a layer's cost is measured
LEAST, STEP = 16, 8  # slots: the smallest budget of a layer, and the unit in which the rest is given out
MOST = 1024  # slots: what the fused kernels take; no layer or head gets more, unless all have as many on average
RETRIEVAL_WEIGHT = 0.03  # of a nat of an answer's loss, against a nat of ordinary text's divergence
K = TypeVar("K")
NAMES = ("Abel", "Brook", "Cleo", "Dorian", "Edda", "Flint", "Greta", "Hollis", "Ivor", "Juno", "Kell", "Lark")


@dataclass
class BudgetText:
    """One calibration text: token ids [1, T]; `answer`, its last tokens that alone count, or 0 for ordinary text."""

    ids: Tensor
    answer: int = 0


@dataclass
class CostProbe:
    """Stands in a layer's `kernelize.probe`: passes softmax attention on, and prices its own error in the backward."""

    wants_output: ClassVar[bool] = False
    sizes: Sequence[int]
    by_head: bool = False
    cost: dict[bool, Tensor] = field(default_factory=dict)  # retrieval or not -> [1 or Hk, sizes], summed
    retrieval: bool = False

    def __call__(self, layer: KernelAttention, seen: Seen, output: None) -> Tensor:
        teacher = softmax_attention(seen)[0]
        errors = [self.error(layer, seen, size, teacher) for size in self.sizes]
        exact = differentiable_softmax(seen)
        parts = seen.key.shape[1] if self.by_head else 1
        exact.register_hook(lambda gradient: self.price(gradient, errors, parts))
        return exact

    @torch.no_grad()
    def error(self, layer: KernelAttention, seen: Seen, size: int, teacher: Tensor) -> Tensor:
        """What the layer with `size` slots does wrong, [B, H, T, D]."""
        kernel = layer.kernel_for(seen)
        resized = kernel._replace(spec=kernel.spec.replace(slots=size, head_slots=()))
        return ops.attend(*seen[:3], resized)[0].y - teacher

    def price(self, gradient: Tensor, errors: list[Tensor], parts: int) -> None:
        moves = [(gradient * error).unflatten(1, (parts, -1)).sum((2, 4)) for error in errors]  # [B, parts, T] each
        cost = torch.stack([move.square().sum((0, 2)) / 2 for move in moves], -1)
        self.cost[self.retrieval] = self.cost.get(self.retrieval, torch.zeros_like(cost)) + cost


def differentiable_softmax(seen: Seen) -> Tensor:
    """Softmax attention [B, H, T, D] with a gradient; scaled_dot_product_attention knows neither soft cap nor sinks."""
    q, k, v = seen[:3]
    if seen.softcap is None and seen.sink_logits is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=seen.scaling, enable_gqa=True)
    again = partial(_softmax_of, seen)
    return checkpoint(again, q, k, v, use_reentrant=False)  # else the scores of all layers would be held


def _softmax_of(seen: Seen, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return softmax(seen._replace(query=query, key=key, value=value))[0]


def retrieval_text(tokenizer: PreTrainedTokenizerBase, filler: Sequence[int], length: int, seed: int) -> BudgetText:
    """`length` tokens of `filler` in which three people's numbers are hidden, then one of them asked for."""
    rng = random.Random(seed)
    people = rng.sample(NAMES, 3)
    numbers = [str(rng.randrange(10**5, 10**6)) for _ in people]
    facts = [
        tokenizer(f"\nNote: the locker of {name} opens with {number}.\n", add_special_tokens=False).input_ids
        for name, number in zip(people, numbers, strict=True)
    ]
    chosen = rng.randrange(3)
    question = tokenizer(f"\nNote: the locker of {people[chosen]} opens with", add_special_tokens=False).input_ids
    answer = tokenizer(f" {numbers[chosen]}", add_special_tokens=False).input_ids
    room = length - len(question) - len(answer) - sum(map(len, facts))
    text = list(filler[:room])
    for fact, place in zip(facts, sorted(rng.sample(range(8, room * 3 // 4), 3), reverse=True), strict=True):
        text[place:place] = fact
    return BudgetText(torch.tensor([text + question + answer]), len(answer))


def layer_costs(
    model: PreTrainedModel,
    texts: Sequence[BudgetText],
    sizes: Sequence[int] = SIZES,
    seed: int = 0,
    on_text: Callable[[], None] = lambda: None,
    by_head: bool = False,
) -> dict[int, Tensor]:
    """What each converted layer costs with each of `sizes` slots, in nats a token: layer -> [1, sizes] float64.

    With `by_head`, what each of its KV heads costs: layer -> [Hk, sizes].

    `model` is converted and calibrated; its parameters are not touched, and it computes as the teacher meanwhile.
    """
    layers = {i: m.kernelize for i, m in kernelized_layers(model).items()}
    probes = {i: CostProbe(sizes, by_head) for i in layers}
    generator = torch.Generator().manual_seed(seed)
    counts = {False: 0, True: 0}
    for layer, probe in probes.items():
        layers[layer].probe = probe
    try:
        for text in texts:
            retrieval = text.answer > 0
            for probe in probes.values():
                probe.retrieval = retrieval
            counts[retrieval] += text.answer or text.ids.shape[1]
            _backward(model, text, generator)
            on_text()
    finally:
        for layer in layers.values():
            layer.probe = None
    return {i: _total(probe, counts) for i, probe in probes.items()}


def _total(probe: CostProbe, counts: dict[bool, int]) -> Tensor:
    weights = {False: 1.0, True: RETRIEVAL_WEIGHT}
    parts = [weights[kind] * cost.double().cpu() / counts[kind] for kind, cost in probe.cost.items()]
    return torch.stack(parts).sum(0)


def _backward(model: PreTrainedModel, text: BudgetText, generator: torch.Generator) -> None:
    """One forward and backward of the log probability of drawn tokens, or of the answer that the text gives."""
    ids = text.ids.to(reading_device(model))
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.enable_grad():
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0].float()
        log_p = logits.log_softmax(-1)
        if text.answer:
            drawn, log_p = ids[0, -text.answer :], log_p[-text.answer - 1 : -1]
        else:
            drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)[:, 0].to(ids.device)
        torch.autograd.grad(log_p.gather(-1, drawn[:, None]).sum(), embedded)


def share_out(costs: dict[K, Tensor], total: int, sizes: Sequence[int] = SIZES) -> dict[K, int]:
    """Slots for each layer, or what else `costs` [sizes] are of, `total` in all: each next `STEP` goes where it saves
    most.

    None gets more than `MOST`. Between and beyond the measured sizes the cost is taken to be linear in 1/√slots.
    """
    mean = total // len(costs)
    least, most = min(LEAST, mean), max(MOST, mean + STEP)
    curves = {i: _slopes(cost, sizes) for i, cost in costs.items()}
    budget = dict.fromkeys(costs, least)
    for _ in range((total - least * len(costs)) // STEP):
        room = {i: c for i, c in budget.items() if c + STEP <= most}
        gains = {i: _cost(curves[i], sizes, c) - _cost(curves[i], sizes, c + STEP) for i, c in room.items()}
        budget[max(gains, key=lambda i: gains[i])] += STEP
    return budget


def _axis(slots: float) -> float:
    return (slots + STEP) ** -0.5


def _slopes(cost: Tensor, sizes: Sequence[int]) -> list[float]:
    """Slopes of the cost in `_axis` between neighbouring sizes: none negative, each half its own and half the mean."""
    steps = zip(cost.tolist()[:-1], cost.tolist()[1:], sizes[:-1], sizes[1:], strict=True)
    slopes = [max(0.0, (a - b) / (_axis(x) - _axis(y))) for a, b, x, y in steps]
    mean = sum(slopes) / len(slopes)
    return [0.5 * (slope + mean) for slope in slopes]


def _cost(slopes: list[float], sizes: Sequence[int], slots: int) -> float:
    """The cost of `slots`, up to a constant."""
    total, top = 0.0, _axis(slots)
    for slope, low, high in zip(slopes, [0, *sizes[1:-1]], [*sizes[1:-1], float("inf")], strict=True):
        total += slope * max(0.0, min(top, _axis(low)) - (_axis(high) if high != float("inf") else 0.0))
    return total


class Budget(NamedTuple):
    """By what slots are shared out: the texts that price them, over the layers or over every KV head."""

    texts: Sequence[BudgetText]
    by_head: bool = False


def budgeted(plan: ConversionPlan, costs: dict[int, Tensor]) -> ConversionPlan:
    """`plan` with the slots of its layers, as many in all, given out by `costs`: [1, sizes] a layer, or [Hk, sizes].

    With costs by KV head a layer's mean is rounded up, by less than one slot a head.
    """
    total = sum(spec.slots for spec in plan.layers if spec is not None)
    parts = {(layer, part): one for layer, cost in costs.items() for part, one in enumerate(cost)}
    most = max(map(len, costs.values()))
    budget = share_out(parts, total * most)
    if most == 1:
        return plan.override({layer: {"slots": slots, "head_slots": ()} for (layer, _), slots in budget.items()})
    heads = {layer: [budget[layer, part] for part in range(len(cost))] for layer, cost in costs.items()}
    return plan.override({i: {"slots": mean_slots(each), "head_slots": tuple(each)} for i, each in heads.items()})


def allot(
    model: PreTrainedModel,
    budget: Budget,
    on_text: Callable[[], None] = lambda: None,
) -> ConversionPlan:
    """Gives every layer of a converted model, or every KV head, its own number of slots, as many in all.

    Returns the plan that the model has now.
    """
    plan = ConversionPlan(tuple(plan_of(model.config)))
    if not any(spec.slots for spec in plan.converted.values()):
        return plan
    plan = budgeted(plan, layer_costs(model, budget.texts, on_text=on_text, by_head=budget.by_head))
    for layer, module in kernelized_layers(model).items():
        spec = plan.layers[layer]
        assert spec is not None
        module.kernelize.spec = spec
    model.config.kernelize = plan_entry(list(plan.layers))
    return plan


def budget_texts(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, ordinary: int = 1, retrieval: int = 2
) -> list[BudgetText]:
    """Calibration texts of `length` tokens cut from `text`: some as they are, some with facts to be found again."""
    count = ordinary + retrieval
    pieces = [text[i * len(text) // count :][: 8 * length] for i in range(count)]
    ids = [tokenizer(piece, add_special_tokens=False).input_ids[:length] for piece in pieces]
    plain = [BudgetText(torch.tensor([row])) for row in ids[:ordinary]]
    return plain + [retrieval_text(tokenizer, row, length, seed) for seed, row in enumerate(ids[ordinary:])]
