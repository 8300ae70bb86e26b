"""ONNX graphs as data: tracing, the precision of weights, what a runner may overwrite, files.

Weights are quantised in blocks along the input axis, symmetrically, as the operator MatMulNBits of ONNX Runtime reads
them (it quantises the activations of a block while it runs). The embedding is looked up in the same 8-bit rows that the
output layer multiplies with, where the two are tied; it needs no operator beyond the standard.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset23 as op
from onnxscript import optimizer, rewriter
from onnxscript.rewriter import onnx_fusions
from onnxscript.rewriter.rules import common as rules
from torch import Tensor, nn

OPSET = 23
CONTRIB = "com.microsoft"
BLOCK = 32  # weights of a row that share a scale
LEAST = 1024  # elements from which a tensor counts as a weight
INT8 = 4  # MatMulNBits: products of 8-bit activations, summed as integers


# Of torch's own rules those that find something here; its pairing of slices compares every node with every other.
RULES = (
    rules.add_0_rule, rules.sub_0_rule, rules.mul_by_1_rule, rules.div_by_1_rule, rules.cast_cast_rule,
    rules.no_op_cast_rule, rules.no_op_expand_rule, rules.no_op_transpose_rule, rules.transpose_transpose_rule,
    rules.reshape_reshape_rule, rules.squeeze_reshape_1d_rule, rules.unsqueeze_unsqueeze_rule,
    rules.collapse_slice_rule, rules.collapse_slice2_rule, rules.materialize_reshape_shape_rule,
    *rules.expand_before_binary_op_rules,
)  # fmt: skip


# --- tracing ------------------------------------------------------------------------------------------------


def stable_sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """aten.sort.stable: of equals TopK names the lower index first, whichever way it sorts."""
    shape: Any = op.Shape(self)
    at: Any = op.Constant(value_ints=[dim])
    size = op.Gather(shape, at)
    return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)


def trace(module: nn.Module, arguments: dict[str, Any], dims: dict[str, Any]) -> ir.Model:
    """The graph of `module` under these keyword arguments, of which `flat` is the state; it gives a dict.

    Raises what torch raises where the module cannot be traced.
    """
    with torch.no_grad():
        program = torch.export.export(module, (), arguments, dynamic_shapes=dims, strict=False)
    table: dict[Any, Any] = {torch.ops.aten.sort.stable: stable_sort}
    found = torch.onnx.export(
        program, dynamo=True, opset_version=OPSET, verbose=False, custom_translation_table=table, optimize=False
    )
    assert found is not None
    optimise(found.model)
    results: Any = program.call_spec.out_spec
    graph, given = found.model.graph, [name for name in arguments if name != "flat"]
    for value, name in zip(graph.inputs, [*given, *arguments["flat"]], strict=True):
        value.name = name
    for value, name in zip(graph.outputs, results.context, strict=True):
        value.name = name if name == "logits" else f"new.{name}"
    for node in graph:
        node.metadata_props.clear()  # where in the source it came from: megabytes
    return found.model


def optimise(model: ir.Model) -> None:
    """What torch.onnx would do with `optimize`, by fewer rules: in a fraction of its time."""
    passes = ir.passes.common
    passes.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants(model)
        rewriter.RewritePass(RULES)(model)
        passes.RemoveUnusedNodesPass()(model)
    for last in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(), passes.CommonSubexpressionEliminationPass(), passes.OutputFixPass(),
        passes.NameFixPass(),
    ):  # fmt: skip
        last(model)
    onnx_fusions.fuse(model)


# --- precision ----------------------------------------------------------------------------------------------


def lower(model: ir.Model, precision: str) -> None:
    """Stores the weights of `model` in this precision; activations and the state stay float32."""
    if precision == "fp16":
        widen_later(model.graph, as_halves)
    elif precision == "int8-float":
        widen_later(model.graph, as_bytes, only_matrices=True)
    elif precision in ("int8", "int4"):
        quantise(model, bits=8 if precision == "int8" else 4)


def widen_later(
    graph: ir.Graph, store: Callable[[ir.Graph, ir.Value, np.ndarray], list[ir.Node]], only_matrices: bool = False
) -> None:
    """Stores weights in fewer bytes, and widens them where they are used; runtimes do that once, when they load."""
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < LEAST:
            continue
        if only_matrices and len(tensor.shape) != 2:
            continue
        nodes = store(graph, value, tensor.numpy())
        graph.insert_before(graph[0], nodes)
        ir.convenience.replace_all_uses_with(value, nodes[-1].outputs[0])
        del graph.initializers[str(value.name)]


def as_halves(graph: ir.Graph, value: ir.Value, array: np.ndarray) -> list[ir.Node]:
    half = new_weight(graph, f"{value.name}.fp16", array.astype(np.float16))
    return [ir.node("Cast", [half], {"to": ir.DataType.FLOAT})]


def as_bytes(graph: ir.Graph, value: ir.Value, array: np.ndarray) -> list[ir.Node]:
    """Of a matrix: a scale a row, as torch stores it, so an output of a layer or an entry of a table."""
    scales = np.maximum(np.abs(array).max(-1, keepdims=True) / 127, np.finfo(np.float32).tiny).astype(np.float32)
    stored = new_weight(graph, f"{value.name}.int8", np.rint(array / scales).astype(np.int8))
    number = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT})
    return [number, ir.node("Mul", [number.outputs[0], new_weight(graph, f"{value.name}.scales", scales)])]


def new_weight(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    if name not in graph.initializers:
        value = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.tensor(array).dtype),
            const_value=ir.tensor(array, name=name),
        )  # fmt: skip
        graph.initializers.add(value)
    return graph.initializers[name]


def matrix(value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """(the initializer, whether it stands transposed) that a MatMul's right side is; None for anything else."""
    if value is None:
        return None
    node = value.producer()
    if node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        found = matrix(node.inputs[0])
        return None if found is None else (found[0], not found[1])
    tensor = value.const_value
    is_weight = tensor is not None and len(tensor.shape) == 2 and tensor.size >= LEAST and value.is_initializer()
    return (value, False) if is_weight else None


