"""Default LoRA targets of PEFT for the kernelized model types."""

from __future__ import annotations

from .runtime.modeling import PREFIX, supported

FUSED = {"phi3": ["qkv_proj"]}  # no separate projections; PEFT names no targets of its own for these
SPLIT = ["q_proj", "v_proj"]


def register_lora_targets() -> None:
    """Lets `peft.get_peft_model` find its default targets, the original type's, for every `kernelized_<type>`."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    for base in supported():
        TARGETS.setdefault(PREFIX + base, TARGETS.get(base) or FUSED.get(base, SPLIT))
