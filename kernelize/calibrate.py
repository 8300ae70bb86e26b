"""Closed-form initialisation of the memory from the teacher's own statistics: no training, two forwards a text.

Feature maps that need data (`FeatureMap.calibrate`) get a sample of the layer's queries and keys. The half-life of a
key head becomes the mean look-back of softmax outside the window (arXiv:2606.16429). The gate of a query head becomes
the one, of those around the gate that gives the memory softmax's mass and of one that is almost nothing, that brings
the layer nearest to softmax; and then e^`CAUTION` less, since a gate that is best on these texts is too much on others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .losses import LEAST_MASS, softmax_attention, softmax_weights
from .runtime import ops
from .runtime.attention import KernelAttention, Probe, log_rate
from .runtime.modeling import kernelized_layers
from .runtime.state import AttentionOutput, Seen

GATES = (-20.0, -8.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)  # from softmax's mass
CAUTION = 1.0  # log of what the fitted gate is divided by: nearest to the teacher on training text of other kinds
QUERIES = 512  # a calibration sequence's last queries, of which the look-back is taken
SAMPLES = 4096  # tokens of each layer that feature maps are fitted to
LONGEST = 65536.0  # tokens: a half-life above this is no decay at all


class SamplingProbe:
    """Stands in a layer's `kernelize.probe`: keeps every `stride`-th token, and passes the teacher's output on."""

    wants_output = False

    def __init__(self, stride: int) -> None:
        self.stride = stride
        self.query: list[Tensor] = []  # [N, H, D], scaled as feature maps get them
        self.key: list[Tensor] = []  # [N, Hk, D]

    def __call__(self, layer: KernelAttention, seen: Seen, output: None) -> Tensor:
        self.see(seen, layer.spec.sinks)
        return softmax_attention(seen)[0]

    def see(self, seen: Seen, sinks: int) -> None:
        """Keeps a sample of one text's queries and keys, without its sinks: they are unlike all other keys."""
        for kept, x in ((self.query, seen.query), (self.key, seen.key)):
            tokens = x[:, :, sinks:].transpose(1, 2).flatten(0, 1)  # [B, H, T, D] -> [N, H, D]
            kept.append(tokens[:: self.stride].float() * seen.scaling**0.5)

    def fit(self, layer: KernelAttention) -> None:
        """Fits the layer's maps to what was kept."""
        type(layer.map_q).calibrate(layer.map_q, layer.map_k, torch.cat(self.query), torch.cat(self.key))


class CalibrationProbe:
    """Stands in a layer's `kernelize.probe` for one forward a sequence; later layers see the teacher's states."""

    wants_output = False  # it comes after the decay, which is set here

    def __init__(self) -> None:
        self.gates: Tensor | None = None  # [gates, H], those that are tried
        self.errors: Tensor | None = None  # [gates, H], summed over the sequences
        self.look_back: Tensor | None = None  # [2, Hk], far mass times age, far mass

    def __call__(self, layer: KernelAttention, seen: Seen, output: None) -> Tensor:
        teacher, lse = softmax_attention(seen)
        if layer.spec.decay != "none":
            found = look_back(seen, layer.spec.ring)
            self.look_back = found if self.look_back is None else self.look_back + found
            age, mass = self.look_back
            half_life = (age / mass.clamp(min=1e-6)).clamp(layer.spec.block, LONGEST)
            layer.log_rate.copy_(log_rate(half_life))
        mine, _ = ops.attend(*seen[:3], layer.kernel_for(seen))
        if self.gates is None:
            natural = layer.log_gate + missing_mass(mine, lse)
            self.gates = natural + torch.tensor(GATES, device=natural.device)[:, None]
        errors = torch.stack([gate_error(mine, gate - layer.log_gate, teacher) for gate in self.gates])
        self.errors = errors if self.errors is None else self.errors + errors
        layer.log_gate.copy_(self.gates.gather(0, self.errors.argmin(0)[None])[0])
        return teacher


