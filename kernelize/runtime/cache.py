"""The state of a kernelized layer as a cache layer of Transformers: constant size, roll-back by snapshot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    StaticSlidingWindowLayer,
)

from .spec import SpecError
from .state import State, Turned

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
CACHE = "cache" if RELEASE >= (5, 24) else "past_key_values"  # the argument of Transformers that holds the cache
Replay = Callable[[int], State]
RECORDED = 2  # calls that a second crop may still take back: an assistant model takes back twice


@dataclass(frozen=True)
class Advance:
    """One call that a layer can take back: what was before, and the state after the first n of its tokens."""

    before: State | None
    length: Tensor | int
    tokens: int
    replay: Replay


class KernelState(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """One layer's `State`. Both mixins: a cache of such layers alone must know its length, and masks must skip them."""

    is_compileable = True
    is_sliding = False

    def __init__(self, static: bool = False):
        CacheLayerMixin.__init__(self)
        LinearAttentionCacheLayerMixin.__init__(self)
        self.static = static  # keep the tensors where they are (CUDA graphs), at the price of a copy
        self.state: State | None = None
        self.length: Tensor | int = 0  # tokens, padding included
        self.mask_peer: CacheLayerMixin | None = None  # a softmax layer of the same cache: masks are shared
        self.room = -1  # tokens that the layer in whose place it stands could hold; -1: any number
        self.turned = Turned()  # no part of the state: made of it, where it is missing
        self.record_past = False
        self.recorded: list[Advance] = []  # since the last `crop`

    def advance(self, state: State, tokens: int, replay: Replay | None = None) -> None:
        """Takes over the state after `tokens` more tokens; with `replay` this can be taken back by `crop`."""
        if replay is not None:
            self.recorded.append(Advance(self.state, self.length, tokens, replay))
        else:
            self.recorded.clear()  # what comes after calls that are not recorded cannot be taken back to them
        if self.in_place:
            self.put_back(state, self.length)
        else:
            self.state = state
            if self.static:
                self.hold()
        if not self.is_initialized:
            self.device: Any = state.keys.device
            self.batch_size = state.keys.shape[0]
            self.dtype: Any = state.keys.dtype
            self.length = torch.zeros((), dtype=torch.int64, device=self.device)
            self.is_initialized = True
        if self.in_place and isinstance(self.length, Tensor):
            self.length.add_(tokens)
        else:
            self.length = self.length + tokens
        self.has_previous_state[0] = True

    def hold(self) -> None:
        """From now on the state stays where it is: in tensors of its own, since those of a call may be shared."""
        self.static = True
        if self.state is not None and not torch.is_grad_enabled():
            self.state = self.state.map(lambda t: t.clone(memory_format=torch.contiguous_format))

    @property
    def in_place(self) -> bool:
        """Whether the next step may overwrite the state: nobody else holds it, and nobody differentiates it."""
        return self.state is not None and self.static and not self.record_past and not torch.is_grad_enabled()

    def put_back(self, state: State | None, length: Tensor | int) -> None:
        """Copies `state` and `length` into the tensors that this layer holds."""
        assert self.state is not None
        assert state is not None
        for old, new in zip(self.state, state, strict=True):
            if old is not new:
                old.copy_(new)
        if isinstance(self.length, Tensor) and self.length is not length:
            self.length.copy_(torch.as_tensor(length))

    def overwrite(self, other: KernelState) -> None:
        """As `put_back`, from a layer of another cache."""
        self.put_back(other.state, other.length)

    @property
    def nbytes(self) -> int:
        return 0 if self.state is None else self.state.nbytes

    def get_seq_length(self) -> int:
        return self.length  # type: ignore[return-value]  # a 0-d tensor, as in StaticLayer: an int would recompile

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.mask_peer is not None:
            return self.mask_peer.get_mask_sizes(query_length)
        return query_length, self.get_seq_length()

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a kernelized layer initialises its own state")

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("a kernelized layer's attention updates the state itself; nothing may call cache.update")

    update_conv_state = update_recurrent_state = update  # type: ignore[assignment]

    # --- rows ---------------------------------------------------------------------------------------------------

    def _map(self, f: Any) -> None:
        self.recorded.clear()
        if self.state is not None:
            self.state = self.state.map(f)
            self.batch_size = self.state.keys.shape[0]

    def reset(self) -> None:
        """Forgets everything; the next token is the first one."""
        self.state, self.length, self.is_initialized = None, 0, False
        self.recorded.clear()
        self.has_previous_state[0] = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices])

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda t: t.to(self.device, non_blocking=True))

    # --- roll-back ----------------------------------------------------------------------------------------------

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return self.record_past

    def activate_past_recording(self) -> None:
        """From now on every call can be taken back by `crop`; it keeps that call's q, k and v until then."""
        self.record_past = True

    def snapshot(self) -> tuple[State | None, Tensor | int]:
        """A copy to which `restore` can return; the roll-back that a recurrent state otherwise lacks."""
        length = self.length.clone() if isinstance(self.length, Tensor) else self.length
        return None if self.state is None else self.state.map(torch.clone), length

    def restore(self, snapshot: tuple[State | None, Tensor | int]) -> None:
        state, length = snapshot
        self.recorded.clear()
        length = length.clone() if isinstance(length, Tensor) else length
        self._put(None if state is None else state.map(torch.clone), length)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last −tokens_to_remove tokens: what of a recorded call is to stay is read again.

        As Transformers counts. RuntimeError for tokens that were not recorded, or dropped by an earlier crop.
        """
        left = -tokens_to_remove
        if not 0 <= left <= sum(call.tokens for call in self.recorded):
            raise RuntimeError(
                f"crop({tokens_to_remove}): a kernelized state can take back tokens read since the last crop and "
                "activate_past_recording(), called after the cache's first use; else take a snapshot() and restore() it"
            )
        while left:
            call = self.recorded.pop()
            kept = max(0, call.tokens - left)
            left -= call.tokens - kept
            self._put(call.replay(kept) if kept else call.before, call.length + kept)
            if kept:
                self.recorded.append(replace(call, tokens=kept))
        self.recorded = self.recorded[-RECORDED:]

    def _put(self, state: State | None, length: Tensor | int) -> None:
        if state is None:
            calls = list(self.recorded)
            self.reset()
            self.recorded = calls
            return
        self.state, self.length = state, length
        self.batch_size = state.keys.shape[0]


def kernel_layers(cache: Cache) -> list[KernelState]:
    return [layer for layer in cache.layers if isinstance(layer, KernelState)]


def state_bytes(cache: Cache) -> int:
    """Bytes that the cache holds now: kernelized states and, in a hybrid, the keys and values of the rest."""
    total, layers = 0, list[Any](cache.layers)
    for layer in layers:
        if isinstance(layer, KernelState):
            total += layer.nbytes
        elif layer.is_initialized:
            total += layer.keys.nbytes + layer.values.nbytes
    return total


def adopt_cache(cache: Cache, layers: tuple[int, ...]) -> None:
    """Puts `KernelState` at the indices `layers` of a cache, whoever made it; its layers there must be empty."""
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= max(layers):
        cache.layers.append(cache.layer_class_to_replicate())
    held: list[Any] = cache.layers
    missing = [i for i in layers if not isinstance(cache.layers[i], KernelState)]
    if not missing:
        return
    for i in missing:
        if held[i].is_initialized and held[i].get_seq_length() > 0:
            raise ValueError(f"layer {i} of the cache already holds keys and values of softmax attention")
        room = held[i].get_max_length()
        held[i] = KernelState(static=held[i].is_compileable)
        held[i].room = room
    sliding = cache.is_sliding
    softmax = [
        i for i, x in enumerate(cache.layers) if isinstance(x, CacheLayerMixin) and not isinstance(x, KernelState)
    ]
    peer = next((held[i] for i in softmax if not sliding[i]), None)
    for layer in kernel_layers(cache):
        layer.mask_peer = peer


def refuse_overflow(cache: Cache, tokens: int) -> None:
    """SpecError where so many more `tokens` do not fit into a static cache that cuts the windows of its layers short.

    Softmax over all tokens would have no place for them either; a window goes on, and sees less than it should.
    """
    room = kernel_layers(cache)[0].room
    cut = [x for x in cache.layers if isinstance(x, StaticSlidingWindowLayer) and x.max_cache_len == room]
    if cut and cut[0].get_seq_length() + tokens > room:
        raise SpecError(
            f"static cache: {cut[0].get_seq_length() + tokens} tokens do not fit into max_cache_len={room}, by which "
            "the layers with a sliding window would cut it short; make the cache longer"
        )


def refuse_second_draft(cache: Cache) -> None:
    """SpecError where a sliding window layer of an old release would read on without a crop: its mask is wrong then."""
    layers: list[Any] = cache.layers
    for layer in layers:
        sliding = isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized and layer.record_past
        if sliding and layer.keys.shape[-2] >= layer.sliding_window:
            raise SpecError(
                f"Transformers {transformers.__version__} cannot read on in a sliding window layer that records its "
                "past without a crop() between; allowed: 5.18 and later"
            )
