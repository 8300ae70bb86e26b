"""Every family obeys every law, and what cannot be right is refused by name."""

from __future__ import annotations

import copy
from inspect import signature

import pytest
import torch
from accelerate import dispatch_model
from families import REFUSED, SPEC, plan_for, tiny_config, tiny_student, tiny_teacher
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

from kernelize.check import LAWS, check
from kernelize.lora import lora_coverage, register_lora_targets
from kernelize.objectives import Distil
from kernelize.recipe import DistilWeights
from kernelize.runtime.cache import RELEASE
from kernelize.runtime.modeling import (
    FAMILIES,
    PREFIX,
    attentions,
    decoder_of,
    family_of,
    kernelize_model,
    native_windows,
    supported,
)
from kernelize.runtime.spec import SpecError
from kernelize.sharding import layers_of

pytestmark = pytest.mark.fast
HERE = [
    name for name in LAWS if name not in ("clean process", "state bytes")
]  # test_check and test_hub start processes and read thousands of tokens


@pytest.mark.parametrize("name", supported())
def test_family_obeys_every_law(name):
    student = tiny_student(name)
    rows = check(student, against=tiny_teacher(name), only=HERE)
    assert len(rows) == len(HERE)
    assert not [row for row in rows if row.failed]
    expected = {"packing": {"packed documents"}, "static cache": {"static cache"}}.get(FAMILIES[name].lacks, set())
    if RELEASE < (5, 18) and any(DynamicCache(config=student.config).is_sliding):
        expected |= {"crop"}  # softmax layers of that release read but one draft before they crop
    assert {row.name for row in rows if row.passed is None} == expected


@pytest.mark.parametrize("name", supported())
def test_original_weights_keep_their_names(name):
    teacher, student = tiny_teacher(name).state_dict(), tiny_student(name).state_dict()
    added = set(student) - set(teacher)
    assert set(teacher) <= set(student)
    assert added
    assert all(".kernelize." in key for key in added)


@pytest.mark.parametrize("name", supported())
def test_forward_says_that_it_takes_what_the_original_takes(name):
    """Transformers reads `labels`, `logits_to_keep` and the like in the signature; places are those of the original."""
    original, own = (list(signature(make(name).forward).parameters) for make in (tiny_teacher, tiny_student))
    assert own[: len(original) - 1] == original[:-1]
    assert {"labels", "kernelize_mask"} <= set(own)


