"""Which layers keep softmax: the one that retrieval goes through is found, whatever is replayed; the plan says it."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from kernelize.cli import main
from kernelize.convert import convert
from kernelize.errors import InputError
from kernelize.evaluate import sample_text
from kernelize.keep import _Choice, choose_layers, retrieval_texts, sizes, softmax
from kernelize.plan import ConversionPlan
from kernelize.recipe import Recipe, load_recipe
from kernelize.runtime import ops
from kernelize.runtime.modeling import kernelized_layers
from kernelize.runtime.spec import KernelSpec

SPEC = KernelSpec(window=8, block=4, sinks=1, slots=4, feature_dim=16)
TOKENIZER = byte_tokenizer()
TEXTS = retrieval_texts(TOKENIZER, sample_text("train"), 700, ("several", "copying"))


def llama(layers=4, **changes):
    return tiny_llama(num_hidden_layers=layers, **({"max_position_embeddings": 1024} | changes))


def gpt2():
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 1024, "vocab_size": 257}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=0, initializer_range=0.2)).eval()


def gemma2():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 257, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_logit_softcapping": 5.0}
    rest = {"layer_types": ["full_attention"] * 3, "bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.5}
    return Gemma2ForCausalLM(Gemma2Config(**shape, **heads, **rest, max_position_embeddings=1024)).eval()


def converted(model):
    return convert(model, ConversionPlan.uniform(SPEC, model.config.num_hidden_layers))


def test_the_texts_ask():
    assert all(len(text.ids) <= 700 and any(text.answers) for text in TEXTS)
    with pytest.raises(InputError, match="length=20 is too short"):
        retrieval_texts(TOKENIZER, sample_text("train"), 20)


def test_rounds_end_at_the_count():
    assert sizes(30, 7) == [30, 18, 11, 7]
    assert sizes(2, 1) == [2, 1]
    for count in range(1, 12):
        found = sizes(12, count)
        assert found[-1] == count
        assert all(a > b for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("make", [llama, gpt2, gemma2], ids=["llama", "gpt2", "gemma2"])
def test_a_cost_is_the_loss_of_the_model_that_has_the_layer_converted(make):
    """Against a model that really is converted in that layer alone: nothing that is replayed or stands in differs."""
    plain, model = make(), converted(make())
    with torch.inference_mode():
        choice = _Choice(model, TEXTS, 0.0, None)
        before, outputs = choice._baseline()
        costs = [before, *(choice._without(layer, outputs) for layer in sorted(choice.exact))]
    assert before == pytest.approx(answer_loss(plain), rel=1e-4)
    count = plain.config.num_hidden_layers
    for layer in range(count):
        plan = ConversionPlan.uniform(SPEC, count, keep=[i for i in range(count) if i != layer])
        assert costs[1 + layer] == pytest.approx(answer_loss(convert(make(), plan)), rel=1e-4), layer
    assert len({round(cost, 5) for cost in costs}) > 1


def answer_loss(model) -> float:
    total = count = 0.0
    for text in TEXTS:
        with torch.inference_mode():
            logits = model(torch.tensor([text.ids]), use_cache=False).logits[0]
        for at in torch.tensor(text.answers).nonzero()[:, 0].tolist():
            total -= logits[at - 1].log_softmax(-1)[text.ids[at]].item()
            count += 1
    return total / count


def test_layers_that_nobody_listens_to_are_given_up_first():
    model = llama()
    with torch.no_grad():
        for layer in (0, 1, 3):
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
    made = converted(model)
    kept = choose_layers(made, TEXTS, 1, kl=100.0)
    assert kept.layers == (2,), kept
    assert {layer for layer, cost in kept.costs.items() if abs(cost) < 1e-6} == {0, 1, 3}
    assert kept.after == pytest.approx(kept.before, abs=1e-6)
    assert all(layer.kernelize.instead is None for layer in kernelized_layers(made).values())
    assert all("forward" not in vars(block) for block in made.model.layers)


def test_the_number_must_leave_something_to_convert():
    for count in (0, 4, 9):
        with pytest.raises(InputError, match=f"keep=auto:{count}: a number from 1 to 3"):
            choose_layers(converted(llama()), TEXTS, count)


def test_progress_ends_at_the_end():
    seen = []
    choose_layers(converted(llama()), TEXTS[:1], 2, on_progress=lambda *now: seen.append(now))
    assert seen[-1][0] == seen[-1][1] == len(seen)


def test_softmax_is_the_layers_own_with_a_cap():
    model = gemma2()
    made = converted(gemma2())
    ids = torch.tensor([TEXTS[0].ids[:100]])
    for layer in kernelized_layers(made).values():
        layer.kernelize.instead = softmax
        layer.kernelize.spec = SPEC.replace(reach=SPEC.least_reach)  # softmax sees true distances
    with torch.inference_mode(), ops.force("chunked"):
        torch.testing.assert_close(made(ids, use_cache=False).logits, model(ids).logits, rtol=0, atol=2e-4)


# --- the commands -----------------------------------------------------------------------------------------------------


def test_plan_and_convert_choose_the_same_layers(tmp_path, capsys):
    llama(3, max_position_embeddings=768).save_pretrained(tmp_path / "source")
    TOKENIZER.save_pretrained(tmp_path / "source")
    kernel = ["--window", "16", "--block", "8", "--slots", "8", "--feature-dim", "16", "--budget", "uniform"]
    plan = str(tmp_path / "plan.yaml")
    assert (
        main(["plan", str(tmp_path / "source"), *kernel, "--keep", "auto:1", "-o", plan, "--json", f"{plan}.json"]) == 0
    )
    assert "What replacing a layer costs in retrieval" in capsys.readouterr().out
    found = load_recipe(plan)
    assert len(found.keep) == 1
    assert set(found.keep_costs) == {"0", "1", "2"}
    assert json.loads((tmp_path / "plan.yaml.json").read_text())["keep_costs"] == found.keep_costs
    made = str(tmp_path / "made")
    assert main(["convert", str(tmp_path / "source"), "-o", made, *kernel, "--keep", "auto:1"]) == 0
    assert Recipe.from_yaml((tmp_path / "made/recipe.yaml").read_text()).keep == found.keep
    config = json.loads((tmp_path / "made/config.json").read_text())
    assert [i for i, spec in enumerate(config["kernelize"]["layers"]) if spec is None] == list(found.keep)
    for bad in ("auto:3", "auto:0", "auto", "autos:3"):
        assert main(["plan", str(tmp_path / "source"), *kernel, "--keep", bad]) == 2


def test_a_recipe_may_choose():
    data = {"name": "r", "description": "d", "keep_auto": 3}
    with pytest.raises(InputError, match="keep_auto=3 is measured by `convert`"):
        ConversionPlan.from_recipe(Recipe.from_dict(data), 4)
    layers = {"0-2": {"slots": 8}}
    made = Recipe.from_dict({**data, "layers": layers}).keeping((1, 3), {0: 0.1, 1: 0.25, 2: 0.0, 3: 3.00004})
    assert Recipe.from_yaml(made.to_yaml()) == made
    assert [spec and spec.slots for spec in made.specs(4)] == [8, None, 8, None]
    assert made.keep_costs["3"] == 3.0
    with pytest.raises(InputError, match="keep or keep_auto, not both"):
        Recipe.from_dict({**data, "keep": [1]})
