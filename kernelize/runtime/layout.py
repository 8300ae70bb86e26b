"""What a batch looks like: which tokens are padding, which belong to one document. Computed once a forward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils


class _Known(threading.local):
    """What a thread knows of its rows."""

    whole = False


_known = _Known()


@dataclass(frozen=True)
class Layout:
    """Of the T new tokens of a batch. Both None: rows of T tokens of one document each."""

    valid: Tensor | None = None  # [B, T] bool, False at padding
    documents: Tensor | None = None  # [B, T] int64, index of a token's document in its row
    pieces: tuple[Tensor, ...] = ()  # documents of like length as rows: flat indices [n, L] into [B·T]
    source: Tensor | None = None  # [B, T] int64: where each token stands in all pieces, one after the other


def layout_of(
    length: int, attention_mask: Tensor | None, position_ids: Tensor | None, batch: int, has_cache: bool
) -> Layout | None:
    """From the 2-D mask [B, past + T], or from positions [B, T] that restart inside a row (packed documents).

    Positions count only where there is neither a mask nor a cache: the rule of Transformers itself.
    """
    if attention_mask is not None and attention_mask.ndim == 2:
        valid = attention_mask[:, -length:].bool().expand(batch, -1)
        skippable = length > 1 and not torch.compiler.is_compiling()
        return None if skippable and bool(valid.all()) else Layout(valid=valid)
    if attention_mask is None and position_ids is not None and not has_cache and length > 1 and not _known.whole:
        return packed(position_ids.expand(batch, -1))
    return None


@contextmanager
def whole_rows(known: bool = True) -> Iterator[None]:
    """Within the context, where it is `known` that every row is one document, this thread's forwards do not ask the
    device for it.

    Nor do Transformers' own masks: those would also take every row as packed while a CUDA graph is captured, and
    hand softmax attention a mask T × T, as they do wherever values cannot be read (of 5.17; without padding none are).
    """
    before = _known.whole
    try:
        if known:
            _answer_masks()
            _known.whole = True
        yield
    finally:
        _known.whole = before


@cache
def _answer_masks() -> None:
    """Lets Transformers' masks know, for good: for a thread that knows nothing, nothing is different."""
    for name, answer in (("find_packed_sequence_indices", None), ("is_tracing", False)):
        setattr(masking_utils, name, _unless_whole(getattr(masking_utils, name), answer))


def _unless_whole(asks: Callable[..., Any], answer: Any) -> Callable[..., Any]:
    @wraps(asks)
    def answered(*args: Any, **named: Any) -> Any:
        return answer if _known.whole else asks(*args, **named)

    return answered


def are_whole(position_ids: Tensor) -> bool:
    """Whether every row of positions [B, T] is one document; of a tensor on a GPU a sync."""
    return not bool(restarts(position_ids).any())


def restarts(position_ids: Tensor) -> Tensor:
    """[B, T - 1] bool: the tokens after a row's first at which a document begins."""
    return position_ids.diff(dim=1) != 1


def packed(position_ids: Tensor) -> Layout | None:
    """position_ids [B, T] -> the layout of its documents, or None where every row is one document."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = restarts(position_ids)
    if bool(starts[:, 1:].any()):
        return Layout(None, starts.cumsum(1) - 1, *split_documents(starts))
    return None


def split_documents(starts: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Groups the documents that begin at `starts` [B, T] by length, so that padding at most doubles the work.

    A piece is flat indices [n, L] into [B·T] of n documents; past its end a document repeats its last token. The second
    says of every token [B, T] where it stands in all pieces, one after the other.
    """
    T = starts.shape[1]
    begin = starts.flatten().nonzero()[:, 0].cpu()
    length = torch.diff(begin, append=torch.tensor([starts.numel()]))
    bucket = (length.clamp(min=64) - 1).double().log2().floor().long()
    assert int(length.max()) <= T  # every row starts a document
    pieces, source, done = [], torch.empty(starts.numel(), dtype=torch.int64), 0
    for b in bucket.unique():
        first, size = begin[bucket == b, None], length[bucket == b, None]
        offset = torch.arange(int(size.max()))
        index = first + torch.minimum(offset, size - 1)
        inside = offset < size
        source[index[inside]] = done + inside.flatten().nonzero()[:, 0]
        done += index.numel()
        pieces.append(index.to(starts.device))
    return tuple(pieces), source.view_as(starts).to(starts.device)


def gather_documents(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, T, D] at flat token indices [n, L] -> [n, H, L, D]."""
    return x.transpose(1, 2).flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


def join_documents(parts: Sequence[Tensor], source: Tensor) -> Tensor:
    """Pieces [n, H, L, ...] back as [B, H, T, ...], by `Layout.source`."""
    rows = torch.cat([x.transpose(1, 2).flatten(0, 1) for x in parts])
    return rows.index_select(0, source.flatten()).unflatten(0, source.shape).transpose(1, 2)