@torch.no_grad()
@pytest.mark.parametrize("name", supported())
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_decoder_that_is_called_by_itself_reads_what_the_model_reads(name, use_cache):
    """Trainers do that for hidden states without logits: padding and the cache count there, too."""
    student, ids = tiny_student(name), torch.arange(1, 81).view(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    options = {"attention_mask": mask, "use_cache": use_cache}
    wanted, decoder = student(ids, output_hidden_states=True, **options).hidden_states[-1], decoder_of(student)
    torch.testing.assert_close(decoder(ids, **options)[0], wanted, rtol=0, atol=0)
    places = [*signature(decoder.forward).parameters]
    given = [{"attention_mask": mask}.get(name) for name in places[1 : places.index("attention_mask") + 1]]
    torch.testing.assert_close(decoder(ids, *given, use_cache=use_cache)[0], wanted, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt_neox", "llama", "mixtral"])
def test_what_was_loaded_converted_and_saved_loads_as_it_was(name, tmp_path):
    """Also where Transformers stores weights otherwise than it holds them."""
    tiny_teacher(name).save_pretrained(tmp_path / "teacher")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    student = kernelize_model(loaded, plan_for(loaded.config)).eval()
    student.save_pretrained(tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    ids = torch.arange(1, 41)[None]
    torch.testing.assert_close(again(ids).logits, student(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_family_says_why(name):
    with pytest.raises(SpecError, match=f"{name!r} is not supported: "):
        family_of(name)


def test_unknown_family_lists_the_supported_ones():
    with pytest.raises(SpecError, match="'bert' is not supported; supported: cohere, falcon, gemma"):
        family_of("bert")


@pytest.mark.parametrize("name", ["gemma2", "gpt_neo", "llama4_text"])
def test_native_windows_are_left_alone(name):
    teacher = tiny_teacher(name)
    local = native_windows(teacher.config)
    assert local
    with pytest.raises(SpecError, match="native sliding window"):
        kernelize_model(teacher, [SPEC] * teacher.config.num_hidden_layers)


def test_a_window_in_every_layer_is_native_unless_it_covers_all_positions():
    assert native_windows(tiny_config("mistral", sliding_window=64)) == {0, 1}
    assert native_windows(tiny_config("mistral", sliding_window=4096)) == set()


def test_an_attention_that_drops_the_soft_caps_is_refused():
    teacher = tiny_teacher("gemma2")
    teacher.config._attn_implementation_internal = "sdpa"  # older releases choose it
    with pytest.raises(SpecError, match="'sdpa' leaves out what 'gemma2' does"):
        kernelize_model(teacher, plan_for(teacher.config))


WRAPPED = {
    "PeftModel": lambda teacher: get_peft_model(teacher, LoraConfig(r=2)),
    "OptimizedModule": lambda teacher: torch.compile(teacher, backend="eager"),
    "LlamaModel": lambda teacher: teacher.model,
    "LlamaForSequenceClassification": lambda teacher: AutoModelForSequenceClassification.from_config(teacher.config),
    "MyLlama": lambda teacher: type("MyLlama", (type(teacher),), {})(teacher.config),
    "device_map": lambda teacher: dispatch_model(
        teacher, {"model": "cpu", "lm_head": "disk"}, offload_dir=".", force_hooks=True
    ),
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # asked by peft
@pytest.mark.parametrize("name", WRAPPED)
def test_a_model_that_is_wrapped_is_refused_and_stays_as_it_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = WRAPPED[name](tiny_teacher("llama"))
    before = type(model)
    with pytest.raises(SpecError, match=name):
        kernelize_model(model, plan_for(model.config))
    assert type(model) is before
    assert model.config.model_type == "llama"


def test_odd_configs_are_refused():
    teacher = AutoModelForCausalLM.from_config(tiny_config("gpt2", add_cross_attention=True))
    with pytest.raises(SpecError, match="add_cross_attention=True"):
        kernelize_model(teacher, plan_for(teacher.config))


@pytest.mark.parametrize("heads", [{"multi_query": True}, {"multi_query": False}], ids=str)
def test_both_older_layouts_of_falcon(heads):
    torch.manual_seed(0)
    config = tiny_config("falcon", new_decoder_architecture=False, num_kv_heads=4, **heads)
    teacher = AutoModelForCausalLM.from_config(config).eval()
    student = kernelize_model(copy.deepcopy(teacher), plan_for(config)).eval()
    laws = ["chunked prefill", "window ≥ length is softmax", "identity with the teacher"]
    assert not [row for row in check(student, against=teacher, only=laws) if not row.passed]
    assert student.transformer.h[0].self_attention.kernelize.kv_heads == (1 if heads["multi_query"] else 4)


def test_falcon_with_alibi_is_refused():
    teacher = AutoModelForCausalLM.from_config(tiny_config("falcon", alibi=True))
    with pytest.raises(SpecError, match="alibi=True in the config of 'falcon' is not supported"):
        kernelize_model(teacher, plan_for(teacher.config))


def test_positions_of_llama4_follow_the_cache():
    """Its queries grow with the position, which the class reads from the cache that ours does not get."""
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(tiny_config("llama4_text", floor_scale=16)).eval()
    student = kernelize_model(teacher, plan_for(teacher.config)).eval()
    rows = check(student, only=["chunked prefill", "one token at a time", "static cache"])
    assert not [row for row in rows if not row.passed]


@pytest.mark.parametrize("name", supported())
def test_a_distillation_reads_every_family_in_16_bits_from_layer_to_layer(name):
    """Embeddings, biases or experts of float32 would widen the residual stream; afterwards the model is as before."""
    student, seen = tiny_student(name), []
    objective = Distil(student, tiny_teacher(name, 1).bfloat16(), DistilWeights())
    ids = torch.randint(1, 257, (2, 40), generator=torch.Generator().manual_seed(0))
    rows = ids, torch.arange(40).expand(2, -1), ids, torch.zeros_like(ids, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        objective(*rows)
        for layer in layers_of(student):  # behind the objective's own
            layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
        loss = objective(*rows).loss.sum()
    loss.backward()
    assert set(seen) == {torch.bfloat16}
    assert loss.isfinite()
    assert student.get_input_embeddings().weight.grad.abs().sum() > 0
    hooks = [len(layer._forward_pre_hooks) for layer in layers_of(student)]
    objective.close()
    assert [len(layer._forward_pre_hooks) for layer in layers_of(student)] == [n - 1 for n in hooks]


@pytest.mark.parametrize("name", supported())
def test_default_lora_targets_reach_every_attention(name):
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    register_lora_targets()
    for layer, attention in attentions(tiny_student(name), PREFIX + name).items():
        found = [key for key, _ in attention.named_modules() if key.endswith(tuple(TARGETS[PREFIX + name]))]
        assert found, f"layer {layer}: none of {TARGETS[PREFIX + name]}"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # asked by peft
@pytest.mark.parametrize("name", ["cohere", "gpt2", "gpt_neo", "phi3", "qwen3_moe"])
def test_lora_finds_its_targets_and_merges_exactly(name):
    peft = pytest.importorskip("peft")
    register_lora_targets()
    student = tiny_student(name).double()
    ids = torch.randint(1, 257, (1, 60), generator=torch.Generator().manual_seed(0))
    transposed = name in ("gpt2",)
    config = peft.LoraConfig(r=2, init_lora_weights=False, fan_in_fan_out=transposed)
    wrapped = peft.get_peft_model(student, config).double().eval()
    reached = lora_coverage(wrapped)
    assert len(reached.adapted) == sum(".lora_A." in key and key.endswith("weight") for key in wrapped.state_dict())
    assert reached.missed
    assert not any("lora_" in key or "lm_head" in key for key in reached.missed)
    with torch.no_grad():
        before = wrapped(input_ids=ids, use_cache=False).logits
        after = wrapped.merge_and_unload()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)  # rotations and norms round to float32


def test_kernelized_configs_are_known_to_auto_classes():
    student = tiny_student("qwen3")
    fields = {k: v for k, v in student.config.to_dict().items() if k != "model_type"}
    config = AutoConfig.for_model(PREFIX + "qwen3", **fields)
    assert type(config) is type(student.config)
