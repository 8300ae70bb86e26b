"""torch.compile around the attention of each decoder layer: norms, rotation, activation and residuals, fused.

Kernelized attention itself keeps its own kernels; the layer's graph breaks there. All layers share their compiled code
where nothing tells them apart, as in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .runtime.modeling import KernelizedModelMixin, family_of, kernelized_layers


@contextmanager
def compiled_layers(model: Any, backend: str = "inductor") -> Iterator[None]:
    """Within the context the decoder layers of `model` are compiled, each shape by itself."""
    layers = list(model.get_submodule(family_of(model.config.model_type).layers))
    kernelized: Any = model if isinstance(model, KernelizedModelMixin) else None
    own = [x.kernelize for x in kernelized_layers(kernelized).values()] if kernelized else []
    try:
        for layer in layers:
            layer.forward = torch.compile(layer.forward, dynamic=False, backend=backend)
        for attention in own:
            attention.forward = torch.compiler.disable(attention.forward)
        # with a cache, attention classes look at their layer's number, so each layer is a variant
        with torch._dynamo.config.patch(recompile_limit=8 * len(layers), accumulated_recompile_limit=64 * len(layers)):
            yield
    finally:
        for module in (*layers, *own):
            vars(module).pop("forward", None)
