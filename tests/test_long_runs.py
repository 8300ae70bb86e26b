"""One layer reads on and on: its state stays finite, bounded, of one size, and as exact as at the start."""

from __future__ import annotations

import itertools

import pytest
import torch
from contract import kernel_of, layer
from tolerances import assert_same
from torch import Tensor

from kernelize.runtime.ops import attend
from kernelize.runtime.spec import DECAYS, RULES, KernelSpec, SpecError
from kernelize.runtime.state import State, empty_state

SIZES = (1, 1, 4)  # query heads, KV heads, head size
STEPS = 8  # tokens that are read one at a time after each piece
LARGEST_VALUE = 8.0  # of the values that are read


def specs() -> list[KernelSpec]:
    found = []
    for rule, decay in itertools.product(RULES, DECAYS):
        try:
            found.append(
                KernelSpec(feature_dim=8, window=4, block=4, sinks=1, slots=4, policy="value", rule=rule, decay=decay)
            )
        except SpecError:
            continue
    return found


def tokens(length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, 1, T, D] that bfloat16 holds, now and then far out."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, 1, length, SIZES[2], generator=generator)
    k[:, :, ::997] *= 30
    q[:, :, ::499] *= 30
    return tuple(x.bfloat16() for x in (q, k, v.clamp(-LARGEST_VALUE, LARGEST_VALUE)))  # type: ignore[return-value]


def run(spec: KernelSpec, dtype: torch.dtype, pieces: int, piece: int) -> tuple[State, Tensor, float, list[float]]:
    """(the last state, the last outputs [1, 1, STEPS, D], largest output, largest memory after each piece)"""
    attention = layer(spec, dtype, SIZES)
    kernel = kernel_of(attention)
    state: State | None = None
    largest, grown, tail = 0.0, list[float](), torch.zeros(0)
    for number in range(pieces):
        q, k, v = (x.to(dtype) for x in tokens(piece, number))
        for part in (piece - STEPS, *[1] * STEPS):
            out, state = attend(q[:, :, :part], k[:, :, :part], v[:, :, :part], kernel, state)
            q, k, v = q[:, :, part:], k[:, :, part:], v[:, :, part:]
            largest = max(largest, float(out.y.abs().max()))
            tail = torch.cat((tail, out.y), 2)[:, :, -STEPS:] if tail.numel() else out.y[:, :, -STEPS:]
        assert state is not None
        assert all(x.isfinite().all() for x in (*state, out.y) if x.is_floating_point()), f"after {number + 1} pieces"
        grown.append(float(state.memory[..., :-1].abs().max()))
    assert state is not None
    return state, tail, largest, grown


def assert_stays(spec: KernelSpec, dtype: torch.dtype, pieces: int, piece: int) -> Tensor:
    """Returns the last outputs."""
    state, tail, largest, grown = run(spec, dtype, pieces, piece)
    print(f"{spec.rule} {spec.decay} {dtype}: {int(state.seen):,} tokens, largest output {largest:.3g}, "
          f"memory {grown[0]:.3g} → {grown[-1]:.3g}")  # fmt: skip
    fresh = empty_state(spec, *(torch.zeros(1, 1, 1, SIZES[2], dtype=dtype),) * 2)
    assert [(x.shape, x.dtype) for x in state] == [(x.shape, x.dtype) for x in fresh]
    assert int(state.seen) == pieces * piece
    assert largest <= LARGEST_VALUE * (2 if spec.is_delta else 1.01), "an average is not larger than what it is of"
    if not spec.is_delta:
        assert float((state.memory[..., :-1].abs() / state.memory[..., -1:]).max()) <= LARGEST_VALUE * 1.01
    if spec.is_delta or spec.decay != "none":
        assert grown[-1] <= 2 * max(grown[: max(1, len(grown) // 2)]), "it forgets as much as it takes in"
    return tail


SPECS = pytest.mark.parametrize("spec", specs(), ids=lambda spec: f"{spec.rule}-{spec.decay}")


@SPECS
@torch.no_grad()
def test_a_state_stays_finite_bounded_and_exact_over_thousands_of_tokens(spec):
    exact = run(spec, torch.float64, 3, 4096)[1]
    for dtype in (torch.float32, torch.bfloat16):
        assert_same(assert_stays(spec, dtype, 3, 4096), exact, f"{dtype}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@SPECS
@torch.no_grad()
def test_a_state_stays_finite_and_bounded_over_two_million_tokens(spec, dtype):
    assert_stays(spec.replace(block=64, window=64), dtype, 62, 32_768)
