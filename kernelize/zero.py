"""DeepSpeed's ZeRO-3 as an engine of the one loop: every process holds its part of each parameter.

DeepSpeed wants to clip and step inside `backward`; here its engine accumulates, the loop looks at losses and
gradients, and then it steps. Checkpoints have the optimizer's state as torch's AdamW has it, so that a run goes on
under any other engine. DeepSpeed is an extra: pip install 'kernelize[deepspeed]'.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import util
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from .errors import InputError
from .sharding import Whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOMENTS = ("exp_avg", "exp_avg_sq")
# fields of the plugin: offloading swaps the optimizer for DeepSpeed's own, and zero3_init cuts models while they load
ALLOWED = {
    "zero_stage": 3,
    "offload_optimizer_device": "none",
    "offload_param_device": "none",
    "zero3_init_flag": False,
}


def make_zero3() -> Accelerator:
    """The processes that were launched with DeepSpeed. InputError where it is not installed, or asked for more."""
    if util.find_spec("deepspeed") is None:
        raise InputError("DeepSpeed is not installed: pip install 'kernelize[deepspeed]'")
    on_gpu, plugin = torch.cuda.is_available(), DeepSpeedPlugin()
    for field, only in ALLOWED.items():
        if (asked := getattr(plugin, field)) != only:
            raise InputError(f"DeepSpeed's {field}={asked} is not supported; allowed: {only}")
    # without a GPU accelerate looks for processes only if it is told how they talk
    handlers = [] if on_gpu else [InitProcessGroupKwargs(backend="gloo")]
    made = Accelerator(deepspeed_plugin=plugin, mixed_precision="no", kwargs_handlers=handlers)
    # batches are the loop's business; DeepSpeed turns foreign autocast off, and has its own
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": made.num_processes,
        "gradient_accumulation_steps": 1,
        "torch_autocast": {"enabled": on_gpu, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }
    return made


class Zero3(Whole):
    """Every process holds its part of each parameter, gradient and moment; a module is gathered to compute."""

    sharded = True

    def prepare(self, objective: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> tuple[Any, Any]:
        self._config()["gradient_clipping"] = clip
        wrapped, _ = self.accelerator.prepare(objective, optimizer)
        return wrapped, optimizer  # which the engine steps, on shards; accelerate's wrapper of it does nothing

    def _config(self) -> dict[str, Any]:
        plugin = self.accelerator.deepspeed_plugin
        assert plugin is not None
        return plugin.deepspeed_config

    def teacher(self, teacher: PreTrainedModel) -> PreTrainedModel:
        """A copy for reading only, of which every process holds its part."""
        import deepspeed

        shards = copy.deepcopy(teacher.cpu())
        return deepspeed.initialize(model=shards, config=copy.deepcopy(self._config()))[0].module

    @contextmanager
    def micro(self, wrapped: Any, last: bool) -> Iterator[None]:
        wrapped.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, wrapped: Any, loss: Tensor) -> None:
        import deepspeed

        # a layer is gathered when gradients reach its output, which those of a loss taken inside never do
        inside = [p for p in wrapped.parameters() if p.requires_grad] if wrapped.module.probed else []
        with deepspeed.zero.GatheredParameters(inside) if inside else nullcontext():
            wrapped.backward(loss, scale_wrt_gas=False)

    def clipped_norm(self, wrapped: Any, clip: float) -> float:
        from deepspeed.utils import safe_get_local_grad

        grads = [safe_get_local_grad(p) for p in wrapped.parameters() if p.requires_grad]
        squares = torch.stack([g.float().square().sum() for g in grads]).sum().to(self.accelerator.device)
        return float(self.accelerator.reduce(squares, "sum").sqrt())

    def step(self, wrapped: Any, optimizer: Any) -> None:
        wrapped.step()

    def forget(self, wrapped: Any, optimizer: Any) -> None:
        wrapped.optimizer.zero_grad()

    def nonfinite_gradient(self, model: nn.Module) -> str | None:
        from deepspeed.utils import safe_get_full_grad

        trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        return next((name for name, p in trained if not safe_get_full_grad(p).isfinite().all()), None)

    def optimizer_state(self, wrapped: Any, optimizer: Any) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        trained = [p for p in wrapped.parameters() if p.requires_grad]
        state = {}
        for steps in {float(held["step"]) for held in optimizer.state.values()}:  # none before the first step
            for index, p in enumerate(trained):
                moments = {key: safe_get_full_optimizer_state(p, key) for key in MOMENTS}
                state[index] = {"step": torch.tensor(steps)} | moments
        (group,) = optimizer.param_groups
        return {"state": state, "param_groups": [group | {"params": list(range(len(trained)))}]}

    def load_optimizer(self, wrapped: Any, optimizer: Any, state: dict[str, Any]) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        trained, saved = [p for p in wrapped.parameters() if p.requires_grad], state["state"]
        for flat in wrapped.optimizer.fp32_partitioned_groups_flat if saved else ():
            optimizer.state[flat] = {"step": saved[0]["step"].cpu()} | {key: torch.zeros_like(flat) for key in MOMENTS}
        for index, parameter in enumerate(trained if saved else ()):
            for key in MOMENTS:
                safe_set_local_optimizer_state(parameter, self._part(saved[index][key], parameter), key)
        for group, like in zip(optimizer.param_groups, state["param_groups"], strict=True):
            group |= {key: value for key, value in like.items() if key != "params"}

    def _part(self, value: Tensor, parameter: Any) -> Tensor:
        """This process's part of a whole value: equal pieces of its elements, the last of them filled up with zeros."""
        size = parameter.ds_tensor.numel()
        filled = nn.functional.pad(value.flatten(), (0, size * self.accelerator.num_processes - value.numel()))
        return filled.narrow(0, size * self.accelerator.process_index, size)

    @torch.no_grad()
    def collect(self, shards: Mapping[str, nn.Parameter], into: Mapping[str, nn.Parameter]) -> None:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in shards.items():
            if parameter.requires_grad:
                into[name].copy_(safe_get_full_fp32_param(parameter))

    def held_of(self, parameter: Any) -> int:
        return parameter.ds_tensor.numel()
