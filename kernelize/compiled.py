"""torch.compile around the attention of each decoder layer: norms, rotation, activation and residuals, fused.

Kernelized attention itself keeps its own kernels; the layer's graph breaks there. All layers share their compiled code
where nothing tells them apart, as in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._functorch.config

from .runtime.modeling import KernelizedModelMixin, family_of, kernelized_layers

# gradients of q, k and v come laid out as these are: torch 2.11 would else copy them into another layout
TANGENTS = {"guess_tangent_strides_as_outputs": True}
# a graph ends at the attention itself, not at every function that leads there: else the norm's result is written in
# float32, read, cast and written again. Before 2.11 it was not tried
NESTED = {"nested_graph_breaks": True} if torch.__version__ >= "2.11" else {}
TUNED = {"coordinate_descent_tuning": True, "combo_kernels": True, "benchmark_combo_kernel": True}


@contextmanager
def compiled_layers(model: Any, backend: str = "inductor", *, tuned: bool = False) -> Iterator[None]:
    """Within the context the decoder layers of `model` are compiled, each shape by itself.

    With `tuned` inductor tries launches of what it writes, writes products with one row itself, for cuBLAS reads the
    weights of such a product at half the speed of the memory, and those of one input (q, k and v) as one launch where
    that is faster.
    """
    layers = list(model.get_submodule(family_of(model.config.model_type).layers))
    kernelized: Any = model if isinstance(model, KernelizedModelMixin) else None
    attentions = list(kernelized_layers(kernelized).values()) if kernelized else []
    options: Any = TUNED if tuned else None
    changed = [(x, "forward") for x in (*layers, *(y.kernelize for y in attentions))]
    changed += [(x, "state_in") for x in attentions]
    before = [vars(module).get(name) for module, name in changed]  # hooks may stand there
    try:
        for layer in layers:
            layer.forward = torch.compile(layer.forward, dynamic=False, backend=backend, options=options)
        for attention in attentions:
            attention.kernelize.forward = torch.compiler.disable(attention.kernelize.forward)
            attention.state_in = torch.compiler.disable(attention.state_in)  # else each layer's number is a variant
        # softmax attention looks at its layer's number where it has a cache: there each layer is a variant
        limits = {"recompile_limit": 8 * len(layers), "accumulated_recompile_limit": 64 * len(layers)}
        with torch._dynamo.config.patch(limits | NESTED), torch._functorch.config.patch(TANGENTS):
            yield
    finally:
        for (module, name), value in zip(changed, before, strict=True):
            if value is None:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = value
