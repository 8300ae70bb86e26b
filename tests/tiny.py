"""A byte tokenizer and a tiny Llama with random weights, for tests that need no real checkpoint."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


def byte_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, ids 1 to 256; `</s>`, id 0, ends a text."""
    vocabulary = {"</s>": 0} | {
        letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)
    }
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    """Two layers, four query heads on two key-value heads, vocabulary of `byte_tokenizer`."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 257}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    tokens = {"bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**(shape | heads | tokens | changes))).eval()