def quantise(model: ir.Model, bits: int) -> None:
    """Replaces products with weights by MatMulNBits, and look-ups in them by 8-bit rows."""
    graph = model.graph
    products = [(node, matrix(node.inputs[1])) for node in graph if node.op_type == "MatMul"]
    tables = [
        n for n in graph if n.op_type == "Gather" and matrix(n.inputs[0]) and n.attributes.get_int("axis", 0) == 0
    ]
    looked_up = {id(n.inputs[0]) for n in tables}
    for node, found in products:
        if found is not None:
            own = 8 if id(found[0]) in looked_up else bits
            replace_node(graph, node, product(graph, node, *found, own))
    for node in tables:
        replace_node(graph, node, *look_up(graph, node))
    ir.passes.common.RemoveUnusedNodesPass()(model)
    model.opset_imports[CONTRIB] = 1


def replace_node(graph: ir.Graph, old: ir.Node, *new: ir.Node) -> None:
    """Puts `new` where `old` is; the last of them gives its result."""
    result = old.outputs[0]
    new[-1].outputs[0].name, new[-1].outputs[0].shape, new[-1].outputs[0].type = result.name, result.shape, result.type
    graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(result, new[-1].outputs[0])
    if result in graph.outputs:
        graph.outputs[list(graph.outputs).index(result)] = new[-1].outputs[0]
    graph.remove(old, safe=True)


def product(graph: ir.Graph, node: ir.Node, weight: ir.Value, transposed: bool, bits: int) -> ir.Node:
    rows = numbers(weight) if transposed else numbers(weight).T  # [N, K]
    packed, scales = stored(graph, weight, rows, bits, BLOCK)
    N, K = rows.shape
    sizes = {"K": K, "N": N, "bits": bits, "block_size": BLOCK, "accuracy_level": INT8}
    return ir.node("MatMulNBits", [node.inputs[0], packed, scales], sizes, domain=CONTRIB)


def numbers(weight: ir.Value) -> np.ndarray:
    assert weight.const_value is not None
    return weight.const_value.numpy()


def look_up(graph: ir.Graph, node: ir.Node) -> tuple[ir.Node, ...]:
    """Rows of 8 bits, by operators of the standard: (byte − 128) · scale, block by block."""
    table, ids = node.inputs
    assert table is not None
    weight = numbers(table)
    packed, scales = stored(graph, table, weight, 8, BLOCK)
    rows = ir.node("Gather", [packed, ids], {"axis": 0})  # [B, T, K / block, block]
    scale = ir.node("Gather", [scales, ids], {"axis": 0})  # [B, T, K / block]
    number = ir.node("Cast", [rows.outputs[0]], {"to": ir.DataType.FLOAT})
    zero = new_weight(graph, "kernelize.zero_point", np.array(128, np.float32))
    centred = ir.node("Sub", [number.outputs[0], zero])
    axis = new_weight(graph, "kernelize.last_axis", np.array([-1], np.int64))
    wide = ir.node("Unsqueeze", [scale.outputs[0], axis])
    scaled = ir.node("Mul", [centred.outputs[0], wide.outputs[0]])
    shape = new_weight(graph, "kernelize.flat", np.array([0, 0, -1], np.int64))
    flat = ir.node("Reshape", [scaled.outputs[0], shape])
    ends = [new_weight(graph, f"kernelize.{at}", np.array([at], np.int64)) for at in (0, weight.shape[1], 2)]
    cut = ir.node("Slice", [flat.outputs[0], *ends])  # a last block may be padded
    return rows, scale, number, centred, wide, scaled, flat, cut


