"""The surgery: the original Transformers classes with a mixin in front, as a new model type `kernelized_<type>`.

Every original parameter keeps its name; the new ones are `<attention>.kernelize.*`. Projections, norms and positions
stay Transformers' own code; the attention calls `attention_function` with q, k, v after them. Classes are made when
they are first asked for. This file and its neighbours are copied beside the weights of every checkpoint.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .attention import ATTENTION, KernelAttention
from .cache import adopt_cache
from .feature_maps import FeatureMap
from .layout import layout_of
from .spec import KernelSpec, SpecError

VERSION = 1  # of the `kernelize` entry of a config
PREFIX = "kernelized_"


@dataclass(frozen=True)
class Family:
    """Where a model type keeps its decoder layers, and how a layer calls its self-attention."""

    layers: str = "model.layers"
    attention: str = "self_attn"
    note: str = ""


FAMILIES: dict[str, Family] = {
    "gemma3_text": Family(note="its sliding-window layers stay as they are"),
    "gpt2": Family("transformer.h", "attn"),
    "gpt_neox": Family("gpt_neox.layers", "attention"),
    "gpt_oss": Family(note="its sliding-window layers stay as they are; attention sinks stay in the normaliser"),
    "llama": Family(),
    "mistral": Family(),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "smollm3": Family(),
}


def family_of(model_type: str) -> Family:
    """The row of a model type, with or without the prefix; SpecError when there is none."""
    base = model_type.removeprefix(PREFIX)
    if base not in FAMILIES:
        raise SpecError(f"model type {base!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[base]


def attentions(model: nn.Module, model_type: str) -> dict[int, Any]:
    """Layer index -> self-attention module, for every decoder layer."""
    family = family_of(model_type)
    layers: Any = model.get_submodule(family.layers)
    return {i: layer.get_submodule(family.attention) for i, layer in enumerate(layers)}


def kernelized_layers(model: nn.Module) -> dict[int, Any]:
    """Layer index -> attention module, for the converted layers; `.kernelize` is its KernelAttention."""
    found = attentions(unwrapped(model), unwrapped(model).config.model_type)
    return {i: m for i, m in found.items() if isinstance(m, KernelizedAttentionMixin)}


def unwrapped(model: nn.Module) -> Any:
    """The Transformers model inside a PEFT or parallel wrapper."""
    while not isinstance(model, PreTrainedModel):
        model = next(m for m in model.children() if isinstance(m, nn.Module))
    return model


class KernelizedAttentionMixin:
    """In front of an attention class: its forward gets no cache, the attention function gets the layer's state."""

    kernelize: KernelAttention
    layer_idx: int

    def forward(self, *args: Any, past_key_values: Cache | None = None, **kwargs: Any) -> Any:
        state = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        return super().forward(*args, past_key_values=None, kernelize_cache=state, **kwargs)  # type: ignore[misc]


class KernelizedModelMixin:
    """In front of a ForCausalLM class: converts its attention when it is built, lays out every batch once."""

    _is_stateful = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ["kernelize"]
    config: Any

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install(self, plan_of(config))
        self.post_init()  # type: ignore[attr-defined]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (FeatureMap, KernelAttention)):
            module.reset()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the original, with past_key_values of constant size; logits are [B, T, V]."""
        batch, length = (inputs_embeds if input_ids is None else input_ids).shape[:2]  # type: ignore[union-attr]
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not self.training:  # type: ignore[attr-defined]
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            adopt_cache(past_key_values, self.converted)
        has_cache = past_key_values is not None
        kwargs["kernelize_layout"] = layout_of(length, attention_mask, position_ids, batch, has_cache)
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=has_cache,
            **kwargs,
        )

    @property
    def converted(self) -> tuple[int, ...]:
        """Indices of the layers that hold a kernelized state."""
        return tuple(i for i, spec in enumerate(plan_of(self.config)) if spec is not None)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if model_kwargs.get("past_key_values") is not None:
            adopt_cache(model_kwargs["past_key_values"], self.converted)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """The ordinary checkpoint, and beside it the runtime that loads it where kernelize is not installed."""
        module = Path(__file__).stem
        self.config.auto_map = {
            "AutoConfig": f"{module}.{type(self.config).__name__}",
            "AutoModelForCausalLM": f"{module}.{type(self).__name__}",
        }
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        for source in sorted(Path(__file__).parent.glob("*.py")):
            if source.name != "__init__.py":
                shutil.copy(source, Path(save_directory) / source.name)


# --- plan in the config -------------------------------------------------------------------------------------


def plan_of(config: PreTrainedConfig) -> list[KernelSpec | None]:
    """A spec a layer, None where softmax is kept."""
    entry = config.kernelize
    if not isinstance(entry, dict) or entry.get("version") != VERSION:
        raise SpecError(f"config.kernelize={entry!r} is not a plan of version {VERSION}")
    specs = [None if s is None else KernelSpec.from_dict(s) for s in entry["layers"]]
    if len(specs) != config.num_hidden_layers:
        raise SpecError(f"the plan has {len(specs)} layers, the model {config.num_hidden_layers}")
    return specs


def plan_entry(layers: list[KernelSpec | None]) -> dict:
    """What `config.kernelize` holds."""
    return {"version": VERSION, "layers": [None if s is None else s.to_dict() for s in layers]}


# --- surgery ------------------------------------------------------------------------------------------------


def kernelize_model(model: PreTrainedModel, layers: list[KernelSpec | None]) -> PreTrainedModel:
    """Turns `model` itself into its kernelized class; new parameters are at their initial values.

    Raises SpecError for a model type without a row, a model that is converted already, or a plan that does not fit.
    """
    base = model.config.model_type
    if base.startswith(PREFIX):
        raise SpecError(f"the model is already kernelized ({base})")
    family_of(base)
    if all(s is None for s in layers):
        raise SpecError("the plan keeps softmax in every layer; nothing to convert")
    config = kernelized_config(model.config, layers)
    plan_of(config)
    old = model.config
    for module in model.modules():
        if module.__dict__.get("config") is old:
            module.config = config  # type: ignore[assignment]
    register(base)
    model.__class__ = model_class(base)
    install(model, layers)
    for module in (m for attention in kernelized_layers(model).values() for m in attention.kernelize.modules()):
        if isinstance(module, (FeatureMap, KernelAttention)):
            with torch.no_grad():
                module.reset()
    return model


def kernelized_config(config: PreTrainedConfig, layers: list[KernelSpec | None]) -> PreTrainedConfig:
    data = config.to_dict()
    for field in ("model_type", "architectures", "quantization_config", "transformers_version", "auto_map"):
        data.pop(field, None)
    kind: Any = config_class(config.model_type)
    new = kind(**data, kernelize=plan_entry(layers))
    new.dtype = config.dtype
    new._attn_implementation_internal = config._attn_implementation
    return new


def install(model: Any, layers: list[KernelSpec | None]) -> None:
    """Puts a KernelAttention into every layer that has a spec; parameters are on the layer's device, float32."""
    config = model.config
    heads = config.num_attention_heads
    if all(spec is not None for spec in layers):
        # masks are made for the model's implementation, and no converted layer needs one (it would be T×T)
        config._attn_implementation_internal = ATTENTION
    for i, attention in attentions(model, config.model_type).items():
        spec = layers[i]
        if spec is None:
            continue
        attention.__class__ = attention_class(type(attention))
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation_internal = ATTENTION
        weight = next(attention.parameters())
        kv_heads, head_dim = kv_heads_of(config), head_dim_of(config)
        with torch.device(weight.device):
            attention.kernelize = KernelAttention(spec, heads, kv_heads, head_dim).float()


