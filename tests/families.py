"""One tiny random model a family: two to four layers, all heads and oddities of the real one."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kernelize.runtime.modeling import FAMILIES, kernelize_model, native_windows, supported
from kernelize.runtime.spec import KernelSpec

SPEC = KernelSpec(window=16, block=8, slots=12, sinks=2, feature_dim=8)
POSITIONS = 2048

COMMON = {
    "vocab_size": 257,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2}
HEAD = {"head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_hidden_layers": 4, "sliding_window": 12}
TYPES = ["sliding_attention", "full_attention"] * 2

CHANGES: dict[str, dict] = {
    "cohere": GATED | {"use_qk_norm": True},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    "gemma": GATED | HEAD,
    "gemma2": GATED | HEAD | LOCAL | {"layer_types": TYPES, "attn_logit_softcapping": 3.0},
    "gemma3_text": GATED | HEAD | LOCAL | {"layer_types": TYPES},
    "gpt2": {},
    "gpt_bigcode": {"multi_query": True},
    "gpt_neo": {
        "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 12,
        "intermediate_size": 64,
    },
    "gpt_neox": {"intermediate_size": 64},
    "gpt_oss": GATED | HEAD | LOCAL | {"layer_types": TYPES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {"rotary_dim": 4},
    "granite": GATED | {"attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "llama": GATED,
    "llama4_text": GATED | HEAD | {
        "num_hidden_layers": 4, "intermediate_size_mlp": 48, "num_local_experts": 2, "floor_scale": 8192,
        "no_rope_layers": [1, 1, 1, 0], "attention_chunk_size": 24,
        "layer_types": ["chunked_attention", "full_attention"] * 2,
    },
    "mistral": GATED | {"sliding_window": None},
    "mixtral": GATED | {"num_local_experts": 4, "sliding_window": None},
    "olmo2": GATED,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {"intermediate_size": 48, "partial_rotary_factor": 0.5, "qk_layernorm": True},
    "phi3": GATED | {"sliding_window": None},
    "qwen2": GATED | LOCAL | {"layer_types": TYPES, "use_sliding_window": True},
    "qwen2_moe": GATED | EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3": GATED | HEAD,
    "qwen3_moe": GATED | HEAD | EXPERTS,
    "smollm3": GATED | {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "starcoder2": GATED | {"sliding_window": None},
}  # fmt: skip
assert sorted(CHANGES) == supported(), set(CHANGES) ^ set(supported())


def tiny_config(name: str, **changes):
    """The family's config, made small."""
    base = {k: v for k, v in COMMON.items() if name != "gpt_neo" or not k.startswith("num_")}
    return AutoConfig.for_model(name, **(base | CHANGES.get(name, {}) | changes))


def tiny_teacher(name: str, seed: int = 0):
    """A random softmax model of the family; norms and biases are random too, so that leaving one out shows."""
    torch.manual_seed(seed)
    options = {"attn_implementation": "eager"} if FAMILIES[name].lacks == "sdpa" else {}
    model = AutoModelForCausalLM.from_config(tiny_config(name), **options).eval()
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def plan_for(config, spec: KernelSpec = SPEC) -> list[KernelSpec | None]:
    """`spec` in every layer that has no window of its own."""
    local = native_windows(config)
    return [None if i in local else spec for i in range(config.num_hidden_layers)]


def tiny_student(name: str, spec: KernelSpec = SPEC, seed: int = 0):
    """The teacher, converted; the gate is open, so that the memory shows."""
    model = tiny_teacher(name, seed)
    model = kernelize_model(model, plan_for(model.config, spec)).eval()
    for key, weight in model.named_parameters():
        if key.endswith("kernelize.log_gate"):
            weight.data.fill_(0.0)
    return model


REFUSED = sorted(name for name, family in FAMILIES.items() if family.refused)
