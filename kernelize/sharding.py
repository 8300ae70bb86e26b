"""Training where no process holds the whole model: FSDP2 or ZeRO-3, as the launcher's environment says.

A stage trains a sharded copy of the run's model. What it trains is gathered, whole, for a checkpoint and at the stage's
end; so checkpoints and results are the same files whatever made them, and a run goes on with another number of
processes. Precision is the loop's own business: shards keep their dtype, the arithmetic is under autocast.
An engine is what the loop leaves to whoever cuts the model: `Whole` (one process, DDP), `Fsdp2`, `zero.Zero3`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedDataParallelKwargs, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from .errors import InputError, KernelizeError
from .runtime.attention import KernelAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_accelerator() -> Accelerator:
    """The processes that `accelerate launch` or torchrun has started. InputError for what is not supported."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        from .zero import make_zero3

        return make_zero3()
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


def units_of(model: nn.Module, probed: bool) -> list[str]:
    """Class names of what is gathered at once: the decoder layers, and where losses are taken inside them (`probed`)
    the kernelized attention by itself.

    A loss inside a layer never passes the layer's output, where FSDP2 would learn that the backward pass comes: the
    layer's weights would be gone by then. Those of the attention are small, and stay.
    """
    layers = {type(module).__name__ for module in layers_of(model)}
    return sorted(layers | ({KernelAttention.__name__} if probed else set()))


def layers_of(model: nn.Module) -> list[GradientCheckpointingLayer]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


# --- engines ----------------------------------------------------------------------------------------------------------


class Whole:
    """Every process holds all that it trains: one process, or DDP."""

    sharded: ClassVar[bool] = False

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def prepare(self, objective: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> tuple[nn.Module, Any]:
        """(what to call instead of the objective, what to step) of a stage that clips gradients at `clip`."""
        return self.accelerator.prepare(objective, optimizer)

    def teacher(self, teacher: PreTrainedModel) -> PreTrainedModel:
        """The teacher as a distillation reads it."""
        return teacher.to(self.accelerator.device)

    @contextmanager
    def micro(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch; `last`: its gradients complete those of the global batch."""
        if last:
            yield
        else:
            with self.accelerator.no_sync(wrapped):
                yield

    def backward(self, wrapped: nn.Module, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clipped_norm(self, wrapped: nn.Module, clip: float) -> float:
        """The norm of all gradients before they are clipped at `clip`, in this call or in `step`."""
        return float(self.accelerator.clip_grad_norm_(wrapped.parameters(), clip))

    def step(self, wrapped: nn.Module, optimizer: Any) -> None:
        """Changes the parameters and forgets the gradients."""
        optimizer.step()
        optimizer.zero_grad()

    def forget(self, wrapped: nn.Module, optimizer: Any) -> None:
        """Forgets gradients that are not to be used."""
        optimizer.zero_grad()

    def nonfinite_gradient(self, model: nn.Module) -> str | None:
        """The first parameter whose gradient has a value that is no finite number."""
        return nonfinite({name: parameter.grad for name, parameter in model.named_parameters()})

    def optimizer_state(self, wrapped: nn.Module, optimizer: Any) -> dict[str, Any]:
        """As torch's own optimizer has it, whole; every process must call it."""
        return _whole(optimizer.state_dict())

    def load_optimizer(self, wrapped: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
        """Takes over what `optimizer_state` gave, whichever engine's."""
        held = [parameter for part in optimizer.param_groups for parameter in part["params"]]
        optimizer.load_state_dict(_sharded_state(state, held))

    def collect(self, shards: Mapping[str, nn.Parameter], into: Mapping[str, nn.Parameter]) -> None:
        """Copies trained parameters, whole, from the sharded copy into the run's model; every process must call it."""

    def held(self, *models: nn.Module | None) -> int:
        """How many elements of the models' parameters this process has."""
        return sum(self.held_of(p) for model in models if model is not None for p in model.parameters())

    def held_of(self, parameter: nn.Parameter) -> int:
        return parameter.numel()

    def leave(self, wrapped: nn.Module) -> None:
        """Frees what a stage has taken."""
        self.accelerator.free_memory()


class Fsdp2(Whole):
    """Every process holds its part of each decoder layer."""

    sharded = True

    def prepare(self, objective: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> tuple[nn.Module, Any]:
        made = super().prepare(objective, optimizer, clip)
        if whole := [name for name, p in objective.named_parameters() if not isinstance(p, DTensor)]:
            raise KernelizeError(f"accelerate has not sharded {whole[0]}, though FSDP2 was asked for")
        for module in objective.modules():
            if isinstance(module, KernelAttention) and isinstance(module, FSDPModule):
                module.set_reshard_after_forward(False)
        return made

    def teacher(self, teacher: PreTrainedModel) -> PreTrainedModel:
        """A copy for reading only, of which every process holds its part."""
        shards = copy.deepcopy(teacher.cpu())
        for layer in layers_of(shards):
            fully_shard(layer)
        fully_shard(shards)
        return shards

    @contextmanager
    def micro(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        # Reduced in every micro-step: FSDP2 keeps gradients that are not reduced whole, in every process, 32 GB of an
        # 8B model. Weights are gathered in each micro-step anyway; this moves as much as gathering what is trained.
        yield

    @torch.no_grad()
    def collect(self, shards: Mapping[str, nn.Parameter], into: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in shards.items():
            if parameter.requires_grad:
                into[name].copy_(_whole(parameter))

    def held_of(self, parameter: nn.Parameter) -> int:
        return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()


def engine_of(accelerator: Accelerator) -> Whole:
    """How the stages of a run train under what it was launched with."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from .zero import Zero3

        return Zero3(accelerator)
    return (Fsdp2 if accelerator.distributed_type == DistributedType.FSDP else Whole)(accelerator)


def nonfinite(tensors: Mapping[str, Tensor | None]) -> str | None:
    """The first name whose tensor has a value that is no finite number."""
    return next((n for n, value in tensors.items() if value is not None and not _whole(value.isfinite().all())), None)


def _whole(tensor: Any) -> Any:
    """A tensor, or nested containers of tensors, without shards; every process must call it."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if isinstance(tensor, dict):
        return {key: _whole(value) for key, value in tensor.items()}
    return [_whole(value) for value in tensor] if isinstance(tensor, list) else tensor


def _sharded_state(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """The state of an optimizer that `_whole` made, with shards as its `parameters` have them."""
    held = {
        index: {key: _like(value, parameters[index]) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return state | {"state": held}


def _like(value: Any, parameter: nn.Parameter) -> Any:
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
