"""Closed-form initialisation of the memory from the teacher's own statistics: no training, one forward.

The half-life of a key head becomes the mean look-back of softmax outside the window (arXiv:2606.16429); the gate of a
query head becomes the one, on a grid that holds "almost nothing", that brings the layer nearest to softmax. So an
untrained memory never hurts on the calibration text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .losses import softmax_attention
from .runtime import ops
from .runtime.attention import KernelAttention, log_rate
from .runtime.layout import Layout
from .runtime.modeling import kernelized_layers
from .runtime.state import AttentionOutput

GATES = (-12.0, -8.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0)
QUERIES = 512  # a calibration sequence's last queries, of which the look-back is taken
LONGEST = 65536.0  # tokens: a half-life above this is no decay at all


class CalibrationProbe:
    """Stands in a layer's `kernelize.probe` for one forward a sequence; later layers see the teacher's states."""

    def __init__(self) -> None:
        self.errors: Tensor | None = None  # [gates, H], summed over the sequences
        self.look_back: Tensor | None = None  # [2, Hk], far mass times age, far mass

    def __call__(
        self,
        kernel: KernelAttention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        layout: Layout | None,
        output: AttentionOutput,
    ) -> Tensor:
        teacher, _ = softmax_attention(query, key, value, scaling)
        if kernel.spec.decay == "fixed":
            found = look_back(query, key, scaling, kernel.spec.ring)
            self.look_back = found if self.look_back is None else self.look_back + found
            age, mass = self.look_back
            half_life = (age / mass.clamp(min=1e-6)).clamp(kernel.spec.block, LONGEST)
            kernel.log_rate.copy_(log_rate(half_life))
            output, _ = ops.attend(query, key, value, kernel.kernel(scaling))
        errors = torch.stack([gate_error(output, gate - kernel.log_gate, teacher) for gate in GATES])
        self.errors = errors if self.errors is None else self.errors + errors
        best = torch.tensor(GATES, device=errors.device)[self.errors.argmin(0)]
        kernel.log_gate.copy_(best)
        return teacher


def look_back(query: Tensor, key: Tensor, scaling: float, window: int) -> Tensor:
    """Of the last queries [B, H, T, D]: Σ probability·age and Σ probability of keys older than `window`, [2, Hk]."""
    T, groups = query.shape[2], key.shape[1]
    last = query[:, :, -QUERIES:].unflatten(1, (groups, -1)).float()
    scores = torch.einsum("bkgqd,bktd->bkgqt", last, key.float()) * scaling
    age = torch.arange(T - last.shape[3], T, device=key.device)[:, None] - torch.arange(T, device=key.device)
    p = scores.masked_fill(age < 0, -torch.inf).softmax(-1) * (age >= window)
    return torch.stack([(p * age).sum((0, 2, 3, 4)), p.sum((0, 2, 3, 4))])


def gate_error(output: AttentionOutput, shift: Tensor, teacher: Tensor) -> Tensor:
    """Squared error a head [H] against the teacher's [B, H, T, D] if every gate were moved by `shift` [H]."""
    weight = torch.sigmoid(output.exact_lse - output.memory_lse - shift[:, None])[..., None]
    y = weight * output.exact + (1 - weight) * output.memory
    return (y - teacher).square().sum((0, 2, 3))


@torch.no_grad()
def calibrate(model: PreTrainedModel, sequences: Sequence[Tensor]) -> None:
    """Sets gates and half-lives of every converted layer with a memory from token ids [B, T] of ordinary text."""
    layers = [m.kernelize for m in kernelized_layers(model).values() if m.kernelize.spec.has_memory]
    for layer in layers:
        layer.probe = CalibrationProbe()
    try:
        for ids in sequences:
            model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for layer in layers:
            layer.probe = None
