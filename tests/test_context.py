"""Stretched positions: another length, the same weights, and a checkpoint that remembers both."""

from __future__ import annotations

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from kernelize.cli import main
from kernelize.convert import convert, load, save, stretch
from kernelize.errors import InputError
from kernelize.plan import ConversionPlan
from kernelize.runtime.spec import KernelSpec

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
    assert main(["convert", str(tmp_path / "source"), "-o", str(out), "--context", "1k", *kernel]) == 0
    assert load(str(out))[0].config.max_position_embeddings == 1024
    assert "context: 1024" in next(out.glob("*.yaml")).read_text()