def stored(graph: ir.Graph, weight: ir.Value, rows: np.ndarray, bits: int, block: int) -> tuple[ir.Value, ir.Value]:
    """The initializers with the quantised rows [N, K] of `weight`: once, whoever uses them."""
    name = f"{weight.name}.int{bits}"
    if name in graph.initializers:
        return graph.initializers[name], graph.initializers[f"{name}.scales"]
    packed, scales = in_blocks(torch.from_numpy(np.array(rows)), bits, block)  # a copy: files are read-only
    return new_weight(graph, name, packed.numpy()), new_weight(graph, f"{name}.scales", scales.numpy())


def in_blocks(rows: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """rows [N, K] -> (bytes [N, K / block, block · bits / 8], scales [N, K / block]); low nibbles come first.

    The number of largest magnitude in a block becomes the end of the range, which has one step more below zero; of the
    scales around that the one with the least squared error is taken.
    """
    N, K = rows.shape
    blocks = nn.functional.pad(rows.float(), (0, -K % block)).view(N, -1, block)
    half = 1 << (bits - 1)
    extreme = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
    best, least = torch.ones_like(extreme), torch.full_like(extreme, torch.inf)
    for factor in (1.0,) if bits == 8 else (1.0, 0.95, 0.9, 0.85, 0.8, 0.75):
        scale = torch.where(extreme == 0, 1.0, extreme * factor / -half)
        error = ((blocks / scale).round_().clamp_(-half, half - 1).mul_(scale) - blocks).square_().sum(2, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    steps = ((blocks / best).round_().clamp_(-half, half - 1) + half).to(torch.uint8)
    packed = steps if bits == 8 else steps[..., ::2] | (steps[..., 1::2] << 4)
    return packed.contiguous(), best[..., 0].contiguous()


# --- what a runner may overwrite ----------------------------------------------------------------------------


def in_place(graph: ir.Graph) -> list[str]:
    """Tensors of the state whose new value may be written over the old: nobody reads the old one later.

    Every reader of the input is the scatter or sum that makes the output, or comes before it in any order.
    """
    inputs, found = {value.name: value for value in graph.inputs}, []
    for output in graph.outputs:
        source, node = inputs.get(str(output.name).removeprefix("new.")), output.producer()
        if source is None or node is None or node.op_type not in ("ScatterElements", "Add"):
            continue
        before = {id(node)} | ancestors(node, limit=64)
        if node.inputs[0] is source and all(id(reader) in before for reader, _ in source.uses()):
            found.append(str(source.name))
    return found


def ancestors(node: ir.Node, limit: int) -> set[int]:
    """Identities of nodes that `node` waits for: the nearest `limit` of them."""
    found: dict[int, None] = {}
    queue = [node]
    while queue and len(found) < limit:
        for value in queue.pop(0).inputs:
            producer = None if value is None else value.producer()
            if producer is not None and id(producer) not in found:
                found[id(producer)] = None
                queue.append(producer)
    return set(found)


# --- files --------------------------------------------------------------------------------------------------


def share(graph: ir.Graph) -> None:
    """Tied weights become one initializer."""
    first: dict[int, ir.Value] = {}
    for value in list(graph.initializers.values()):
        raw = getattr(value.const_value, "raw", None)
        if not isinstance(raw, Tensor) or raw.numel() < LEAST:
            continue
        kept = first.setdefault(raw.data_ptr(), value)
        if kept is not value:
            ir.convenience.replace_all_uses_with(value, kept)
            del graph.initializers[str(value.name)]


def save(model: ir.Model, path: Path, weights: str | None = None) -> None:
    """Writes the graph; its weights inside, or in the file `weights` beside it."""
    ir.save(model, path, external_data=weights, size_threshold_bytes=LEAST)
