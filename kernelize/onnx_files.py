"""ONNX graphs as data: tracing, the precision of weights, what a runner may overwrite, files.

Of 8 bits, weights have a scale a column, tokens one each, found while it runs, and products are sums of integers. Of 4
bits they are blocks along the input axis, as the operator MatMulNBits of ONNX Runtime reads them (it quantises the
activations of a block while it runs). The embedding is looked up in the same 8-bit matrix that the output layer
multiplies with, where the two are tied.
"""

from __future__ import annotations

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
BLOCK = 32  # 4-bit weights of a row that share a scale
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
        halve(model.graph)
    elif precision in ("int8", "int4"):
        quantise(model, bits=8 if precision == "int8" else 4)


def halve(graph: ir.Graph) -> None:
    """Weights in half precision, widened where they are used."""
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < LEAST:
            continue
        half = new_weight(graph, f"{value.name}.fp16", tensor.numpy().astype(np.float16))
        cast = ir.node("Cast", [half], {"to": ir.DataType.FLOAT})
        replace(graph, value, cast)


def replace(graph: ir.Graph, value: ir.Value, node: ir.Node) -> None:
    """Every use of the initializer `value` becomes the result of `node`, which goes first."""
    graph.insert_before(graph[0], node)
    ir.convenience.replace_all_uses_with(value, node.outputs[0])
    del graph.initializers[str(value.name)]


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
    """Replaces products with weights by products of integers; tables in which rows are looked up have 8 bits always."""
    graph = model.graph
    products = [(node, matrix(node.inputs[1])) for node in graph if node.op_type == "MatMul"]
    tables = [
        n for n in graph if n.op_type == "Gather" and matrix(n.inputs[0]) and n.attributes.get_int("axis", 0) == 0
    ]
    looked_up = {id(n.inputs[0]) for n in tables}
    tokens: dict[int, list[ir.Node]] = {}
    for node, found in products:
        if found is not None:
            whole = bits == 8 or id(found[0]) in looked_up
            new = integer_product(graph, node, *found, tokens) if whole else block_product(graph, node, *found)
            replace_node(graph, node, *new)
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


def block_product(graph: ir.Graph, node: ir.Node, weight: ir.Value, transposed: bool) -> list[ir.Node]:
    rows = numbers(weight) if transposed else numbers(weight).T  # [N, K]
    packed, scales = in_blocks(torch.from_numpy(np.array(rows)))  # a copy: files are read-only
    (N, K), name = rows.shape, f"{weight.name}.int4"
    stored = [new_weight(graph, name, packed.numpy()), new_weight(graph, f"{name}.scales", scales.numpy())]
    sizes = {"K": K, "N": N, "bits": 4, "block_size": BLOCK, "accuracy_level": INT8}
    return [ir.node("MatMulNBits", [node.inputs[0], *stored], sizes, domain=CONTRIB)]


def integer_product(
    graph: ir.Graph, node: ir.Node, weight: ir.Value, transposed: bool, tokens: dict[int, list[ir.Node]]
) -> list[ir.Node]:
    """Bytes times bytes, summed as integers. Products of the same `tokens` share their bytes."""
    bytes_, scales = in_columns(graph, weight, transposed)
    given, new = node.inputs[0], []
    if id(given) not in tokens:
        new = tokens[id(given)] = token_bytes(graph, given)
    size, numbers_ = (tokens[id(given)][at].outputs[0] for at in (-3, -1))
    parts = [
        numbers_,
        bytes_,
        constant(graph, "step", np.float32(1 / 127)),
        scales,
        constant(graph, "zero", np.uint8(128)),
    ]
    product = ir.node("MatMulIntegerToFloat", parts, domain=CONTRIB)
    return [*new, product, ir.node("Mul", [product.outputs[0], size])]


def token_bytes(graph: ir.Graph, tokens: ir.Value | None) -> list[ir.Node]:
    """tokens [B, T, K] as bytes around 128, each token with a scale of its own, so that no other changes it."""
    magnitude = ir.node("Abs", [tokens])
    largest = ir.node("ReduceMax", [magnitude.outputs[0], constant(graph, "last_axis", np.array([-1], np.int64))])
    size = ir.node("Max", [largest.outputs[0], constant(graph, "least", np.float32(1e-30))])  # [B, T, 1]
    share = ir.node("Div", [tokens, size.outputs[0]])
    given = [share.outputs[0], constant(graph, "step", np.float32(1 / 127)), constant(graph, "zero", np.uint8(128))]
    return [magnitude, largest, size, share, ir.node("QuantizeLinear", given)]


def constant(graph: ir.Graph, name: str, value: Any) -> ir.Value:
    return new_weight(graph, f"kernelize.{name}", np.asarray(value))


def numbers(weight: ir.Value) -> np.ndarray:
    assert weight.const_value is not None
    return weight.const_value.numpy()


def look_up(graph: ir.Graph, node: ir.Node) -> list[ir.Node]:
    """Rows of the matrix whose columns the output layer multiplies with, where the two are tied."""
    table, ids = node.inputs
    assert table is not None
    bytes_, scales = in_columns(graph, table, True)
    columns = ir.node("Gather", [bytes_, ids], {"axis": 1})  # [K, B, T]
    rows = ir.node("Transpose", [columns.outputs[0]], {"perm": [1, 2, 0]})
    number = ir.node("Cast", [rows.outputs[0]], {"to": ir.DataType.FLOAT})
    scale = ir.node("Gather", [scales, ids], {"axis": 0})  # [B, T]
    wide = ir.node("Unsqueeze", [scale.outputs[0], constant(graph, "last_axis", np.array([-1], np.int64))])
    return [columns, rows, number, scale, wide, ir.node("Mul", [number.outputs[0], wide.outputs[0]])]


def in_columns(graph: ir.Graph, weight: ir.Value, transposed: bool) -> tuple[ir.Value, ir.Value]:
    """The initializers int8 [K, N], and scales [N], of a weight [N, K] (`transposed`) or [K, N]: once, whoever asks."""
    name = f"{weight.name}.int8"
    if name not in graph.initializers:
        columns = numbers(weight).T if transposed else numbers(weight)
        scales = np.maximum(np.abs(columns).max(0) / 127, np.finfo(np.float32).tiny).astype(np.float32)
        new_weight(graph, name, np.ascontiguousarray(np.rint(columns / scales).astype(np.int8)))
        new_weight(graph, f"{name}.scales", scales)
    return graph.initializers[name], graph.initializers[f"{name}.scales"]


def in_blocks(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [N, K] -> (bytes [N, K / 32, 16], scales [N, K / 32]) of 4-bit weights; low nibbles come first.

    The number of largest magnitude in a block becomes the end of the range, which has one step more below zero; of the
    scales around that the one with the least squared error is taken.
    """
    N, K = rows.shape
    blocks = nn.functional.pad(rows.float(), (0, -K % BLOCK)).view(N, -1, BLOCK)
    extreme = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
    best, least = torch.ones_like(extreme), torch.full_like(extreme, torch.inf)
    for factor in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75):
        scale = torch.where(extreme == 0, 1.0, extreme * factor / -8)
        error = ((blocks / scale).round_().clamp_(-8, 7).mul_(scale) - blocks).square_().sum(2, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    steps = ((blocks / best).round_().clamp_(-8, 7) + 8).to(torch.uint8)
    return (steps[..., ::2] | (steps[..., 1::2] << 4)).contiguous(), best[..., 0].contiguous()


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
