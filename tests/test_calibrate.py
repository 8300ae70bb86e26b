"""Calibration: what an untrained memory may do, on the very texts that it was fitted to."""

from __future__ import annotations

import torch
from tiny import tiny_llama

from kernelize.calibrate import CAUTION, gate_error
from kernelize.convert import convert
from kernelize.losses import softmax_attention
from kernelize.measure import observe
from kernelize.plan import ConversionPlan
from kernelize.runtime import ops
from kernelize.runtime.modeling import kernelized_layers
from kernelize.runtime.spec import KernelSpec

SPEC = KernelSpec(feature_map="codebook", feature_dim=16, window=8, sinks=2, slots=4, block=4)


@torch.no_grad()
def test_an_untrained_memory_helps_where_it_was_fitted_and_keeps_a_distance_from_what_would_be_best_there():
    texts = [torch.randint(1, 257, (1, 96), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    seen = observe(tiny_llama(), texts, (0, 1))
    student = convert(tiny_llama(), ConversionPlan.uniform(SPEC, 2), calibration=texts)
    gained = []
    for i, module in kernelized_layers(student).items():
        layer, errors = module.kernelize, []
        for shift in (0.0, -60.0, CAUTION):  # as it is, without the memory, with the gate that was fitted
            outputs = [(ops.attend(*s[:3], layer.kernel_for(s))[0], softmax_attention(s)[0]) for s in seen[i]]
            errors.append(sum(gate_error(out, torch.full((4,), shift), y) for out, y in outputs))  # [H]
        now, without, fitted = errors
        assert (now <= without * (1 + 1e-5)).all()
        assert (fitted <= now * (1 + 1e-3)).all()
        gained.append((without - now) / without)
    assert torch.stack(gained).max() > 0.01
