"""How fast random features come near exp(q·k): the error of single weights for growing sizes, which is like 1/√F.

    python benchmarks/rates.py

Root of the mean squared error of φ(q)·φ(k) / exp(q·k) over 64 × 64 pairs of random vectors of 8 channels with standard
deviation .25, and over 40 draws; `rff` on vectors of length one. The same is a law in tests/test_feature_maps.py.
"""

from __future__ import annotations

import torch

from kernelize.runtime.feature_maps import FEATURE_MAPS

NAMES, SIZES, SEEDS, TOKENS, CHANNELS = ("favor", "favor_hyperbolic", "rff"), (16, 64, 256, 1024), 40, 64, 8


@torch.no_grad()
def weight_error(name: str, size: int) -> float:
    generator = torch.Generator().manual_seed(0)
    q, k = (0.25 * torch.randn(1, 1, TOKENS, CHANNELS, generator=generator).double() for _ in range(2))
    if name == "rff":  # it leaves exp(−1), from the vectors' own lengths, out
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    target, pos, errors = (q @ k.mT - float(name == "rff")).exp(), torch.arange(TOKENS)[None, None], []
    for seed in range(SEEDS):
        phi = FEATURE_MAPS[name](1, CHANNELS, size)
        phi.reset()
        phi.reset(seed)
        phi = phi.double()
        errors.append((phi(q, pos) @ phi(k, pos).mT / target - 1).square().mean())
    return float(torch.stack(errors).mean().sqrt())


def main() -> None:
    print("| map | " + " | ".join(f"F = {size}" for size in SIZES) + " |")
    for name in NAMES:
        print(f"| `{name}` | " + " | ".join(f"{weight_error(name, size):.4f}" for size in SIZES) + " |")


if __name__ == "__main__":
    main()
