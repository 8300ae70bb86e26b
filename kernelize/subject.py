"""A model under test, and how it is run: chunk by chunk, with its state carried on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .errors import InputError
from .runtime.cache import CACHE
from .weights import plain

log = logging.getLogger("kernelize")


@dataclass(frozen=True)
class Subject:
    """A model under test. `fingerprint` changes with its weights and its configuration."""

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str

    @classmethod
    def of(cls, name: str, model, tokenizer) -> Subject:
        model.eval()
        return cls(name, model, tokenizer, fingerprint(model))


def fingerprint(model) -> str:
    """A hash of configuration and weights; of a large tensor, 65536 evenly spaced entries and its shape."""
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in plain(model.state_dict().items()):
        add_tensor(digest, name, tensor)
    return digest.hexdigest()


def add_tensor(digest: hashlib.blake2b, name: str, tensor: Tensor) -> None:
    """Takes a tensor into a hash: its name, shape and type, and 65536 evenly spaced entries."""
    flat = tensor.detach().reshape(-1)
    part = flat[:: max(1, flat.numel() // 65536)].contiguous().cpu()
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(part.view(torch.uint8).numpy().tobytes())


def check_positions(subject: Subject, reach: int) -> None:
    """Learned positions end; rotary ones only leave what was trained, which is said and allowed."""
    check_learned(subject.model, subject.name, reach)
    limit = trained_length(subject)
    if limit is not None and reach > limit:
        log.warning("%s: length %d is beyond the %d positions that it was trained for", subject.name, reach, limit)


def check_learned(model, name: str, reach: int) -> None:
    """InputError where `reach` tokens are more than a model with learned positions has."""
    limit = learned_positions(model)
    if limit is not None and reach > limit:
        raise InputError(f"length={reach} (answers included) is beyond the {limit} learned positions of {name}")


def learned_positions(model) -> int | None:
    """How many positions a model has learned; None where they are no table, so that there is something beyond."""
    limit = _positions(model.config)
    return limit if limit is not None and has_position_table(model, limit) else None


def has_position_table(model, limit: int) -> bool:
    """Whether the `limit` positions of a model are learned ones, so that there is nothing beyond."""
    inputs = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not inputs]
    return any(limit <= table.num_embeddings <= limit + 2 for table in tables)  # OPT's table has two more


def trained_length(subject: Subject) -> int | None:
    return _positions(subject.model.config)


def _positions(config) -> int | None:
    config = config.get_text_config()
    name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    return config.to_dict().get(name)


# --- running a model with its state ---------------------------------------------------------------------------


@torch.inference_mode()
def stream(model, ids: Tensor, chunk: int) -> Iterator[tuple[Tensor, Any]]:
    """Feeds ids [B, T] chunk by chunk with the state carried on; yields (logits [B, C, V], the cache) a chunk.

    Never more than one chunk of logits exists; for a model of constant state, memory does not depend on T.
    """
    cache = DynamicCache(config=model.config)
    for part in ids.split(chunk, dim=1):
        yield model(part, use_cache=True, **{CACHE: cache}).logits, cache


@torch.inference_mode()
def greedy(model, ids: Tensor, count: int, chunk: int) -> Tensor:
    """The `count` likeliest tokens after ids [B, T], one after the other: [B, count]. Ends at no special token."""
    cache = DynamicCache(config=model.config)
    for part in ids.split(chunk, dim=1):
        logits = model(part, use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits
    tokens = [logits[:, -1:].argmax(-1)]
    while len(tokens) < count:
        logits = model(tokens[-1], use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits
        tokens.append(logits[:, -1:].argmax(-1))
    return torch.cat(tokens, dim=1)


def likeliest(model, ids: Tensor, chunk: int) -> Tensor:
    """The likeliest next token at every position of ids [B, T]: [B, T]."""
    return torch.cat([logits.argmax(-1) for logits, _ in stream(model, ids, chunk)], dim=1)
