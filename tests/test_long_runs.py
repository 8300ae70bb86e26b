"""One layer reads on and on: its state stays finite, bounded, of one size, and as exact as at the start."""

from __future__ import annotations

import itertools

import pytest
import torch
from contract import kernel_of, layer
from tolerances import assert_same, error
from torch import Tensor

from kernelize.runtime.ops import attend
from kernelize.runtime.spec import DECAYS, RULES, KernelSpec, SpecError
from kernelize.runtime.state import State, empty_state, wide

SIZES = (1, 1, 4)  # query heads, KV heads, head size
PIECE, STEPS = 8192, 8  # tokens read at once, and one at a time after each piece
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


def run(spec: KernelSpec, dtype: torch.dtype, length: int) -> tuple[State, Tensor, float, list[float]]:
    """(the last state, the last outputs [1, 1, STEPS, D], largest output, largest memory after each piece)"""
    attention = layer(spec, dtype, SIZES)
    kernel = kernel_of(attention)
    state: State | None = None
    largest, grown, tail = 0.0, list[float](), torch.zeros(0)
    for number in range(length // PIECE):
        q, k, v = (x.to(dtype) for x in tokens(PIECE, number))
        for part in (PIECE - STEPS, *[1] * STEPS):
            out, state = attend(q[:, :, :part], k[:, :, :part], v[:, :, :part], kernel, state)
            q, k, v = q[:, :, part:], k[:, :, part:], v[:, :, part:]
            largest = max(largest, float(out.y.abs().max()))
            tail = torch.cat((tail, out.y), 2)[:, :, -STEPS:] if tail.numel() else out.y[:, :, -STEPS:]
        assert state is not None
        assert all(x.isfinite().all() for x in (*state, out.y) if x.is_floating_point()), f"after {number + 1} pieces"
        grown.append(float(state.memory[..., :-1].abs().max()))
    assert state is not None
    return state, tail, largest, grown


def assert_stays(spec: KernelSpec, length: int) -> None:
    exact = run(spec, torch.float64, length)[1]
    for dtype in (torch.float32, torch.bfloat16):
        state, tail, largest, grown = run(spec, dtype, length)
        fresh = empty_state(spec, *(torch.zeros(1, 1, 1, SIZES[2], dtype=dtype),) * 2)
        assert [x.shape for x in state] == [x.shape for x in fresh]
        assert state.memory.dtype == wide(dtype)
        assert int(state.seen) == length // PIECE * PIECE
        assert largest <= LARGEST_VALUE * (1.01 if not spec.is_delta else 2), (
            "an average of values is not larger than they are"
        )
        if not spec.is_delta:
            assert float((state.memory[..., :-1].abs() / state.memory[..., -1:]).max()) <= LARGEST_VALUE * 1.01
        if spec.is_delta or spec.decay != "none":
            assert grown[-1] <= 2 * max(grown[: max(1, len(grown) // 2)]), "it forgets as much as it takes in"
        print(f"{spec.rule} {spec.decay} {dtype}: largest {largest:.3g}, memory {grown[0]:.3g} → {grown[-1]:.3g}, "
              f"{error(tail, exact):.1e} from float64")  # fmt: skip
        assert_same(tail, exact, "the last outputs")


@pytest.mark.parametrize("spec", specs(), ids=lambda spec: f"{spec.rule}-{spec.decay}")
@torch.no_grad()
def test_a_state_stays_finite_and_bounded_over_thousands_of_tokens(spec):
    assert_stays(spec, 2 * PIECE)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("spec", specs(), ids=lambda spec: f"{spec.rule}-{spec.decay}")
@torch.no_grad()
def test_a_state_stays_finite_and_bounded_over_two_million_tokens(spec):
    assert_stays(spec.replace(block=64, window=64), 2_000_000 + PIECE)
