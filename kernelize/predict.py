"""What a training stage takes on a machine, in bytes and seconds, from shapes alone: a prediction, with its formulas.

Of one process, with N processes and S = N where the engine shards (FSDP2), else 1:

    weights     frozen parameters / S in the model's dtype, trained ones / S in float32; the teacher's / S
    gradients   4 bytes a trained parameter / S;  optimizer: 8 bytes
    gathered    what FSDP2 holds whole: two decoder layers, and embeddings and LM head
    activations bytes a token and layer (`activation_bytes`) x layers x tokens held at once; with gradient
                checkpointing one layer's and each layer's input; by chunks the teacher's key-value cache besides
    logits      16 bytes (float32 logits, log-probabilities, and their gradients) x vocabulary x tokens of a piece,
                of which `losses.distillation` holds few

    FLOPs       2 a multiply-add x (matrix parameters x passes + attention); passes: `PASSES`
    seconds     FLOPs / (machine's FLOP/s x efficiency x N), and where attention is not fused SCORES_PASSES passes
                over its scores; on a GPU at least HOST a layer and micro-batch, in which the host asks for its kernels,
                unless a micro-step is a CUDA graph

Tokens held at once: micro_batch x sequence_length, or x chunk_tokens. `benchmarks/scale.py predict` compares this with
measurements; FACTOR is how far they may be apart.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from . import micro_graph
from .blockwise import blocks_of, groups
from .losses import LOGITS_HELD, LOGITS_HELD_ELSEWHERE
from .objectives import NEW
from .plan import AttentionShape, ConversionPlan, LayerCost
from .runtime.fused_select import TILE
from .runtime.modeling import kernelize_model
from .runtime.spec import KernelSpec, SpecError, choose

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .recipe import Stage

FACTOR = 2.0  # measured memory and time are within this factor of what is predicted
# passes over the matrix parameters: (student forward, backward to inputs, backward to weights, teacher forward)
PASSES = {"transfer": (1, 0, 0, 0), "forecast": (1, 0, 0, 0), "distil": (1, 1, 0, 1)}
SCORES_PASSES = 45.0  # over the scores of a layer, forward and backward, in exponentials' time
ORIGINAL_PASSES = {"transfer": 2.0, "forecast": 4.0, "distil": 0.5}  # over the original's, T x T; sdpa in distillation
# seconds a layer and micro-batch in which the host asks for the kernels, and for those of a second forward: measured
# with Llama-3-8B's shape beside an H200 (docs/scaling.md); small layers take some 8 ms
HOST, HOST_AGAIN = {"transfer": 13.5e-3, "forecast": 13.5e-3, "distil": 13.0e-3}, 13.6e-3
SCORES_SAVED = 9.0  # float32 copies of a token's scores that the chunked implementation keeps for its gradient


@dataclass(frozen=True)
class Machine:
    """One device: its memory, its dense bfloat16 FLOP/s by the vendor, and the share of them that is assumed."""

    name: str
    memory_bytes: float
    flops: float
    efficiency: float
    fused: bool = True
    scores: float = math.inf  # exponentials a second, where attention is not fused


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("rtx4090", 24e9, 165e12, 0.35),
        Machine("a100", 80e9, 312e12, 0.35),
        Machine("h100", 80e9, 989e12, 0.35),
        Machine("h200", 141e9, 989e12, 0.35),
    )
}


def machine_named(name: str) -> Machine:
    """SpecError for one that is not in MACHINES."""
    choose("machine", name, MACHINES)
    return MACHINES[name]


@dataclass(frozen=True)
class Prediction:
    """Of one process of a stage: bytes at most, by what they are for; FLOPs and seconds of a step of all processes."""

    stage: str
    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float
    step_flops: float
    step_seconds: float
    steps: int
    stored_bytes: float  # on disk, for layers_at_a_time

    @property
    def memory(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations + self.logits

    @property
    def seconds(self) -> float:
        return self.step_seconds * self.steps

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"memory": self.memory, "seconds": self.seconds}


def predict(
    config: PreTrainedConfig,
    plan: ConversionPlan,
    stage: Stage,
    machine: Machine,
    *,
    processes: int = 1,
    sharded: bool = False,
) -> Prediction:
    """The stage on `processes` such devices; SpecError for a model that cannot be converted."""
    model, itemsize = _model(config, plan), AttentionShape.of(config).torch_dtype.itemsize
    shape, shards = AttentionShape.of(config), processes if sharded else 1
    held = _held(model, stage)
    new = sum(p.numel() for name, p in held.items() if NEW in name)
    trained = _trained(model, held, new, stage)
    frozen = sum(p.numel() for p in held.values()) - (trained if stage.trainable == "all" else new)
    teacher = sum(p.numel() for name, p in model.named_parameters() if NEW not in name) * (stage.kind == "distil")
    tokens = min(stage.micro_batch, -(-stage.rows // processes)) * (stage.chunk_tokens or stage.sequence_length)
    rounds = len(groups(model, stage.layers_at_a_time)) if stage.layers_at_a_time else 1
    flops = _step_flops(model, plan, shape, stage)
    scores = 0.0 if machine.fused else _step_scores(plan, shape, stage)
    graphs = micro_graph.uncapturable(stage, processes > 1 or sharded) is None
    host = _step_host(plan, stage, processes) if machine.fused and not graphs else 0.0
    return Prediction(
        stage=stage.name,
        weights=((frozen + teacher) * itemsize + 4 * trained) / shards,
        gradients=4 * trained / shards,
        optimizer=8 * trained / shards,
        gathered=_gathered(model) * itemsize if sharded else 0,
        activations=tokens * _activations(model, plan, shape, stage, machine.fused, itemsize)
        + _teacher_cache(shape, stage),
        logits=_logits(config, stage, tokens, machine),
        step_flops=flops,
        step_seconds=max((flops / (machine.flops * machine.efficiency) + scores / machine.scores) / processes, host),
        steps=stage.total_steps,
        stored_bytes=0 if rounds == 1 else 2.0 * itemsize * stage.total_steps * stage.batch_tokens * _width(config),
    )


def _model(config: PreTrainedConfig, plan: ConversionPlan) -> Any:
    with init_empty_weights():
        model = kernelize_model(AutoModelForCausalLM.from_config(config), list(plan.layers))
    model.tie_weights()
    return model


def _held(model: Any, stage: Stage) -> dict[str, nn.Parameter]:
    """The parameters that are on the device at once."""
    named = dict(model.named_parameters())
    if not stage.layers_at_a_time:
        return named
    largest = max(groups(model, stage.layers_at_a_time), key=lambda group: group.end - group.first)
    inside = {id(p) for block in blocks_of(model)[largest.first : largest.end] for p in block.parameters()}
    blocks = {id(p) for block in blocks_of(model) for p in block.parameters()}
    head = model.get_output_embeddings().weight
    away = (blocks - inside) | ({id(head)} if head is not model.get_input_embeddings().weight else set())
    return {name: p for name, p in named.items() if id(p) not in away}


def _trained(model: Any, held: dict[str, nn.Parameter], new: int, stage: Stage) -> int:
    if stage.trainable == "all":
        return sum(p.numel() for p in held.values())
    lora = 0
    if stage.trainable == "new+lora":
        rank = stage.lora.r if stage.lora else 8
        lora = sum(rank * sum(module.weight.shape) for module in _linear(model))
    return new + lora


def _linear(model: Any) -> list[Any]:
    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]


def _gathered(model: Any) -> int:
    around = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    block = sum(p.numel() for p in blocks_of(model)[0].parameters())
    return 2 * block + sum({id(p): p.numel() for p in around}.values())


def _width(config: PreTrainedConfig) -> int:
    return config.get_text_config().hidden_size


def activation_bytes(
    shape: AttentionShape, spec: KernelSpec | None, width: int, inner: int, fused: bool, size: int
) -> float:
    """What one token leaves in one layer for the backward pass.

    Norms keep their input in float32 and their output; projections their inputs; the rotation, the gate and the
    product of the MLP what they were made of. The attention keeps features of queries and keys, and, where it is not
    fused, its scores.
    """
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    plain = 2 * (4 + 2 * size) * width + size * (4 * q + 6 * kv + 4 * inner)
    return plain + attention_bytes(shape, spec, fused, size)


def attention_bytes(shape: AttentionShape, spec: KernelSpec | None, fused: bool, size: int) -> float:
    if spec is None:
        return 0.0
    features = (shape.heads + shape.kv_heads) * spec.feature_dim * (size if fused else 8) if spec.has_memory else 0
    if fused:
        # the memory before each tile, and at the borders of its segments, of which there are at most as many
        states = shape.kv_heads * spec.feature_dim * shape.head_dim * (size + 4) / TILE if spec.has_memory else 0
        return features + states + 4 * shape.heads * (shape.head_dim + 2)
    reach = spec.positions + 64
    return features + 4 * SCORES_SAVED * shape.heads * reach + 16 * shape.heads * shape.head_dim


def _activations(
    model: Any, plan: ConversionPlan, shape: AttentionShape, stage: Stage, fused: bool, size: int
) -> float:
    """Bytes a token."""
    text = model.config.get_text_config()
    inner = text.to_dict().get("intermediate_size") or 4 * _width(text)
    specs = list(plan.layers)
    if stage.kind != "distil":
        size_of = [attention_bytes(shape, spec, fused, size) + 4 * (shape.heads + 2) * shape.head_dim for spec in specs]
        at_once = stage.layers_at_a_time or len(specs)
        return max(size_of) * at_once
    layers = [activation_bytes(shape, spec, _width(text), inner, fused, size) for spec in specs]
    if stage.gradient_checkpointing:
        return max(layers) + len(layers) * size * _width(text)
    return sum(layers)


def _teacher_cache(shape: AttentionShape, stage: Stage) -> float:
    """Keys and values that the teacher keeps while it reads by chunks."""
    if stage.chunk_tokens is None:
        return 0.0
    read = min(stage.sequence_length, shape.context)
    return float(stage.micro_batch * sum(shape.kv_bytes(read, limit) for limit in shape.limits))


def _logits(config: PreTrainedConfig, stage: Stage, tokens: int, machine: Machine) -> float:
    if stage.kind != "distil":
        return 0.0
    vocabulary = config.get_text_config().vocab_size
    most = LOGITS_HELD["cpu"] if not machine.fused else LOGITS_HELD_ELSEWHERE
    return 16.0 * vocabulary * min(tokens, max(1, most // vocabulary))


def _step_flops(model: Any, plan: ConversionPlan, shape: AttentionShape, stage: Stage) -> float:
    """Of a whole step."""
    forward, inputs, weights, teacher = PASSES[stage.kind]
    weights = int(stage.trainable == "all")
    again = _again(stage)
    matrices = sum(module.weight.numel() for module in _linear(model))
    head = model.get_output_embeddings().weight.numel() if stage.kind == "distil" else 0
    passes = forward + inputs + weights + teacher + again
    costs = [LayerCost.of(spec, shape) for spec in plan.converted.values()]
    own = sum(cost.memory_flops + shape.softmax_flops(cost.positions) for cost in costs)
    softmax = shape.layers * shape.softmax_flops(stage.sequence_length / 2)
    attention = (3 + again) * own + softmax  # forward and twice that backward; the original's once
    return stage.batch_tokens * (2.0 * (matrices + head) * passes + attention)


def _step_host(plan: ConversionPlan, stage: Stage, processes: int) -> float:
    """Seconds in which a process's host asks for a whole step."""
    pieces = -(-stage.sequence_length // (stage.chunk_tokens or stage.sequence_length))
    micro_batches = pieces * -(-stage.rows // (processes * stage.micro_batch))
    return micro_batches * len(plan.layers) * (HOST[stage.kind] + HOST_AGAIN * _again(stage))


def _again(stage: Stage) -> int:
    """How often a layer's forward is computed again for its gradients."""
    return int(stage.gradient_checkpointing or stage.across == "recompute")


def _step_scores(plan: ConversionPlan, shape: AttentionShape, stage: Stage) -> float:
    """Passes over the scores of a whole step: the layers' own, forward and backward, and the original's."""
    own = sum(SCORES_PASSES * (spec.positions + 64) for spec in plan.converted.values())
    softmax = shape.layers * ORIGINAL_PASSES[stage.kind] * stage.sequence_length
    return stage.batch_tokens * shape.heads * (own + softmax)


__all__ = ["FACTOR", "MACHINES", "Machine", "Prediction", "SpecError", "machine_named", "predict"]
