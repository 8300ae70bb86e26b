"""Training where no process holds the whole model: FSDP2, as the launcher's environment says.

A stage trains a sharded copy of the run's model. What it trains is gathered, whole, for a checkpoint and at the stage's
end; so checkpoints and results are the same files whatever made them, and a run goes on with another number of
processes. Precision is the loop's own business: shards keep their dtype, the arithmetic is under autocast.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedDataParallelKwargs, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from .errors import InputError, KernelizeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_accelerator() -> Accelerator:
    """The engine that `accelerate launch` or torchrun asks for. InputError for one that is not supported."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise InputError("training with DeepSpeed is not supported; FSDP2 (configs/accelerate/fsdp2.yaml) shards alike")
    on_gpu, plugin = torch.cuda.is_available(), _fsdp() if parse_flag_from_env("ACCELERATE_USE_FSDP") else None
    made = Accelerator(
        cpu=not on_gpu,  # processes without a GPU find each other only if it is said
        mixed_precision="bf16" if on_gpu else "no",
        fsdp_plugin=plugin,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if plugin and made.distributed_type == DistributedType.MULTI_CPU:
        # accelerate takes FSDP for GPUs alone and would go on with DDP; torch shards between CPU processes too
        made.state.fsdp_plugin = plugin
        for state in (made.state, PartialState()):  # each new look at the former copies from the latter
            state.distributed_type = DistributedType.FSDP
    return made


def _fsdp() -> FullyShardedDataParallelPlugin:
    """Shards by decoder layer. Compute dtype and reductions stay those of the parameters."""
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise InputError(f"fsdp_version={version} is not supported; allowed: 2")
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, mixed_precision_policy=MixedPrecisionPolicy(), auto_wrap_policy="transformer_based_wrap"
    )


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def layer_classes(model: nn.Module) -> list[str]:
    """Class names of a model's decoder layers, the units of sharding."""
    return sorted({type(module).__name__ for module in _layers(model)})


def _layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def sharded_teacher(teacher: PreTrainedModel) -> PreTrainedModel:
    """A copy for reading only, of which every process holds its part."""
    shards = copy.deepcopy(teacher)
    for layer in _layers(shards):
        fully_shard(layer)
    fully_shard(shards)
    return shards


def check_sharded(model: nn.Module) -> None:
    """KernelizeError if a model that was to be sharded is not: it would train, each process its own."""
    if whole := [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]:
        raise KernelizeError(f"accelerate has not sharded {whole[0]}, though FSDP2 was asked for")


def held(*models: nn.Module | None) -> int:
    """How many elements of the models' parameters this process has."""
    parameters = [p for model in models if model is not None for p in model.parameters()]
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)


@torch.no_grad()
def collect(shards: Mapping[str, nn.Parameter], into: Mapping[str, nn.Parameter]) -> None:
    """Copies trained parameters, whole, from the sharded copy into the run's model; every process must call it."""
    for name, parameter in shards.items():
        if parameter.requires_grad:
            into[name].copy_(whole(parameter))


def whole(tensor: Any) -> Any:
    """A tensor, or nested containers of tensors, without shards; every process must call it."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if isinstance(tensor, dict):
        return {key: whole(value) for key, value in tensor.items()}
    return [whole(value) for value in tensor] if isinstance(tensor, list) else tensor


def sharded_state(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """The state of an optimizer that `whole` made, with shards as its `parameters` have them."""
    held = {
        index: {key: _like(value, parameters[index]) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return state | {"state": held}


def _like(value: Any, parameter: nn.Parameter) -> Any:
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
