"""How far apart two numbers that mean the same may be: the one table, never loosened for a single test.

Errors are relative to the largest entry of the expected tensor, and absolute below 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 4e-2}
GRADIENT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 1e-2}
UNTRAINED_TOLERANCE = {torch.float32: 1e-2}  # an untrained score takes exp(−8) from its slots, a sink exp(−12)
MEMORY_FACTOR = 3.0  # bytes that an operation may add, in units of its q, k, v and y


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry of `expected`; NaN where either is not finite."""
    if not expected.numel():
        return 0.0
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1))


def assert_same(got: Tensor, expected: Tensor, what: str, table: dict[torch.dtype, float] = TOLERANCE) -> None:
    """AssertionError when they differ by more than `table` allows for the coarser of their dtypes."""
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)} against {tuple(expected.shape)}"
    allowed = max(table[got.dtype], table[expected.dtype])
    found = error(got, expected)
    assert found <= allowed, f"{what}: {found:.2e} apart, {allowed:.0e} allowed"
