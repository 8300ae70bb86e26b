"""Models of well-known shapes with random weights: what is fast does not depend on what was learned."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .errors import InputError
from .runtime.spec import SpecError, choose

LONGEST = 2**20  # positions: a rotation has no table to outgrow


def _llama(hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "max_position_embeddings": LONGEST,
        **more,
    }


TIED = {"tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _llama(64, 128, 2, 4, 2, 257),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, **TIED),
    "llama3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, head_dim=64, **TIED),
    "llama3-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "qwen2.5-7b": _llama(3584, 18944, 28, 28, 4, 152064) | {"model_type": "qwen2"},
    "qwen3-8b": _llama(4096, 12288, 36, 32, 8, 151936, head_dim=128) | {"model_type": "qwen3"},
}


def random_model(shape: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A softmax model of a named shape, in evaluation mode; InputError for a name that is not in SHAPES."""
    try:
        choose("shape", shape, SHAPES)
    except SpecError as error:
        raise InputError(str(error)) from None
    fields = dict(SHAPES[shape])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(seed)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()
