"""What a model has read, as a file: read a document once, ask many questions at the cost of the question."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from .errors import InputError
from .files import write_file
from .runtime.cache import CACHE, KernelState, adopt_cache, kernel_layers
from .runtime.modeling import PREFIX, plan_of, unwrapped
from .runtime.spec import KernelSpec
from .runtime.state import State, empty_state
from .weights import plain

FORMAT = "kernelize state 2"
INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an element


def read(model: Any, ids: Tensor, *, chunk: int = 2048, after: Cache | None = None) -> Cache:
    """The cache after `ids` [B, T], or `after` once it has read them too; `chunk` tokens at a time, no logits kept."""
    cache = DynamicCache(config=unwrapped(model).config) if after is None else after
    with torch.no_grad():
        for piece in ids.to(model.device).split(chunk, 1):
            model(input_ids=piece, use_cache=True, logits_to_keep=1, **{CACHE: cache})
    return cache


def fork(cache: Cache, continuations: int) -> Cache:
    """A copy of `cache` in which every row stands `continuations` times."""
    if continuations < 1:
        raise InputError(f"continuations={continuations} is below 1")
    forked = copy.deepcopy(cache)
    forked.batch_repeat_interleave(continuations)
    return forked


def generate_from(model: Any, cache: Cache, ids: Tensor, **settings: Any) -> Tensor:
    """Tokens [B, N] that `model.generate` writes after what `cache` has read and then `ids` [B, T]; `cache` goes on.

    `generate` is shown placeholders where the text was, so settings that look at the prompt (repetition penalties,
    prompt look-up) see only `ids`. InputError where `cache` holds another number of rows.
    """
    rows = {layer.batch_size for layer in kernel_layers(cache) if layer.state is not None}
    if rows - {ids.shape[0]}:
        raise InputError(f"the state holds {max(rows)} rows, the prompt {ids.shape[0]}")
    before = torch.zeros(ids.shape[0], int(cache.get_seq_length()), dtype=ids.dtype, device=ids.device)
    prompt = torch.cat([before, ids], 1)
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, **{CACHE: cache}, **settings)[:, prompt.shape[1] :]


def check_savable(model: Any) -> None:
    """InputError for a model whose states no file holds: one that is not kernelized, or keeps softmax in a layer."""
    config = unwrapped(model).config
    if not config.model_type.startswith(PREFIX):
        raise InputError(f"a state of constant size is what a kernelized model has; this is a {config.model_type}")
    kept = [i for i, spec in enumerate(plan_of(config)) if spec is None]
    if kept:
        raise InputError(f"layer {kept[0]} keeps softmax attention, whose cache a saved state does not hold")


def save_state(cache: Cache, path: str | Path, model: Any) -> Path:
    """Writes what `cache` holds for `model` as a safetensors file, of a size that does not depend on the text.

    The file is complete or not there; one that was there is replaced. InputError where a layer keeps softmax, full
    or in a window of its own, where nothing was read yet, or where weights are offloaded: they have no fingerprint.
    """
    layers, path = _states(cache), Path(path)
    tensors = {f"{i}.{name}": value for i, layer in enumerate(layers) for name, value in _fields(layer).items()}
    metadata = {"format": FORMAT, "model": json.dumps(_identity(model), sort_keys=True)}
    return write_file(path, serialize(tensors, metadata))


def load_state(path: str | Path, model: Any) -> Cache:
    """The cache that was saved at `path`, on the model's device; InputError if it is no state of a model like this."""
    check_savable(model)
    config = unwrapped(model).config
    cache = DynamicCache(config=config)
    adopt_cache(cache, tuple(range(config.num_hidden_layers)))
    try:
        with safe_open(str(path), framework="pt", device=str(model.device)) as file:
            _check(path, file.metadata() or {}, model)
            for i, layer in enumerate(kernel_layers(cache)):
                state = State(*(file.get_tensor(f"{i}.{name}") for name in State._fields))
                _check_sizes(state, plan_of(config)[i], f"{str(path)!r}, layer {i}")
                layer.advance(state, 0)
                layer.length = file.get_tensor(f"{i}.length")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{str(path)!r} is no saved state: {error}") from error
    return cache


def _states(cache: Cache) -> list[KernelState]:
    layers = kernel_layers(cache)
    if not layers or any(layer.state is None for layer in layers):
        raise InputError("the cache has read nothing yet; there is no state to save")
    if len(layers) < len(cache.layers):
        kept = [i for i, layer in enumerate(cache.layers) if not isinstance(layer, KernelState)]
        raise InputError(f"layer {kept[0]} keeps softmax attention, whose cache a saved state does not hold")
    return layers


def _fields(layer: KernelState) -> dict[str, Tensor]:
    assert layer.state is not None
    fields = layer.state._asdict() | {"length": torch.as_tensor(layer.length)}
    return {name: value.detach().clone().contiguous() for name, value in fields.items()}


def _identity(model: Any) -> dict[str, Any]:
    """What a state depends on: model type, plan, sizes and dtype, weights."""
    base = unwrapped(model)
    weight = next(base.parameters())
    shape = [list(weight.shape), base.config.num_hidden_layers, str(weight.dtype)]
    plan = base.config.kernelize
    return {"type": base.config.model_type, "plan": plan, "shape": shape, "weights": fingerprint(base)}


def fingerprint(model: nn.Module) -> str:
    """A hash of every weight's bits, summed as integers: one pass, and the same number on every device.

    InputError for weights that are offloaded.
    """
    sums = {}
    for name, weight in plain(model.named_parameters()):
        if weight.is_meta:
            raise InputError(f"weight {name!r} is offloaded; a state needs a model whose weights are in memory")
        bits = weight.detach().contiguous().view(INTEGER[weight.element_size()])
        sums[name] = int(bits.sum(dtype=torch.int64))
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def _check_sizes(state: State, spec: KernelSpec | None, where: str) -> None:
    """InputError for tensors that are not those of one state of `spec`."""
    if spec is None or state.keys.ndim != 4 or state.values.ndim != 4:
        raise InputError(f"{where}: keys {list(state.keys.shape)} are no state")
    fresh = empty_state(spec, state.keys[:, :, :1], state.values[:, :, :1])
    for name, value, expected in zip(State._fields, state, fresh, strict=True):
        if (value.shape, value.dtype) != (expected.shape, expected.dtype):
            found, wanted = (f"{list(x.shape)} of {x.dtype}" for x in (value, expected))
            raise InputError(f"{where}: {name} is {found}, a state has {wanted}")


def _check(path: str | Path, metadata: dict[str, str], model: Any) -> None:
    if metadata.get("format") != FORMAT:
        raise InputError(f"{str(path)!r} is no saved state: its format is {metadata.get('format')!r}, not {FORMAT!r}")
    ours = json.loads(json.dumps(_identity(model)))
    try:
        theirs = dict(json.loads(metadata.get("model", "")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{str(path)!r} does not say of which model it is the state ({error})") from error
    other = [field for field in ours if ours[field] != theirs.get(field)]
    if other:
        raise InputError(f"{str(path)!r} is the state of another model: its {' and '.join(other)} differ")
