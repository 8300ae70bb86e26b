"""KernelAttention: the parameters of one converted layer, and the attention function that Transformers calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers import initialization as init

from .cache import KernelState
from .feature_maps import FEATURE_MAPS, orthogonal_gaussian
from .layout import Layout, gather_documents, join_documents
from .ops import attend, autocast
from .spec import KernelSpec, SpecError
from .state import AttentionOutput, Kernel, Rotation, Seen, State

ATTENTION = "kernelize"  # its name in AttentionInterface
INITIAL_LOG_GATE = -4.0  # an untrained memory must not hurt
INITIAL_HALF_LIFE = 512.0  # tokens
INITIAL_SCORE = 8.0  # of a token that received mass 1: an untrained score must not dampen the slots
FORECAST_WIDTH = 64  # hidden units a KV head
INITIAL_SINK_LOGIT = -12.0  # an untrained sink must not be seen


class Probe(Protocol):
    """Looks into a layer, and gives what the layer passes on instead of its own output."""

    wants_output: bool  # False: the layer need not compute its own, and gives None

    def __call__(
        self,
        layer: KernelAttention,
        seen: Seen,
        output: Any,  # AttentionOutput, or None
    ) -> Tensor: ...  # [B, H, T, D]


Instead = Callable[[Tensor, Tensor, Tensor, Kernel], Tensor]  # q [B, H, T, D], k and v [B, Hk, T, D] -> like q


@dataclass(frozen=True)
class Rotary:
    """Where a layer's rotary positions stand: a buffer of the model's own module, which loading may fill later."""

    module: nn.Module
    buffer: str = "inv_freq"
    interleaved: bool = False

    def rotation(self) -> Rotation:
        return Rotation(self.module.get_buffer(self.buffer), self.interleaved)


class KernelAttention(nn.Module):
    """What one layer adds to its attention: two feature maps, a gate a query head, a decay a key head.

    And what its spec asks for beyond that: read-outs of key and value for a gated decay, for the delta rule's beta and
    for the learned score; the forecast's network; sink logits. Untrained, a gated decay is the fixed one, a learned
    score ranks as `attention` does, and a forecast as `recall`.
    """

    def __init__(self, spec: KernelSpec, heads: int, kv_heads: int, head_dim: int):
        super().__init__()
        if spec.head_slots and len(spec.head_slots) != kv_heads:
            raise SpecError(
                f"head_slots={list(spec.head_slots)} has {len(spec.head_slots)} numbers for {kv_heads} KV heads"
            )
        self.spec, self.heads, self.kv_heads = spec, heads, kv_heads
        self.window_dropout = 0.0  # probability, in training, that a forward sees but one block as its window
        self.probe: Probe | None = None  # training looks in here; it may replace the output
        self.watch: Callable[..., None] | None = None  # see Kernel.watch
        self.rotary: Rotary | None = None  # the model's positions, if they are rotary
        self.instead: Instead | None = None  # an audit computes whole rows with this, not with the layer's own
        if spec.has_memory:
            kind = FEATURE_MAPS[spec.feature_map]
            self.map_q = kind(heads, head_dim, spec.feature_dim)
            self.map_k = kind(kv_heads, head_dim, spec.feature_dim)
            self.log_gate = nn.Parameter(torch.empty(heads))
            if spec.decay != "none":
                self.log_rate = nn.Parameter(torch.empty(kv_heads))  # log of −log decay
            if spec.decay == "gated":
                self.decay_weight = nn.Parameter(torch.empty(kv_heads, 2 * head_dim))
            if spec.is_delta:
                self.beta_weight = nn.Parameter(torch.empty(kv_heads, head_dim))
                self.beta_bias = nn.Parameter(torch.empty(kv_heads))
        if spec.learned_share is not None:
            width = len(spec.statistics("learned")) + 2 * head_dim
            self.score_weight = nn.Parameter(torch.empty(kv_heads, width))
            self.score_bias = nn.Parameter(torch.empty(kv_heads))
        if spec.scores_by("forecast"):
            width = len(spec.statistics("forecast")) + 1 + 2 * head_dim
            self.forecast_skip = nn.Parameter(torch.empty(kv_heads, width))
            self.forecast_in = nn.Parameter(torch.empty(kv_heads, width, FORECAST_WIDTH))
            self.forecast_out = nn.Parameter(torch.empty(kv_heads, FORECAST_WIDTH))
        if spec.sink_logits:
            self.sink_logit = nn.Parameter(torch.empty(heads))

    def reset(self) -> None:
        spec = self.spec
        if spec.has_memory:
            init.constant_(self.log_gate, INITIAL_LOG_GATE)
            if spec.decay != "none":
                init.constant_(self.log_rate, log_rate(INITIAL_HALF_LIFE))
            if spec.decay == "gated":
                init.zeros_(self.decay_weight)
            if spec.is_delta:
                init.zeros_(self.beta_weight)
                init.zeros_(self.beta_bias)
        if spec.learned_share is not None:
            ranks_as_attention = torch.zeros(self.score_weight.shape[1])
            ranks_as_attention[spec.statistics("learned").index("attention")] = 1.0
            init.copy_(self.score_weight, ranks_as_attention.expand_as(self.score_weight))
            init.constant_(self.score_bias, INITIAL_SCORE)
        if spec.scores_by("forecast"):
            ranks_as = torch.zeros(self.forecast_skip.shape[1])
            ranks_as[spec.statistics("forecast").index("recall" if spec.has_recall else "attention")] = 1.0
            init.copy_(self.forecast_skip, ranks_as.expand_as(self.forecast_skip))
            _, inputs, width = self.forecast_in.shape
            directions = orthogonal_gaussian(inputs, width, seed=0) / inputs**0.5
            init.copy_(self.forecast_in, directions.expand_as(self.forecast_in))
            init.zeros_(self.forecast_out)
        if spec.sink_logits:
            init.constant_(self.sink_logit, INITIAL_SINK_LOGIT)

    def kernel(self, scaling: float, softcap: float | None = None, sink_logits: Tensor | None = None) -> Kernel:
        """The layer's arithmetic for these head properties."""
        spec = self.effective_spec()
        if spec.sink_logits:
            mine = self.sink_logit
            sink_logits = mine if sink_logits is None else torch.logaddexp(mine, sink_logits.to(mine.dtype))
        kernel = Kernel(spec, scaling, None, None, None, None, softcap, sink_logits)
        if spec.reach and self.rotary is not None:
            kernel = kernel._replace(rotation=self.rotary.rotation())
        if spec.scores_by("forecast") and self.rotary is not None:
            kernel = kernel._replace(key_rotation=self.rotary.rotation())
        if spec.has_memory:
            kernel = kernel._replace(map_q=self.map_q, map_k=self.map_k)
        own: dict[str, Any] = {name: p for name, p in self._parameters.items() if name in Kernel._fields}
        return kernel._replace(**own, watch=self.watch)

    def kernel_for(self, seen: Seen) -> Kernel:
        """The layer's arithmetic under the scaling, soft cap and sinks of `seen`."""
        return self.kernel(seen.scaling, seen.softcap, seen.sink_logits)

    def effective_spec(self) -> KernelSpec:
        if not (self.training and self.window_dropout):
            return self.spec
        dropped = float(torch.rand(())) < self.window_dropout
        return self.spec.replace(window=1) if dropped else self.spec

    def forward(self, seen: Seen, cache: KernelState | None) -> Tensor:
        """What the layer makes of `seen`, [B, H, T, D]; the state goes on in `cache`."""
        if self.instead is not None:
            if cache is not None or seen.layout is not None:
                raise SpecError("what stands in for a layer reads whole rows: no cache, padding or packed documents")
            return self.instead(seen.query, seen.key, seen.value, self.kernel_for(seen))
        if self.probe is not None and not self.probe.wants_output:
            return self.probe(self, seen, None)
        query, key, value, *_, layout = seen
        kernel = self.kernel_for(seen)
        if cache is not None:
            kernel = kernel._replace(turned=cache.turned)
        if layout is not None and layout.documents is not None:
            out = self.attend_documents(query, key, value, kernel, layout)
        else:
            valid = None if layout is None else layout.valid
            before = None if cache is None else cache.state
            probed, in_place = self.probe is not None, cache is not None and cache.in_place
            out, state = attend(query, key, value, kernel, before, valid, probed, cache is not None, in_place)
            if cache is not None:
                cache.advance(state, query.shape[2], self.replay(query, key, value, kernel, cache, valid))
        if self.probe is not None:
            return self.probe(self, seen, out)
        return out.y

    def replay(
        self, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, cache: KernelState, valid: Tensor | None
    ) -> Callable[[int], State] | None:
        """Where `cache` may be asked to take this call back: how to get the state after its first n tokens alone."""
        if not cache.record_past:
            return None
        before = cache.state

        def first(n: int) -> State:
            kept = None if valid is None else valid[:, :n]
            return attend(query[:, :, :n], key[:, :, :n], value[:, :, :n], kernel, before, kept)[1]

        return first

    def attend_documents(
        self, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, layout: Layout
    ) -> AttentionOutput:
        """Packed rows: every document from an empty state. Documents of like length are rows of one call."""
        assert layout.source is not None
        probed, found = self.probe is not None, []
        for index in layout.pieces:
            q, k, v = (gather_documents(x, index) for x in (query, key, value))
            found.append(attend(q, k, v, kernel, branches=probed, keep=False)[0])
        if probed:
            return AttentionOutput(*(join_documents(parts, layout.source) for parts in zip(*found, strict=True)))
        y = join_documents([out.y for out in found], layout.source)
        return AttentionOutput(y, *[y.new_empty(0)] * 4)


def log_rate(half_life: float | Tensor) -> Any:
    """The parameter whose decay halves what it holds in `half_life` tokens."""
    rate = torch.log(torch.tensor(2.0)) / torch.as_tensor(half_life, dtype=torch.float32)
    return rate.log() if isinstance(half_life, Tensor) else float(rate.log())


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    kernelize_cache: KernelState | None = None,
    kernelize_layout: Layout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function registered with Transformers: q [B, H, T, D], k and v [B, Hk, T, D] -> ([B, T, H, D], None).

    Attention dropout is not applied: the student of a distillation is deterministic.
    """
    attention: Any = module._modules.get("kernelize")
    if attention is None:
        raise SpecError(
            f"attn_implementation={ATTENTION!r} is that of converted layers, and a {type(module).__name__} is none; "
            "converted ones need no name: load the model with 'eager' or 'sdpa'"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if kernelize_cache is None and attention.probe is None:  # here compiled code fuses it with what is before
        query, key, value = autocast(query, key, value)
    y = attention(Seen(query, key, value, scaling, softcap, s_aux, kernelize_layout), kernelize_cache)
    return y.transpose(1, 2), None


AttentionInterface.register(ATTENTION, attention_function)
