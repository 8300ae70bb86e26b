"""Slot budgets: what they promise for any costs, and that the measured costs mean something."""

from __future__ import annotations

import json

import pytest
import torch
from families import tiny_student
from tiny import byte_tokenizer, tiny_llama

from kernelize.budget import (
    LEAST,
    MOST,
    SIZES,
    STEP,
    BudgetText,
    budgeted,
    differentiable_softmax,
    layer_costs,
    retrieval_text,
    share_out,
)
from kernelize.cli import main
from kernelize.convert import convert
from kernelize.plan import ConversionPlan
from kernelize.runtime.modeling import kernelized_layers
from kernelize.runtime.spec import KernelSpec
from kernelize.runtime.state import Seen

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


def test_nobody_gets_more_slots_than_the_kernels_take_unless_all_have_as_many():
    assert share_out({0: falling(0.0), 1: falling(9.0)}, 1600) == {0: 1600 - MOST, 1: MOST}
    assert sum(share_out(dict.fromkeys(range(2), falling(1.0)), 2 * (MOST + 8 * STEP)).values()) == 2 * (
        MOST + 8 * STEP
    )


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
        assert cost[0, 0] > 0
        assert cost[0, -1] < 1e-20, "with a slot for every token the layer is softmax attention"
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert all(layer.kernelize.probe is None for layer in kernelized_layers(model).values())


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_costs_honour_soft_caps_and_native_sinks(family):
    model = tiny_student(family).double()
    costs = costs_of(model)
    assert set(costs) == set(kernelized_layers(model))
    for cost in costs.values():
        assert cost[0, 0] > 0
        assert cost[0, -1] < 1e-10 * cost[0, 0], "with a slot for every token the layer is softmax attention"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_the_differentiable_softmax_has_the_gradient_of_the_dense_one(family):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 20, 8), (1, 2, 20, 8), (1, 2, 20, 8))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    cap = {"gemma2": 2.0}.get(family)
    sinks = torch.randn(4, generator=generator, dtype=torch.float64) if family == "gpt_oss" else None
    scores = 0.3 * q @ k.repeat_interleave(2, 1).mT
    scores = (scores if cap is None else cap * torch.tanh(scores / cap)).masked_fill(
        ~torch.ones(20, 20, dtype=torch.bool).tril(), -torch.inf
    )
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(-1, -1, 20, 1)], -1)
    dense = scores.softmax(-1)[..., :20] @ v.repeat_interleave(2, 1)
    got = differentiable_softmax(Seen(q, k, v, 0.3, cap, sinks))
    torch.testing.assert_close(got, dense, rtol=0, atol=1e-12)
    weight = torch.randn(dense.shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad((dense * weight).sum(), (q, k, v))
    torch.testing.assert_close(torch.autograd.grad((got * weight).sum(), (q, k, v)), expected, rtol=0, atol=1e-11)


def test_a_layer_that_nobody_listens_to_costs_nothing():
    model = convert(tiny_llama(), ConversionPlan.uniform(SPEC, 2)).double()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    costs = costs_of(model)
    assert float(costs[0].max()) == 0.0
    assert float(costs[1][0, 0]) > 0.0


def test_budgeted_plan_keeps_the_total():
    plan = ConversionPlan.uniform(SPEC, 2)
    changed = budgeted(plan, {0: falling(1.0)[None], 1: falling(5.0)[None]})
    assert sum(spec.slots for spec in changed.layers) == 64
    assert changed.layers[1].slots > changed.layers[0].slots


def test_a_plan_by_head_keeps_the_total_and_gives_more_where_it_saves_more():
    plan = ConversionPlan.uniform(SPEC.replace(slots=64), 2)
    changed = budgeted(
        plan, {0: torch.stack([falling(1.0), falling(2.0)]), 1: torch.stack([falling(9.0), falling(0.1)])}
    )
    heads = [spec.head_slots for spec in changed.layers]
    assert sum(map(sum, heads)) == 2 * 2 * 64
    assert heads[1][0] == max(map(max, heads))
    assert heads[1][1] == min(map(min, heads)) >= LEAST


def test_what_two_heads_cost_is_told_apart_and_a_head_that_nobody_listens_to_costs_nothing():
    model = convert(tiny_llama(), ConversionPlan.uniform(SPEC, 2)).double()
    with torch.no_grad():  # 2 KV heads of 2 query heads each: what the second pair says is thrown away
        weight = model.model.layers[0].self_attn.o_proj.weight
        weight[:, weight.shape[1] // 2 :] = 0
    texts = [BudgetText(torch.randint(1, 257, (1, 160), generator=torch.Generator().manual_seed(1)))]
    whole, heads = (layer_costs(model, texts, sizes=(0, 16), by_head=by_head)[0] for by_head in (False, True))
    assert heads.shape == (2, 2)
    torch.testing.assert_close(heads[:1], whole, rtol=1e-9, atol=0)
    assert heads[1].max() == 0


def test_convert_gives_heads_slots_of_their_own_and_every_way_to_run_the_model_agrees(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    source, made, rows = (str(tmp_path / name) for name in ("source", "made", "rows.json"))
    kernel = ["--window", "16", "--block", "8", "--sinks", "2", "--slots", "40", "--feature-dim", "16"]
    assert main(["convert", source, "-o", made, *kernel, "--budget", "heads"]) == 0
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    heads = [layer["head_slots"] for layer in config["kernelize"]["layers"]]
    assert [len(each) for each in heads] == [2, 2]
    assert sum(map(sum, heads)) == 2 * 2 * 40
    assert len({slots for each in heads for slots in each}) > 1
    assert main(["check", made, "--against", source, "--json", rows]) == 0
