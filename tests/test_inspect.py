"""Inspection: numbers against their dense definitions, plans that keep their budget, a model left as it was."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch
from families import tiny_teacher
from rich.console import Console
from tiny import tiny_llama

from kernelize.calibrate import missing_mass
from kernelize.errors import InputError
from kernelize.inspect import (
    HeadRow,
    Inspection,
    head_rows,
    head_table,
    hull,
    inspect_model,
    map_table,
    plot,
    recommend,
)
from kernelize.losses import softmax_attention
from kernelize.measure import MapRow, candidates, measure_layer, measure_maps, observe, softmax_layers, spaced
from kernelize.plan import AttentionShape, describe
from kernelize.runtime.feature_maps import FEATURE_MAPS
from kernelize.runtime.modeling import kernelize_model
from kernelize.runtime.spec import KernelSpec
from kernelize.runtime.state import AttentionOutput, Seen

SPEC = KernelSpec(feature_map="codebook", feature_dim=8, window=8, sinks=2, slots=4, block=4)
SHAPE = AttentionShape(layers=1, heads=4, kv_heads=2, head_dim=8, context=256, dtype="float32")


def texts(count=3, length=64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 257, (1, length), generator=generator) for _ in range(count)]


def random_seen(seed=0, length=96):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, h, length, 8, generator=generator) for h in (4, 2, 2))
    return Seen(q * 2, k + 0.5, v, 8**-0.5)


@pytest.fixture(scope="module")
def report():
    return inspect_model(tiny_llama(), texts(), spec=SPEC, sizes=(4, 8), slots=(0, 4))


# --- observing ------------------------------------------------------------------------------------------------


def test_observing_changes_nothing_and_sees_every_layer():
    model = tiny_llama()
    with torch.no_grad():
        before = model(texts()[0]).logits
        seen = observe(model, texts(), (0, 1))
        after = model(texts()[0]).logits
    assert torch.equal(before, after)
    assert model.config._attn_implementation == "sdpa"
    assert {layer: [s.query.shape[1:3] for s in found] for layer, found in seen.items()} == {
        layer: [(4, 64)] * 3 for layer in (0, 1)
    }


def test_what_is_observed_gives_the_layers_output():
    model, outputs = tiny_llama(), []
    hook = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    seen = observe(model, texts()[:1], (1,))[1][0]
    hook.remove()
    with torch.no_grad():
        y, _ = softmax_attention(seen)
    torch.testing.assert_close(y.transpose(1, 2).flatten(2), outputs[0])


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_observing_honours_soft_caps_and_native_sinks(family):
    model = tiny_teacher(family)
    with torch.no_grad():
        before = model(texts()[0]).logits
        outputs = []
        hook = model.register_forward_hook(lambda _, args, out: outputs.append(out.logits))
        seen = observe(model, texts()[:1], softmax_layers(model))
        hook.remove()
        rows = head_rows(1, seen[1][0], SPEC)
    torch.testing.assert_close(outputs[0], before[:, -1:], rtol=0, atol=2e-5)
    assert [row.window + row.sinks + row.elsewhere for row in rows] == pytest.approx([1.0] * 4, abs=1e-5)


def test_a_family_that_does_not_ask_the_attention_interface_cannot_be_inspected():
    with pytest.raises(InputError, match="'gpt_neo' does not ask the attention interface"):
        observe(tiny_teacher("gpt_neo"), texts()[:1], (0, 2))


def test_layers_with_a_sliding_window_cannot_be_converted():
    model = tiny_llama()
    model.config.layer_types = ["sliding_attention", "full_attention"]
    assert softmax_layers(model) == (1,)


@pytest.mark.parametrize(("given", "said"), [(texts(1), "at least 2"), ([torch.ones(2, 9)] * 2, r"\[2, 9\]")])
def test_texts_that_cannot_be_used_are_refused(given, said):
    with pytest.raises(InputError, match=said):
        measure_maps(tiny_llama(), given)


def test_a_kernelized_model_is_refused():
    with pytest.raises(InputError, match="already kernelized"):
        inspect_model(kernelize_model(tiny_llama(), [SPEC, SPEC]), texts())


# --- heads ----------------------------------------------------------------------------------------------------


def test_shares_of_mass_and_look_back_are_those_of_the_dense_matrix():
    seen = random_seen()
    rows = head_rows(3, seen, SPEC)
    scores = seen.query[0] @ seen.key[0].repeat_interleave(2, 0).mT * seen.scaling
    p = scores.masked_fill(~torch.ones(96, 96, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    age = torch.arange(96)[:, None] - torch.arange(96)
    for head, row in enumerate(rows):
        assert (row.layer, row.head) == (3, head)
        assert row.window + row.sinks + row.elsewhere == pytest.approx(1, abs=1e-5)
        assert row.sinks == pytest.approx(float(p[head, :, :2].sum() / 96), rel=1e-4)
        assert row.look_back == pytest.approx(float((p[head] * age).sum() / 96), rel=1e-4)
        far = p[head] * ((age >= SPEC.ring) & (torch.arange(96) >= 2))
        assert row.elsewhere == pytest.approx(float(far.sum() / 96), rel=1e-4)
        energy = torch.linalg.svdvals(p[head].double()).square().cumsum(0)
        assert row.rank95 == int((energy / energy[-1] < 0.95).sum()) + 1


def test_a_head_that_attends_evenly_has_less_rank_than_one_that_looks_at_one_token():
    seen = random_seen()
    even, sharp = (head_rows(0, seen._replace(query=seen.query * scale), SPEC)[0] for scale in (0.0, 50.0))
    assert even.rank99 < sharp.rank99
    assert even.freedom < sharp.freedom
    assert even.rank90 <= even.rank95 <= even.rank99


# --- maps -----------------------------------------------------------------------------------------------------


def test_everything_exact_has_no_error():
    seen = [random_seen(seed) for seed in range(2)]
    row = measure_layer(0, seen, SPEC.replace(slots=96), SHAPE)
    assert row.output < 1e-10
    assert row.negative == row.far == 0


@pytest.mark.parametrize("name", sorted(FEATURE_MAPS))
def test_a_calibrated_memory_does_not_hurt_what_it_was_calibrated_on(name):
    seen = random_seen()
    spec = SPEC.replace(feature_map=name, feature_dim=FEATURE_MAPS[name].nearest(8, 8), policy="attention")
    row = measure_layer(0, [seen, seen], spec, SHAPE)
    assert row.output <= row.without * (1 + 1e-4)
    assert (row.negative == 0) or not FEATURE_MAPS[name].positive or name == "taylor"


def test_a_map_with_negative_weights_says_how_many():
    seen = [random_seen(seed) for seed in range(2)]
    row = measure_layer(0, seen, SPEC.replace(feature_map="rff", feature_dim=4), SHAPE)
    assert 0 < row.negative < 1


def test_the_missing_mass_is_what_the_gate_lacks():
    exact_lse, memory_lse = torch.zeros(1, 2, 5), torch.full((1, 2, 5), 1.5)
    lse = torch.logaddexp(exact_lse, memory_lse + torch.tensor([0.7, -2.0])[:, None])
    y = torch.zeros(1, 2, 5, 3)
    lacks = missing_mass(AttentionOutput(y, y, exact_lse, y, memory_lse), lse)
    torch.testing.assert_close(lacks, torch.tensor([0.7, -2.0]))


def test_measured_maps_come_best_first_with_sizes_they_can_have():
    rows = measure_maps(tiny_llama(), texts(), (8,), maps=("none", "taylor", "hedgehog"), spec=SPEC)
    assert [row.output for row in rows] == sorted(row.output for row in rows)
    assert {(r.spec.feature_map, r.spec.feature_dim) for r in rows if r.spec.has_memory} == {
        ("taylor", 6), ("hedgehog", 8),
    }  # fmt: skip
    with pytest.raises(InputError, match="nonsense"):
        candidates(SPEC, ("nonsense",), (8,), 8)


def test_spaced_layers_are_spread():
    assert spaced(range(30), 4) == (3, 11, 18, 26)
    assert spaced((4, 9), 4) == (4, 9)


# --- plans ----------------------------------------------------------------------------------------------------


def test_a_plan_keeps_its_budget_and_more_bytes_never_hurt(report):
    sizes = sorted(row.state_bytes for row in report.maps)
    error = {(row.layer, row.spec): row.output for row in report.maps}
    errors = []
    for budget in range(2 * sizes[0], 2 * sizes[-1] + 1000, 1000):
        plan = recommend(report, budget)
        assert describe(plan, tiny_llama().config, dtype="float32").state_bytes <= budget
        errors.append(sum(error[item] for item in enumerate(plan.layers)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]
    assert errors[-1] == pytest.approx(sum(min(e for (i, _), e in error.items() if i == layer) for layer in (0, 1)))


def test_a_budget_below_the_smallest_states_is_refused(report):
    with pytest.raises(InputError, match="state_bytes=10 is too little"):
        recommend(report, 10)


def test_layers_that_were_not_inspected_take_the_nearest_choice(report):
    rows = tuple(row for row in report.maps if row.layer == 1)
    wider = Inspection(4, (0, 1, 3), report.spec, (), rows)
    plan = recommend(wider, 10**6)
    assert plan.layers[2] is None
    assert plan.layers[0] == plan.layers[1] == plan.layers[3]


def test_windows_and_decays_are_choices_too_each_measured_once():
    spec = SPEC.replace(slots=0, policy="value")
    found = inspect_model(
        tiny_llama(), texts(), spec=spec, sizes=(4,), slots=(), windows=(4, 16), decays=("none", "fixed")
    )
    mine = [row.spec for row in found.maps if row.layer == 0]
    assert len(mine) == len(set(mine)) == 2 + 4  # two windows without a memory, four choices with one
    wide = recommend(found, max(row.state_bytes for row in found.maps) * 2).layers[0]
    assert wide.window == 16
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(map_table(found.maps))
    assert re.search(r"window +decay", console.export_text())


def test_the_hull_is_convex_and_falls():
    points = [(1, 9.0), (2, 8.0), (3, 3.0), (4, 4.0), (5, 2.5), (9, 2.4)]
    rows = [MapRow(0, SPEC, size, error, 0, 0, 0, 0) for size, error in points]
    assert [row.state_bytes for row in hull(rows)] == [1, 3, 5, 9]


# --- what is shown --------------------------------------------------------------------------------------------


def test_a_report_is_data_tables_and_a_picture(report, tmp_path):
    data = json.loads(json.dumps(report.to_dict()))
    assert len(data["heads"]) == 8
    assert set(data["heads"][0]) == set(HeadRow.__dataclass_fields__)
    assert head_table(report).row_count == 2
    assert map_table(report.maps).row_count == len(report.maps)
    plot(report, tmp_path / "heads.png")
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="cannot draw"):
        plot(report, tmp_path / "heads.nonsense")
