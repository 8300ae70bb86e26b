"""KernelAttention: the parameters of one converted layer, and the attention function that Transformers calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers import initialization as init

from .cache import KernelState
from .feature_maps import FEATURE_MAPS
from .layout import Layout, gather_documents, scatter_documents
from .ops import attend
from .spec import KernelSpec
from .state import AttentionOutput, Kernel, State

ATTENTION = "kernelize"  # its name in AttentionInterface
INITIAL_LOG_GATE = -4.0  # an untrained memory must not hurt
INITIAL_HALF_LIFE = 512.0  # tokens

Probe = Callable[["KernelAttention", Tensor, Tensor, Tensor, float, "Layout | None", AttentionOutput], Tensor]


class KernelAttention(nn.Module):
    """What one layer adds to its attention: two feature maps, a gate a query head, a decay a key head."""

    def __init__(self, spec: KernelSpec, heads: int, kv_heads: int, head_dim: int):
        super().__init__()
        self.spec, self.heads, self.kv_heads = spec, heads, kv_heads
        self.window_dropout = 0.0  # probability, in training, that a forward sees but one block as its window
        self.probe: Probe | None = None  # training looks in here; it may replace the output
        if spec.has_memory:
            kind = FEATURE_MAPS[spec.feature_map]
            self.map_q = kind(heads, head_dim, spec.feature_dim)
            self.map_k = kind(kv_heads, head_dim, spec.feature_dim)
            self.log_gate = nn.Parameter(torch.empty(heads))
            if spec.decay == "fixed":
                self.log_rate = nn.Parameter(torch.empty(kv_heads))  # log of −log decay

    def reset(self) -> None:
        if self.spec.has_memory:
            init.constant_(self.log_gate, INITIAL_LOG_GATE)
            if self.spec.decay == "fixed":
                init.constant_(self.log_rate, log_rate(INITIAL_HALF_LIFE))

    def kernel(self, scaling: float, softcap: float | None = None, sink_logits: Tensor | None = None) -> Kernel:
        """The layer's arithmetic for these head properties."""
        spec = self.effective_spec()
        if not spec.has_memory:
            return Kernel(spec, scaling, None, None, None, None, softcap, sink_logits)
        decay = -self.log_rate.exp() if spec.decay == "fixed" else None
        return Kernel(spec, scaling, self.map_q, self.map_k, self.log_gate, decay, softcap, sink_logits)

    def effective_spec(self) -> KernelSpec:
        if not (self.training and self.window_dropout):
            return self.spec
        dropped = float(torch.rand(())) < self.window_dropout
        return self.spec.replace(window=1) if dropped else self.spec

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel: Kernel,
        layout: Layout | None,
        cache: KernelState | None,
    ) -> Tensor:
        """query [B, H, T, D], key and value [B, Hk, T, D] -> [B, H, T, D]; the state goes on in `cache`."""
        if layout is not None and layout.documents is not None:
            out = self.attend_documents(query, key, value, kernel, layout)
        else:
            valid = None if layout is None else layout.valid
            before = None if cache is None else cache.state
            out, state = attend(query, key, value, kernel, before, valid)
            if cache is not None:
                cache.advance(state, query.shape[2], self.replay(query, key, value, kernel, cache, valid))
        if self.probe is not None:
            return self.probe(self, query, key, value, kernel.scaling, layout, out)
        return out.y

    def replay(
        self, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, cache: KernelState, valid: Tensor | None
    ) -> Callable[[int], State] | None:
        """Where `cache` may be asked to take this call back: how to get the state after its first n tokens alone."""
        if not cache.record_past:
            return None
        before = cache.state

        def first(n: int) -> State:
            parts = (x[:, :, :n] for x in (query, key, value))
            return attend(*parts, kernel, before, None if valid is None else valid[:, :n])[1]

        return first

    def attend_documents(
        self, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, layout: Layout
    ) -> AttentionOutput:
        """Packed rows: every document from an empty state. Documents of like length are rows of one call."""
        parts: list[Tensor] | None = None
        for index, inside in layout.pieces:
            q, k, v = (gather_documents(x, index) for x in (query, key, value))
            out, _ = attend(q, k, v, kernel)
            columns = [x if x.ndim == 4 else x[..., None] for x in out]
            if parts is None:
                B, H, T, _ = query.shape
                parts = [x.new_zeros(B, T, H, x.shape[-1]) for x in columns]
            parts = [scatter_documents(p, x, index, inside) for p, x in zip(parts, columns, strict=True)]
        assert parts is not None
        y, exact, exact_lse, memory, memory_lse = (p.transpose(1, 2) for p in parts)
        return AttentionOutput(y, exact, exact_lse[..., 0], memory, memory_lse[..., 0])


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
    attention: KernelAttention = module.kernelize  # type: ignore[assignment]
    kernel = attention.kernel(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    y = attention(query, key, value, kernel, kernelize_layout, kernelize_cache)
    return y.transpose(1, 2), None


AttentionInterface.register(ATTENTION, attention_function)
