"""ONNX graphs as data: tracing, the precision of weights, what a runner may overwrite, files.

Weights are quantised in blocks along the input axis, as the operator MatMulNBits of ONNX Runtime reads them (it
quantises the activations of a block while it runs): 8 bits symmetrically, 4 bits between the least and the largest
weight of a block. Such a block's offset is a product of its own, with the sum of what the block is multiplied with:
the operator knows zero points that are whole numbers, or is thirty times slower. The embedding is looked up in the same
8-bit rows that the output layer multiplies with, where the two are tied; it needs no operator beyond the standard.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset23 as op
from onnxscript import optimizer, rewriter
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase, onnx_fusions
from onnxscript.rewriter.rules import common as rules
from torch import Tensor, nn

OPSET = 23
CONTRIB = "com.microsoft"
BLOCKS = {8: 64, 4: 32}  # bits: weights of a row that share a scale
LEAST = 1024  # elements from which a tensor counts as a weight
SHRUNK = (0.0, 0.03, 0.06, 0.1)  # parts of a block's range that may be cut off at an end
INT8 = 4  # MatMulNBits: products of 8-bit activations, summed as integers


# Of torch's own rules those that find something here; its pairing of slices compares every node with every other.
RULES = (
    rules.add_0_rule, rules.sub_0_rule, rules.mul_by_1_rule, rules.div_by_1_rule, rules.cast_cast_rule,
    rules.no_op_cast_rule, rules.no_op_expand_rule, rules.no_op_transpose_rule, rules.transpose_transpose_rule,
    rules.reshape_reshape_rule, rules.squeeze_reshape_1d_rule, rules.unsqueeze_unsqueeze_rule,
    rules.collapse_slice_rule, rules.collapse_slice2_rule, rules.materialize_reshape_shape_rule,
    *rules.expand_before_binary_op_rules,
)  # fmt: skip


class Turned(RewriteRuleClassBase):
    """`Rotation.turn` of halves, where all heads turn alike: a turn back by the operator for rotary positions."""

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any) -> Any:
        a, b = op.Split(x, _outputs=["a", "b"])
        turned = op.Add(op.Mul(a, cos), op.Mul(b, sin)), op.Sub(op.Mul(b, cos), op.Mul(a, sin))
        return op.Concat(*turned, axis=-1)

    def check(self, op: Any, *_: Any, **bound: Any) -> MatchResult:
        shape = bound["cos"].shape
        alike = shape is not None and len(shape) == 4 and shape[1] == 1
        return MatchResult() if alike else MatchResult().fail("heads turn differently", bound["cos"])

    def rewrite(self, op: Any, x: Any, cos: Any, sin: Any, **_: Any) -> Any:
        heads = op.Constant(value_ints=[1])
        return op.RotaryEmbedding(x, op.Squeeze(cos, heads), op.Neg(op.Squeeze(sin, heads)))


class WithNegative(RewriteRuleClassBase):
    """A tensor beside its negative, along a new axis, is a product."""

    def pattern(self, op: Any, x: Any, axis: Any) -> Any:
        return op.Concat(op.Unsqueeze(x, axis), op.Unsqueeze(op.Neg(x), axis), axis=-2)

    def rewrite(self, op: Any, x: Any, axis: Any, **_: Any) -> Any:
        signs = op.Constant(value=ir.tensor(np.array([[1.0], [-1.0]], np.float32)))
        return op.Mul(op.Unsqueeze(x, axis), signs)


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
    onnx_fusions.fuse(model)
    rewriter.RewritePass([Turned.rule(), WithNegative.rule()])(model)
    for last in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(), passes.CommonSubexpressionEliminationPass(), passes.OutputFixPass(),
        passes.NameFixPass(),
    ):  # fmt: skip
        last(model)


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
    """Of a matrix [N, K], as torch stores it: a scale for every block of a row, or a row where blocks do not fit."""
    N, K = array.shape
    blocks = array.reshape(N, -1, BLOCKS[8] if K % BLOCKS[8] == 0 else K)
    half = (np.abs(blocks).max(-1, keepdims=True) / 127).astype(np.float16)
    half[half == 0] = 1
    number = np.rint(blocks / half.astype(np.float32)).clip(-127, 127).astype(np.int8)
    stored, scales = (new_weight(graph, f"{value.name}.{end}", x) for end, x in (("int8", number), ("scales", half)))
    shape = new_weight(graph, f"kernelize.shape.{N}.{K}", np.array([N, K], np.int64))
    wide = [ir.node("Cast", [x], {"to": ir.DataType.FLOAT}) for x in (stored, scales)]
    product = ir.node("Mul", [node.outputs[0] for node in wide])
    return [*wide, product, ir.node("Reshape", [product.outputs[0], shape])]


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
            replace_node(graph, node, *product(graph, node, *found, own))
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


def product(graph: ir.Graph, node: ir.Node, weight: ir.Value, transposed: bool, bits: int) -> list[ir.Node]:
    rows = numbers(weight) if transposed else numbers(weight).T  # [N, K]
    found, new = stored(graph, weight, rows, bits)
    N, K = rows.shape
    sizes = {"K": K, "N": N, "bits": bits, "block_size": BLOCKS[bits], "accuracy_level": INT8}
    new.append(ir.node("MatMulNBits", [node.inputs[0], found["packed"], found["scales"]], sizes, domain=CONTRIB))
    if "offsets" in found:
        assert node.inputs[0] is not None
        sums, more = sums_of_blocks(graph, node.inputs[0], K, BLOCKS[bits])
        offset = ir.node("MatMul", [sums, found["offsets"]])
        new += [*more, offset, ir.node("Add", [new[-1].outputs[0], offset.outputs[0]])]
    return new


def sums_of_blocks(graph: ir.Graph, x: ir.Value, K: int, block: int) -> tuple[ir.Value, list[ir.Node]]:
    """Of x [..., K] the sum of every block, [..., ceil(K / block)], and the nodes that this takes if nobody has it."""
    ones = np.repeat(np.eye(-(-K // block), dtype=np.float32), block, axis=0)[:K]
    table = new_weight(graph, f"kernelize.blocks.{K}", ones)
    for node, _ in x.uses():
        if node.op_type == "MatMul" and node.inputs[1] is table:
            return node.outputs[0], []
    node = ir.node("MatMul", [x, table])
    return node.outputs[0], [node]


def numbers(weight: ir.Value) -> np.ndarray:
    assert weight.const_value is not None
    return weight.const_value.numpy()


def look_up(graph: ir.Graph, node: ir.Node) -> tuple[ir.Node, ...]:
    """Rows of 8 bits, by operators of the standard: (byte − 128) · scale, block by block."""
    table, ids = node.inputs
    assert table is not None
    weight = numbers(table)
    found, new = stored(graph, table, weight, 8)
    rows = ir.node("Gather", [found["packed"], ids], {"axis": 0})  # [B, T, K / block, block]
    scale = ir.node("Gather", [found["scales"], ids], {"axis": 0})  # [B, T, K / block]
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
    return *new, rows, scale, number, centred, wide, scaled, flat, cut


def stored(graph: ir.Graph, weight: ir.Value, rows: np.ndarray, bits: int) -> tuple[dict[str, ir.Value], list[ir.Node]]:
    """The quantised rows [N, K] of `weight`, stored once whoever uses them; and the nodes that widen scales.

    Scales and offsets are halves in the file, which a runtime widens once, when it loads.
    """
    name = f"{weight.name}.int{bits}"
    if name not in graph.initializers:
        parts = in_blocks(torch.from_numpy(np.array(rows)), bits, BLOCKS[bits])  # a copy: files are read-only
        new_weight(graph, name, parts.packed.numpy())
        new_weight(graph, f"{name}.scales", parts.scales.numpy())
        if parts.offsets is not None:
            new_weight(graph, f"{name}.offsets", parts.offsets.T.contiguous().numpy())  # [K / block, N]
    found, nodes = {"packed": graph.initializers[name]}, []
    for part in ("scales", "offsets"):
        half = graph.initializers.get(f"{name}.{part}")
        if half is not None:
            widened = [node for node, _ in half.uses()] or [ir.node("Cast", [half], {"to": ir.DataType.FLOAT})]
            found[part] = widened[0].outputs[0]
            nodes += [] if widened[0].graph is graph else widened
    return found, nodes


@dataclass(frozen=True)
class InBlocks:
    """Rows [N, K] of weights as numbers of a few bits; a weight is scale · (number − half of the levels) + offset."""

    packed: Tensor  # uint8 [N, K / block, block · bits / 8]; low nibbles come first
    scales: Tensor  # float16 [N, K / block]
    offsets: Tensor | None  # the same; None where all are 0


def in_blocks(rows: Tensor, bits: int, block: int) -> InBlocks:
    N, K = rows.shape
    blocks = nn.functional.pad(rows.float(), (0, -K % block)).view(N, -1, block)
    half = 1 << (bits - 1)
    scale, offset = symmetric(blocks, half) if bits == 8 else asymmetric(blocks, half)
    steps = (((blocks - offset) / scale).round_().clamp_(-half, half - 1) + half).to(torch.uint8)
    packed = steps if bits == 8 else steps[..., ::2] | (steps[..., 1::2] << 4)
    offsets = None if bits == 8 else offset[..., 0].half()
    return InBlocks(packed.contiguous(), scale[..., 0].half(), offsets)


def symmetric(blocks: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """(scale, offset 0) [N, G, 1]: the number of largest magnitude is the end of the range that has a step more."""
    extreme = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
    return rounded(extreme / -half), torch.zeros_like(extreme)


def asymmetric(blocks: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """(scale, offset) [N, G, 1] of the range, the block's or a little less, with the least squared error."""
    low, high = blocks.aminmax(dim=2, keepdim=True)
    scale, offset, least = torch.ones_like(low), low, torch.full_like(low, torch.inf)
    for below, above in itertools.product(SHRUNK, SHRUNK):
        start = low + (high - low) * below
        step = rounded((high - start - (high - low) * above) / (2 * half - 1))
        zero = (start + half * step).half().float()
        numbers = ((blocks - zero) / step).round_().clamp_(-half, half - 1)
        error = numbers.mul_(step).add_(zero).sub_(blocks).square_().sum(2, keepdim=True)
        better = error < least
        scale, offset, least = (torch.where(better, *pair) for pair in ((step, scale), (zero, offset), (error, least)))
    return scale, offset


def rounded(scale: Tensor) -> Tensor:
    """Scales as halves can hold them; where none is needed, 1."""
    half = scale.half().float()
    return torch.where(half == 0, 1.0, half)


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
        readers = {id(reader) for reader, _ in source.uses()}
        if node.inputs[0] is source and readers <= {id(node)} | ancestors(node, readers):
            found.append(str(source.name))
    return found


def ancestors(node: ir.Node, wanted: set[int]) -> set[int]:
    """Identities of nodes that `node` waits for: the nearest, until all that are `wanted` are among them."""
    found: dict[int, None] = {}
    queue, missing = collections.deque([node]), wanted - {id(node)}
    while queue and missing:
        for value in queue.popleft().inputs:
            producer = None if value is None else value.producer()
            if producer is not None and id(producer) not in found:
                found[id(producer)] = None
                missing.discard(id(producer))
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
