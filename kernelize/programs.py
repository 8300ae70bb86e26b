"""A kernelized model as an ExecuTorch program: the functions of graphs.py as methods.

XNNPACK has the products with weights, ExecuTorch's own kernels the rest: that is small, and each piece more that is
lowered takes a second. Shapes are fixed, so that all memory is planned: one row, a step of one token, a chunk of a
whole block. Weights are in the program once, since XNNPACK finds them by their content; a tied embedding is there
twice, as a table and as a product.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from .graphs import StateLayout, Tokens
from .leaving import Leave

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of ExecuTorch, about itself
    from executorch.backends.xnnpack.partition.config.gemm_configs import AddmmConfig, LinearConfig, MMConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchProgramManager, to_edge_transform_and_lower

aten: Any = torch.ops.aten


# --- what ExecuTorch's kernels lack -------------------------------------------------------------------------


def sort(x: Tensor, *, stable: bool | None = True, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """A stable sort along the last axis by topk, which is none: a second one puts equals in their order."""
    if dim not in (-1, x.ndim - 1):
        raise NotImplementedError(f"sort along axis {dim} of {x.ndim}")
    length = x.shape[-1]
    values, at = torch.topk(x, length, largest=descending)
    another = (values[..., 1:] != values[..., :-1]).to(torch.int64).cumsum(-1)
    run = torch.nn.functional.pad(another, (1, 0))  # which of the runs of equals
    return values, torch.topk(run * length + at, length, largest=False).values % length


def argsort(x: Tensor, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Tensor:
    return sort(x, stable=stable, dim=dim, descending=descending)[1]


def plain_argsort(x: Tensor, dim: int = -1, descending: bool = False) -> Tensor:
    return argsort(x, dim=dim, descending=descending)


def zeros(x: Tensor, **_: Any) -> Tensor:
    """For memory that is filled later."""
    return torch.zeros_like(x)


REPLACED = {
    aten.sort.stable: sort,
    aten.argsort.stable: argsort,
    aten.argsort.default: plain_argsort,
    aten.empty_like.default: zeros,
}


# --- the program --------------------------------------------------------------------------------------------


def trace_methods(model: Any, layout: StateLayout, most: int) -> dict[str, ExportedProgram]:
    """The methods `step`, `chunk` (of `most` tokens) and `leave`. Raises what torch raises where it cannot trace."""
    state, tokens = layout.empty(1), Tokens(model, layout)
    count = torch.ones(1, dtype=torch.int64)

    def read(length: int) -> ExportedProgram:
        ids = torch.zeros(1, length, dtype=torch.int64)
        return torch.export.export(tokens, (), {"ids": ids, "count": count, "flat": state}, strict=False)

    with torch.no_grad():
        leave = torch.export.export(Leave(model, layout), (), {"flat": state}, strict=False)
        return {"step": read(1), "chunk": read(most), "leave": leave.run_decompositions(REPLACED)}


def interface(method: ExportedProgram, layout: StateLayout) -> dict[str, list[str]]:
    """Names of a method's inputs and outputs, in its order."""
    given = [name for name in method.call_spec.in_spec.child(1).context if name != "flat"]
    results = method.call_spec.out_spec.context
    return {
        "inputs": [*given, *layout.shapes],
        "outputs": [name if name == "logits" else f"new.{name}" for name in results],
    }


def lower(methods: dict[str, ExportedProgram]) -> ExecutorchProgramManager:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and ExecuTorch, about themselves
        products = XnnpackPartitioner(configs=[LinearConfig, AddmmConfig, MMConfig])
        settings = EdgeCompileConfig(_check_ir_validity=False)
        return to_edge_transform_and_lower(methods, partitioner=[products], compile_config=settings).to_executorch()


def write(program: ExecutorchProgramManager, path: Path) -> None:
    with path.open("wb") as file:
        program.write_to_file(file)