def look_back(seen: Seen, window: int) -> Tensor:
    """Of the last queries: Σ probability·age and Σ probability of keys older than `window`, [2, Hk]."""
    T, key = seen.query.shape[2], seen.key.float()
    last = seen.query[:, :, -QUERIES:].unflatten(1, (key.shape[1], -1)).float()
    age = torch.arange(T - last.shape[3], T, device=key.device)[:, None] - torch.arange(T, device=key.device)
    p = softmax_weights(last, key, seen, age >= 0)[0] * (age >= window)
    return torch.stack([(p * age).sum((0, 2, 3, 4)), p.sum((0, 2, 3, 4))])


def missing_mass(output: AttentionOutput, lse: Tensor) -> Tensor:
    """What each gate [H] lacks until the memory has the mass that softmax, with its `lse` [B, H, T], has out there.

    The mean over the tokens, weighted by that mass; 0 where the memory is empty.
    """
    share = -torch.expm1((output.exact_lse - lse).clamp(max=0))
    weight = share.where((share > LEAST_MASS) & output.memory_lse.isfinite(), 0)
    lacks = (lse + share.clamp(min=LEAST_MASS).log() - output.memory_lse).where(weight > 0, 0)
    return (lacks * weight).sum((0, 2)) / weight.sum((0, 2)).clamp(min=LEAST_MASS)


def gate_error(output: AttentionOutput, shift: Tensor, teacher: Tensor) -> Tensor:
    """Squared error a head [H] against the teacher's [B, H, T, D] if every gate were moved by `shift` [H]."""
    weight = torch.sigmoid(output.exact_lse - output.memory_lse - shift[:, None])[..., None]
    y = weight * output.exact + (1 - weight) * output.memory
    return (y - teacher).square().sum((0, 2, 3))


def reading_device(model: PreTrainedModel) -> torch.device:
    """Where a converted model computes: parameters that are read from files when needed are on the meta device."""
    return next(parameter.device for parameter in model.parameters() if not parameter.is_meta)


def readings(model: PreTrainedModel) -> int:
    """How often `calibrate` reads each text."""
    layers = [m.kernelize for m in kernelized_layers(model).values() if m.kernelize.spec.has_memory]
    return 1 + any(layer.map_q.calibrated for layer in layers)


@torch.no_grad()
def calibrate(model: PreTrainedModel, sequences: Sequence[Tensor], on_text: Callable[[], None] = lambda: None) -> None:
    """Sets maps, gates and half-lives of every converted layer with a memory from token ids [B, T] of ordinary text."""
    layers = [m.kernelize for m in kernelized_layers(model).values() if m.kernelize.spec.has_memory]
    stride = -(-sum(ids.numel() for ids in sequences) // SAMPLES)
    samples = [(layer, SamplingProbe(stride)) for layer in layers if layer.map_q.calibrated]
    if samples:
        run_probes(model, samples, sequences, on_text)
    for layer, probe in samples:
        probe.fit(layer)
    run_probes(model, [(layer, CalibrationProbe()) for layer in layers], sequences, on_text)
    for layer in layers:
        layer.log_gate.sub_(CAUTION)


def run_probes(
    model: PreTrainedModel,
    probes: Sequence[tuple[KernelAttention, Probe]],
    texts: Sequence[Tensor],
    on_text: Callable[[], None] = lambda: None,
) -> None:
    """One forward a text with the layers' probes in place; nobody asks for logits."""
    for layer, probe in probes:
        layer.probe = probe
    try:
        for ids in texts:
            with instead([(model.get_output_embeddings(), lambda hidden: hidden)]):
                model(input_ids=ids.to(reading_device(model)), use_cache=False, logits_to_keep=1)
            on_text()
    finally:
        for layer, _ in probes:
            layer.probe = None


@contextmanager
def instead(forwards: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Within the context the modules compute these, and not what they are made for."""
    before = [vars(module).get("forward") for module, _ in forwards]
    for module, forward in forwards:
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for (module, _), own in zip(forwards, before, strict=True):
            if own is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = own
