"""The weights of a model as plain tensors, whether they are whole or quantised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def plain(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The (name, tensor) pairs; for a quantised tensor those it is made of: integers, scales, zero points."""
    for name, tensor in named:
        if not is_traceable_wrapper_subclass(tensor):
            yield name, tensor
            continue
        for part in tensor.__tensor_flatten__()[0]:
            yield f"{name}.{part}", getattr(tensor, part)
