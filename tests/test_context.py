"""Stretched positions: another length, the same weights, and a checkpoint that remembers both."""

from __future__ import annotations

import pytest
import torch
from families import tiny_student
from tiny import byte_tokenizer, tiny_llama
from tolerances import assert_same
from transformers import GPT2Config, GPT2LMHeadModel

from kernelize.cli import main
from kernelize.convert import convert, load, save, stretch
from kernelize.errors import InputError
from kernelize.plan import ConversionPlan
from kernelize.recipe import Recipe
from kernelize.runtime.modeling import kernelized_layers, rotary_context, supported
from kernelize.runtime.spec import KernelSpec, SpecError

TABLED = ("gpt2", "gpt_bigcode", "gpt_neo", "gptj", "opt")
SPEC = KernelSpec(feature_dim=16, window=9, sinks=1, slots=4, block=4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stretched_model_reads_further_with_the_same_weights(dtype):
    model = tiny_llama().to(dtype)
    stretched = stretch(model, 1024)
    assert stretched.config.max_position_embeddings == 1024
    assert stretched.config.rope_parameters["factor"] == 4
    assert model.config.max_position_embeddings == 256
    assert stretched.model.rotary_emb.inv_freq.dtype == torch.float32
    for (name, one), (_, other) in zip(model.state_dict().items(), stretched.state_dict().items(), strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name
    ids = torch.randint(1, 257, (1, 40))
    assert not torch.equal(model(ids).logits, stretched(ids).logits)


@torch.no_grad()
def test_a_converted_stretched_model_is_softmax_within_its_window_and_loads_as_it_was(tmp_path):
    stretched, ids = stretch(tiny_llama(), 512), torch.randint(1, 257, (1, 60))
    expected = stretched(ids).logits
    wide = convert(stretch(tiny_llama(), 512), ConversionPlan.uniform(SPEC.replace(window=64), 2))
    torch.testing.assert_close(wide(ids).logits, expected, atol=1e-4, rtol=0)
    converted = convert(stretched, ConversionPlan.uniform(SPEC, 2))
    save(converted, byte_tokenizer(), tmp_path / "out")
    again, _ = load(str(tmp_path / "out"))
    assert again.config.max_position_embeddings == 512
    assert torch.equal(again(ids).logits, converted(ids).logits)


def test_what_cannot_be_stretched_is_named():
    with pytest.raises(InputError, match="context=100 is not above the 256 positions"):
        stretch(tiny_llama(), 100)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(InputError, match="context=128: gpt2 has no plain rotary positions"):
        stretch(gpt2, 128)


def test_convert_stretches_and_records_it(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    out = tmp_path / "out"
    kernel = ["--window", "9", "--block", "4", "--slots", "4", "--feature-dim", "16"]
    dry = ["convert", str(tmp_path / "source"), "--dry-run", *kernel, "--context"]
    assert [main([*dry, context]) for context in ("100", "1k")] == [2, 0]
    assert main(["convert", str(tmp_path / "source"), "-o", str(out), "--context", "1k", *kernel]) == 0
    assert load(str(out))[0].config.max_position_embeddings == 1024
    assert "context: 1024" in next(out.glob("*.yaml")).read_text()


@torch.no_grad()
@pytest.mark.parametrize("name", supported())
def test_a_key_can_be_moved_as_the_model_itself_would(name):
    """Keys of the same text read 100 positions later are the same once both are moved to where a text begins."""
    spec = SPEC.replace(window=40)  # of the whole text: what a layer passes on then knows no positions
    student = tiny_student(name, spec.replace(reach=spec.least_reach)).double()
    layers = [layer.kernelize for layer in kernelized_layers(student).values()]
    assert any(layer.rotary for layer in layers) == (name not in TABLED)
    keys = []
    for start in (0, 100):
        pos, seen = torch.arange(start, start + 30), {}
        for layer in layers:
            layer.probe = Keeps(seen)
        student(torch.arange(1, 31)[None], position_ids=pos[None], use_cache=False)
        keys.append({i: move(layer, seen[layer], pos) for i, layer in enumerate(layers) if layer.rotary})
    for i, key in keys[0].items():
        assert_same(keys[1][i].float(), key.float(), f"layer {i}")


class Keeps:
    """A probe that keeps each layer's keys."""

    wants_output = True

    def __init__(self, seen: dict):
        self.seen = seen

    def __call__(self, layer, seen, output):
        self.seen[layer] = seen.key
        return output.y


def move(layer, key, pos):
    rotation = layer.kernel(0.5).rotation
    moved = rotation.turn(key, pos, 0)
    assert not torch.allclose(moved, key, atol=1e-3)
    return moved


@torch.no_grad()
def test_a_recipe_may_reach_half_as_far_as_the_model_has_positions(tmp_path):
    """Within it nothing changes; beyond, the loaded model does as the converted one, and unlike one with none."""
    tiny_llama().save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    flags = ["--window", "9", "--block", "4", "--slots", "8", "--feature-dim", "16"]
    assert main(["convert", str(tmp_path / "source"), "-o", str(tmp_path / "reaching"), *flags]) == 0
    reaching, plain = (load(str(tmp_path / "reaching"))[0] for _ in range(2))
    for layer in kernelized_layers(plain).values():
        layer.kernelize.spec = layer.kernelize.spec.replace(reach=0)
    (reach,) = {spec["reach"] for spec in reaching.config.kernelize["layers"]}
    assert reach == max(128, KernelSpec(window=9, block=4).least_reach) < 256
    assert "reach: half" in (tmp_path / "reaching/recipe.yaml").read_text()
    ids = torch.randint(1, 257, (1, 400), generator=torch.Generator().manual_seed(0))
    one, other = reaching(ids).logits, plain(ids).logits
    torch.testing.assert_close(one[:, :reach], other[:, :reach], rtol=0, atol=1e-4)
    assert (one[:, reach:] - other[:, reach:]).abs().max() > 1e-2
    whole = reaching(ids, use_cache=True).past_key_values
    first = reaching(ids[:, :300], use_cache=True).past_key_values
    pieces = [reaching(ids[:, t : t + 1], past_key_values=first).logits for t in range(300, 330)]
    torch.testing.assert_close(torch.cat(pieces, 1), one[:, 300:330], rtol=0, atol=1e-3)
    assert whole.get_seq_length() == 400


def test_frequencies_that_change_with_the_length_cannot_be_moved():
    model = tiny_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert rotary_context(model.config) is None
    with pytest.raises(SpecError, match="positions of this 'llama' change with the length; allowed: reach=0"):
        convert(model, ConversionPlan.uniform(SPEC.replace(reach=500), 2))
    with pytest.raises(SpecError, match="change with the length, and a forecast looks at keys without them; allowed: "):
        convert(model, ConversionPlan.uniform(SPEC.replace(policy="attention+forecast"), 2))


def test_a_forecast_has_the_models_rotation_with_or_without_a_reach():
    for reach in (0, 500):
        spec = SPEC.replace(policy="attention+forecast", reach=reach)
        model = convert(tiny_llama(), ConversionPlan.uniform(spec, 2))
        kernel = kernelized_layers(model)[0].kernelize.kernel(0.5)
        assert torch.equal(kernel.key_rotation.frequencies, model.model.rotary_emb.inv_freq)
        assert (kernel.rotation is not None) == bool(reach)


def test_a_recipe_says_of_how_many_positions_the_reach_is():
    for reach, expected in (("half", 4096), ("context", 8192), (None, 0)):
        recipe = Recipe.from_dict({"name": "r", "description": "d", "reach": reach})
        assert ConversionPlan.from_recipe(recipe, 2, context=8192).layers[0].reach == expected


def test_a_reach_within_the_window_is_refused():
    with pytest.raises(SpecError, match=f"reach=30 is neither 0 nor at least {SPEC.least_reach}"):
        SPEC.replace(reach=30)
