"""demo: the whole job on a small real checkpoint."""

from __future__ import annotations


def demo() -> None:
    """Plan, convert, fine-tune, evaluate, check and generate with a small real model, in a few minutes on a CPU."""