@contextmanager
def softmax_twin(model: Any) -> Iterator[Any]:
    """Within the context `model` is of its original class again, with eager softmax attention on the same weights."""
    parts = list(kernelized_layers(model).values())
    changed = [model, *parts]
    classes = [type(part) for part in changed]
    configs = [model.config, *(part.config for part in parts)]
    kept = [config._attn_implementation_internal for config in configs]
    try:
        for part, kind in zip(changed, classes, strict=True):
            part.__class__ = kind.__mro__[2]  # [kernelized, mixin, original]
        for config in configs:
            config._attn_implementation_internal = "eager"
        yield model
    finally:
        for part, kind in zip(changed, classes, strict=True):
            part.__class__ = kind
        for config, implementation in zip(configs, kept, strict=True):
            config._attn_implementation_internal = implementation


def kv_heads_of(config: PreTrainedConfig) -> int:
    """Key-value heads; model types without grouped heads do not name them."""
    return config.to_dict().get("num_key_value_heads") or config.num_attention_heads


def head_dim_of(config: PreTrainedConfig) -> int:
    return config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads


# --- classes ------------------------------------------------------------------------------------------------

_CLASSES: dict[str, type] = {}


def attention_class(original: type) -> type:
    """The original attention class with the mixin in front."""
    name = f"Kernelized{original.__name__}"
    if name not in _CLASSES:
        _CLASSES[name] = type(name, (KernelizedAttentionMixin, original), {"__module__": __name__})
    return _CLASSES[name]


def config_class(base: str) -> type[PreTrainedConfig]:
    return _classes(base)[0]


def model_class(base: str) -> type[PreTrainedModel]:
    return _classes(base)[1]


def _classes(base: str) -> tuple[type, type]:
    """(config class, model class) of a base model type, made and registered once."""
    original_config: type = CONFIG_MAPPING[base]
    original: Any = MODEL_FOR_CAUSAL_LM_MAPPING[original_config]
    config_name, model_name = f"Kernelized{original_config.__name__}", f"Kernelized{original.__name__}"
    if model_name not in _CLASSES:
        fields = {"model_type": PREFIX + base, "kernelize": None, "__module__": __name__}
        annotations = {"kernelize": "dict | None"}
        config = type(config_name, (original_config,), {**fields, "__annotations__": annotations})
        body = {"config_class": config, "__annotations__": {"config": config}, "__module__": __name__}
        _CLASSES[config_name] = config
        _CLASSES[model_name] = type(model_name, (KernelizedModelMixin, original), body)
    return _CLASSES[config_name], _CLASSES[model_name]


def register(*base_types: str) -> None:
    """Makes the Auto classes of Transformers know `kernelized_<type>` for these types; no argument: all of them.

    Importing a model's code takes time, so nothing is registered unasked. A remote copy is registered by its loader.
    """
    for base in base_types or FAMILIES:
        config, model = _classes(base)
        if not __name__.startswith("transformers_modules"):
            AutoConfig.register(PREFIX + base, config, exist_ok=True)
            AutoModelForCausalLM.register(config, model, exist_ok=True)


def __getattr__(name: str) -> type:
    """KernelizedLlamaForCausalLM and the like, by name: the remote-code loader asks for them."""
    for base in FAMILIES:
        config: type = CONFIG_MAPPING[base]
        model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config]
        if name in (f"Kernelized{config.__name__}", f"Kernelized{model.__name__}"):
            _classes(base)
            return _CLASSES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
