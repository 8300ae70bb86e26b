"""Slot budgets: what they promise for any costs, and that the measured costs mean something."""

from __future__ import annotations

import torch
from tiny import byte_tokenizer, tiny_llama

from kernelize.budget import LEAST, SIZES, STEP, BudgetText, budgeted, layer_costs, retrieval_text, share_out
from kernelize.convert import convert
from kernelize.plan import ConversionPlan
from kernelize.runtime.modeling import kernelized_layers
from kernelize.runtime.spec import KernelSpec

SPEC = KernelSpec(window=16, block=8, sinks=2, slots=32, feature_dim=16)


def falling(steepness: float) -> torch.Tensor:
    return steepness / torch.tensor(SIZES, dtype=torch.float64).sqrt()


def test_everything_is_given_out_and_more_to_those_who_need_more():
    costs = {0: falling(1.0), 1: falling(8.0), 2: falling(0.1)}
    budget = share_out(costs, 30 * STEP + 3 * LEAST)
    assert sum(budget.values()) == 30 * STEP + 3 * LEAST
    assert budget[1] > budget[0] > budget[2] >= LEAST


def test_equal_costs_share_equally():
    budget = share_out(dict.fromkeys(range(4), falling(1.0)), 4 * (LEAST + 10 * STEP))
    assert set(budget.values()) == {LEAST + 10 * STEP}


def test_few_slots_are_shared_out_too():
    budget = share_out({0: falling(1.0), 1: falling(9.0)}, 2 * STEP)
    assert sum(budget.values()) <= 2 * STEP
    assert budget[1] >= budget[0]


def test_retrieval_text_has_its_length_and_its_answer():
    tokenizer = byte_tokenizer()
    text = retrieval_text(tokenizer, [5] * 600, 500, seed=3)
    assert text.ids.shape == (1, 500)
    answer = tokenizer.decode(text.ids[0, -text.answer :]).strip()
    assert answer.isdigit()
    assert tokenizer.decode(text.ids[0]).count(answer) == 2


def costs_of(model) -> dict[int, torch.Tensor]:
    torch.manual_seed(1)
    texts = [BudgetText(torch.randint(1, 257, (1, 160))), retrieval_text(byte_tokenizer(), list(range(1, 257)), 220, 0)]
    return layer_costs(model, texts, sizes=(0, 16, 32, 256))


def test_costs_leave_the_model_as_it_was_and_fall_to_nothing():
    model = convert(tiny_llama(), ConversionPlan.uniform(SPEC, 2)).double()
    before = {name: p.clone() for name, p in model.named_parameters()}
    costs = costs_of(model)
    assert set(costs) == {0, 1}
    for cost in costs.values():
        assert cost[0] > 0
        assert cost[-1] < 1e-20, "with a slot for every token the layer is softmax attention"
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert all(layer.kernelize.probe is None for layer in kernelized_layers(model).values())


def test_a_layer_that_nobody_listens_to_costs_nothing():
    model = convert(tiny_llama(), ConversionPlan.uniform(SPEC, 2)).double()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    costs = costs_of(model)
    assert float(costs[0].max()) == 0.0
    assert float(costs[1][0]) > 0.0


def test_budgeted_plan_keeps_the_total():
    plan = ConversionPlan.uniform(SPEC, 2)
    changed = budgeted(plan, {0: falling(1.0), 1: falling(5.0)})
    assert sum(spec.slots for spec in changed.layers) == 64
    assert changed.layers[1].slots > changed.layers[0].slots
