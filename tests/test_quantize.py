"""int8 and int4: what becomes integers and what does not, what it costs, and that it loads without kernelize."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import byte_tokenizer, tiny_llama
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, TorchAoConfig

from kernelize.card import model_card, read_facts
from kernelize.check import check
from kernelize.cli import main
from kernelize.convert import convert, load, save
from kernelize.errors import InputError
from kernelize.pipeline import finetune_source, quantize_source
from kernelize.plan import ConversionPlan
from kernelize.quantize import LEVELS, SCHEMES, quantize_model, to_int4, to_int8
from kernelize.recipe import load_recipe
from kernelize.runtime.spec import KernelSpec

SPEC = KernelSpec(feature_map="hedgehog", feature_dim=16, window=16, sinks=2, slots=8, block=8)
MEASURE = {"lengths": (96,), "pieces": 2, "chunk": 96}
LOSS = {8: 0.1, 4: 0.5}  # nats a token, allowed of random weights; other weights are 2.6 apart


def converted(**changes):
    model = tiny_llama(hidden_size=64, intermediate_size=96, **changes)
    return convert(model, ConversionPlan.uniform(SPEC, 2, keep=(1,)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return save(converted(), byte_tokenizer(), tmp_path_factory.mktemp("quantize") / "whole")


@pytest.fixture(scope="module", params=sorted(SCHEMES), ids="int{}".format)
def made(request, whole, tmp_path_factory):
    """(bits, the folder, what `quantize` says of it)."""
    output = tmp_path_factory.mktemp("quantize") / f"int{request.param}"
    return request.param, output, quantize_source(str(whole), request.param, output, device="cpu", settings=MEASURE)


def logits(model) -> torch.Tensor:
    ids = torch.arange(1, 65)[None]
    with torch.no_grad():
        return model(ids).logits


# --- integers ---


def test_int8_is_half_a_step_away_at_most():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((to_int8(weight).dequantize() - weight).abs() <= 0.51 * step).all()


def test_int4_is_half_a_step_away_at_most_and_exact_on_sixteen_levels():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 64, generator=generator)
    low, high = weight.view(8, 2, 32).aminmax(dim=-1)
    step = ((high - low) / LEVELS).repeat_interleave(32, 1)
    assert ((to_int4(weight).dequantize() - weight).abs() <= 0.51 * step).all()
    levels = torch.randint(0, LEVELS + 1, (8, 2, 32), generator=generator)
    levels[..., 0], levels[..., 1] = 0, LEVELS
    grid = (levels * 0.037 - 0.11).view(8, 64)
    assert torch.allclose(to_int4(grid).dequantize(), grid, rtol=0, atol=1e-6)


def test_a_group_of_equal_weights_stays():
    weight = torch.full((2, 32), 0.25)
    assert torch.equal(to_int4(weight).dequantize(), weight)
    assert torch.equal(to_int4(torch.zeros(2, 32)).dequantize(), torch.zeros(2, 32))


# --- the checkpoint ---


def test_integers_are_the_linear_layers_and_nothing_else(made, whole):
    _, folder, result = made
    mine, theirs = load(folder)[0], load(whole)[0].state_dict()
    linear = {f"{n}.weight" for n, m in mine.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    for name, tensor in mine.state_dict().items():
        assert (type(tensor) is not torch.Tensor) == (name in linear), name
        if name not in linear:
            assert tensor.dtype == theirs[name].dtype
            assert torch.equal(tensor, theirs[name]), name
    assert any(".kernelize." in name for name in theirs)
    assert result.weights == sum(theirs[name].numel() for name in linear)
    assert result.bytes_after < result.bytes_before


def test_what_was_saved_is_what_was_quantised(made, whole):
    bits, folder, _ = made
    model = load(whole)[0]
    quantize_model(model, bits)
    assert torch.equal(logits(load(folder)[0]), logits(model))


def test_an_original_with_integers_is_converted_and_saved_with_them(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    student = convert(model, ConversionPlan.uniform(SPEC, 2))
    student.save_pretrained(tmp_path / "made")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()), logits(student))


def test_the_files_are_safetensors_with_integers(made):
    _, folder, _ = made
    assert not [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    with safe_open(folder / "model.safetensors", "pt") as file:
        kinds = {key: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert kinds["model.layers.0.self_attn.q_proj._weight_qdata"] == torch.int8


def test_the_loss_is_small_and_stands_in_the_card(made):
    bits, folder, result = made
    assert 0 < result.value("kl") <= LOSS[bits]
    card = model_card(folder)
    assert "## Quantisation" in card
    assert SCHEMES[bits].title in card
    assert f"| ppl | ppl_ratio | 96 |  | – | {result.value('ppl_ratio'):.4g}" in card
    assert read_facts(folder).commands[-1] == f"kernelize quantize whole --bits {bits} --output int{bits}"


def test_whole_weights_have_no_section_in_the_card(whole):
    assert "Quantisation" not in model_card(whole)


# --- refusals ---


def test_what_cannot_be_quantised_is_said(whole, made, tmp_path):
    _, folder, _ = made
    with pytest.raises(InputError, match="bits=3 is not one of 8, 4"):
        quantize_source(str(whole), 3, tmp_path / "out", device="cpu")
    with pytest.raises(InputError, match="quantised already"):
        quantize_source(str(folder), 8, tmp_path / "out", device="cpu")
    with pytest.raises(InputError, match="quantised"):
        finetune_source(str(folder), load_recipe("default"), tmp_path / "out")
    with pytest.raises(InputError, match="quantised"):
        check(load(str(folder))[0])
    assert not (tmp_path / "out").exists()


def test_a_missing_torchao_is_one_line(whole, made, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.quantizers.quantizer_torchao.is_torchao_available", lambda: False)
    with pytest.raises(InputError, match=r"cannot load .* requires torchao library \(`pip install torchao`\)"):
        load(made[1])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'kernelize\[quantize\]'"):
        quantize_source(str(whole), 8, tmp_path / "out")


def test_weights_that_torchao_cannot_take_are_named():
    odd = converted(num_attention_heads=2, num_key_value_heads=1, head_dim=24)
    with pytest.raises(
        InputError, match=r"bits=4: model\.layers\.0\.self_attn\.o_proj has 48 inputs, no multiple of 32"
    ):
        quantize_model(odd, 4)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=64)
    plan = ConversionPlan.uniform(SPEC, 2)
    with pytest.raises(InputError, match="no linear layer"):
        quantize_model(convert(GPT2LMHeadModel(config).eval(), plan), 8)


def test_the_command_says_what_it_cost(whole, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night. " * 200)
    command = ["quantize", whole, "--bits", "8", "-o", tmp_path / "out", "--text", text, "--pieces", "1"]
    assert main([*map(str, command), "--json", str(tmp_path / "out.json"), "--device", "cpu"]) == 0
    assert "parameters are int8" in capsys.readouterr().out
    assert '"ppl_ratio"' in (tmp_path / "out.json").read_text()
    assert main(["quantize", str(whole), "--bits", "5", "-o", str(tmp_path / "no")]) == 2
