"""PEFT's LoRA on kernelized models: default targets for their types, and which layers it has reached."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .runtime.modeling import PREFIX, supported

FUSED = {"phi3": ["qkv_proj"]}  # no separate projections; PEFT names no targets of its own for these
SPLIT = ["q_proj", "v_proj"]


def register_lora_targets() -> None:
    """Lets `peft.get_peft_model` find its default targets, the original type's, for every `kernelized_<type>`."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    for base in supported():
        TARGETS.setdefault(PREFIX + base, TARGETS.get(base) or FUSED.get(base, SPLIT))


class Coverage(NamedTuple):
    """Names of linear layers with an adapter, and of those without one."""

    adapted: tuple[str, ...]
    missed: tuple[str, ...]


def lora_coverage(model: nn.Module) -> Coverage:
    """What LoRA has reached in a model that PEFT has wrapped; the LM head is left out, as PEFT leaves it out.

    A target that names no layer of a family is silently no target: look here before you train.
    """
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    heads = [m.get_output_embeddings() for m in model.modules() if isinstance(m, PreTrainedModel)]
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    inside = tuple(f"{name}." for name in adapted)
    missed = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and name not in adapted
        and not name.startswith(inside)
        and not any(module is head for head in heads)
    ]
    return Coverage(tuple(adapted), tuple(missed))
