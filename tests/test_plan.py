"""Plans: data that survives a round trip, refuses nonsense, and costs what the real state and layer cost."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicCache

from kernelize.errors import InputError
from kernelize.plan import ConversionPlan, describe, kept_by_pattern, parse_layers
from kernelize.recipe import Recipe
from kernelize.runtime.attention import KernelAttention
from kernelize.runtime.cache import CACHE, state_bytes
from kernelize.runtime.modeling import kernelize_model
from kernelize.runtime.ops import attend
from kernelize.runtime.spec import DECAYS, POLICIES, RULES, KernelSpec, SpecError

law = settings(deadline=None, max_examples=50)

SPEC = KernelSpec(feature_dim=16, window=8, sinks=2, slots=6, block=4)
LLAMA = LlamaConfig(
    hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16, dtype="float32"
)


def sensible(**fields) -> KernelSpec | None:
    """The spec, or None where its rule, decay and policy make no sense together."""
    try:
        return KernelSpec(**fields)
    except SpecError:
        return None


SPECS = st.builds(
    sensible,
    feature_map=st.sampled_from(["hedgehog", "elu", "favor"]),
    feature_dim=st.sampled_from([8, 32]),
    window=st.integers(1, 40),
    sinks=st.integers(0, 5),
    slots=st.integers(0, 9),
    policy=st.sampled_from(POLICIES),
    block=st.integers(1, 9),
    decay=st.sampled_from(DECAYS),
    rule=st.sampled_from(RULES),
).filter(bool)
PLANS = st.lists(st.none() | SPECS, min_size=1, max_size=5).filter(any).map(lambda x: ConversionPlan(tuple(x)))


@law
@given(PLANS)
def test_data_and_yaml_give_the_same_plan_back(plan):
    assert ConversionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert ConversionPlan.from_yaml(plan.to_yaml()) == plan


def test_pattern_repeats_over_the_layers():
    plan = ConversionPlan.from_pattern("KKKS", SPEC, 10)
    assert plan.kept == (3, 7)
    assert set(plan.converted) == {0, 1, 2, 4, 5, 6, 8, 9}
    assert plan == ConversionPlan.uniform(SPEC, 10, keep=(3, 7))


def test_recipe_ranges_become_layers():
    recipe = Recipe.from_dict({
        "name": "r", "description": "", "kernel": SPEC.to_dict(), "keep": [0], "layers": {"2-3": {"slots": 64}},
    })  # fmt: skip
    plan = ConversionPlan.from_recipe(recipe, 4)
    assert plan.layers == (None, SPEC, SPEC.replace(slots=64), SPEC.replace(slots=64))
    assert plan == ConversionPlan.uniform(SPEC, 4, (0,)).override({2: {"slots": 64}, 3: {"slots": 64}})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ConversionPlan.from_pattern("KX", SPEC, 4), "'KX'"),
        (lambda: ConversionPlan.from_pattern("", SPEC, 4), "''"),
        (lambda: ConversionPlan.from_pattern("S", SPEC, 4), "all 4 layers"),
        (lambda: ConversionPlan.uniform(SPEC, 4, keep=(4,)), "layer 4; the model has 0 to 3"),
        (lambda: ConversionPlan.uniform(SPEC, 4).override({9: {"slots": 1}}), "layer 9"),
        (lambda: ConversionPlan.uniform(SPEC, 4).override({1: {"slot": 1}}), "did you mean 'slots'"),
        (lambda: ConversionPlan.uniform(SPEC, 4, (1,)).override({1: {"slots": 1}}), "keeps softmax"),
        (lambda: ConversionPlan.from_dict({"version": 1, "layer": []}), "did you mean 'layers'"),
        (lambda: ConversionPlan.from_dict({"version": 99, "layers": [SPEC.to_dict()]}), "99"),
        (lambda: ConversionPlan.from_dict({"version": 1, "layers": "KKK"}), "not str"),
        (lambda: ConversionPlan.from_yaml("a: [b"), "YAML"),
        (lambda: ConversionPlan.from_yaml("3"), "not int"),
        (lambda: describe(ConversionPlan.uniform(SPEC, 3), LLAMA), "3 layers, the model 4"),
        (lambda: describe(ConversionPlan.uniform(SPEC, 4), LLAMA, dtype="float33"), "float33"),
        (lambda: parse_layers("1,0-2"), "layer 1 twice"),
        (lambda: parse_layers("2-1"), "2-1"),
        (lambda: parse_layers("a"), "'a'"),
    ],
)
def test_nonsense_is_refused_by_name(make, said):
    with pytest.raises((InputError, SpecError)) as caught:
        make()
    assert said in str(caught.value)


def test_layers_and_patterns_are_read_as_written():
    assert parse_layers("0, 7,12-14") == (0, 7, 12, 13, 14)
    assert parse_layers("") == ()
    assert kept_by_pattern("SK", 5) == (0, 2, 4)


@law
@given(SPECS, st.sampled_from(["float32", "bfloat16"]))
def test_state_bytes_are_those_of_the_real_state_at_every_length(spec, dtype):
    row = describe(ConversionPlan.uniform(spec, 4), LLAMA, dtype=dtype).layers[0]
    kernel = KernelAttention(spec, 4, 2, 16).to(torch.float32)
    kernel.reset()
    state = None
    for tokens in (1, 70):
        q, k, v = (torch.randn(1, h, tokens, 16).to(getattr(torch, dtype)) for h in (4, 2, 2))
        _, state = attend(q, k, v, kernel.kernel(0.25), state)
        assert state.nbytes == row.state_bytes


@law
@given(SPECS)
def test_new_parameters_are_those_of_the_real_layer(spec):
    report = describe(ConversionPlan.from_pattern("KS", spec, 4), LLAMA)
    kernel = KernelAttention(spec, 4, 2, 16)
    assert report.new_parameters == 2 * sum(p.numel() for p in kernel.parameters())
    assert [row.new_parameters > 0 for row in report.layers] == [True, False, True, False]


@law
@given(PLANS)
def test_break_even_is_the_first_length_that_is_cheaper(plan):
    config = LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": len(plan.layers)})
    report = describe(plan, config)
    for at, ours, theirs in (
        (report.break_even_bytes, "cache_bytes", "teacher_cache_bytes"),
        (report.break_even_flops, "decode_flops", "teacher_decode_flops"),
    ):
        before, after = describe(plan, config, lengths=(at - 1, at)).lengths
        assert getattr(after, ours) < getattr(after, theirs)
        assert at == 1 or getattr(before, ours) >= getattr(before, theirs)


def test_prefill_is_the_mean_of_decoding_over_the_positions():
    plan = ConversionPlan.from_pattern("KKKS", SPEC, 4)
    rows = describe(plan, LLAMA, lengths=range(1, 61)).lengths
    mean = sum(row.decode_flops for row in rows) / 60
    assert rows[-1].prefill_flops == pytest.approx(mean, rel=1e-12)
    assert rows[-1].teacher_prefill_flops == pytest.approx(sum(r.teacher_decode_flops for r in rows) / 60, rel=1e-12)


WINDOWED = Gemma3TextConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, sliding_window=12, max_position_embeddings=64, dtype="float32",
    layer_types=["sliding_attention", "full_attention", "full_attention"],
)  # fmt: skip


@pytest.mark.parametrize("length", [5, 11, 12, 40])
@torch.no_grad()
def test_layers_with_a_window_of_their_own_cost_what_the_real_cache_holds(length):
    model, plan = AutoModelForCausalLM.from_config(WINDOWED), ConversionPlan((None, SPEC, None))
    row = describe(plan, WINDOWED, lengths=[length]).lengths[0]
    sizes = []
    for each in (model, kernelize_model(copy.deepcopy(model), list(plan.layers))):
        cache = DynamicCache(config=each.config)
        each(input_ids=torch.arange(length)[None], **{CACHE: cache})
        sizes.append(state_bytes(cache))
    assert [row.teacher_cache_bytes, row.cache_bytes] == sizes
    assert row.teacher_decode_flops == 4 * 4 * 8 * (min(length, 12) + 2 * length)


def test_windows_are_in_the_report_and_prefill_is_the_mean_of_decoding_in_them():
    report = describe(ConversionPlan((None, SPEC, None)), WINDOWED, lengths=range(1, 61))
    assert report.to_dict()["shape"]["windows"] == (12, None, None)
    rows = report.lengths
    assert rows[-1].prefill_flops == pytest.approx(sum(r.decode_flops for r in rows) / 60, rel=1e-12)
    assert rows[-1].teacher_prefill_flops == pytest.approx(sum(r.teacher_decode_flops for r in rows) / 60, rel=1e-12)


def test_a_window_as_large_as_the_context_may_be_cheaper_at_every_length():
    fields = {**LLAMA.to_dict(), "sliding_window": 16, "max_position_embeddings": 16}
    report = describe(ConversionPlan.uniform(SPEC, 4), MistralConfig(**fields), lengths=[10**6])
    assert (report.break_even_bytes, report.break_even_flops) == (None, None)
    assert report.lengths[0].teacher_cache_bytes == 4 * 15 * report.shape.kv_bytes_per_token


def test_report_is_json():
    data = describe(ConversionPlan.from_pattern("KKKS", SPEC, 4), LLAMA).to_dict()
    assert json.loads(json.dumps(data))["state_bytes"] == data["state_bytes"] > 0


def test_families_without_grouped_heads_are_described():
    report = describe(ConversionPlan.uniform(SPEC, 2), GPT2Config(n_layer=2, n_head=4, n_embd=64, dtype="float16"))
    assert (report.shape.kv_heads, report.shape.head_dim, report.shape.context) == (4, 16, 1024)
    assert report.shape.kv_bytes_per_token == 2 * 4 * 16 * 2


def test_a_plan_as_a_recipe_is_the_same_plan():
    spec = KernelSpec(slots=32)
    plan = ConversionPlan((spec, None, spec.replace(slots=64), spec, spec.replace(decay="none", window=128)))
    recipe = plan.to_recipe("found", "by a test")
    assert ConversionPlan.from_recipe(Recipe.from_yaml(recipe.to_yaml()), 5) == plan
