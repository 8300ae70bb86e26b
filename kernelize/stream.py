"""Models that are bigger than memory: weights stay in the source's files, and a module has its own while it computes.

The parameters are on the meta device; hooks of accelerate map a module's tensors from the safetensors file before its
forward and let them go after it. What the conversion adds is real from the start. So calibration reads one layer after
the other, and so does the backward pass that shares out slots, whose layers are computed again. Saving copies the
source's files as they are, and adds one file with the new parameters.
"""

from __future__ import annotations

import ctypes
import json
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .convert import load_config, stretched_config
from .errors import InputError
from .files import new_folder
from .objectives import NEW
from .runtime.modeling import kernelize_model, kernelized_layers, reset_kernels
from .sharding import layers_of
from .sources import INDEX, WEIGHTS, shapes_in, shard_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .plan import ConversionPlan

FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")  # of a Hub repository


class Shards:
    """The safetensors files of a checkpoint folder: where each tensor is. InputError for files that do not fit."""

    def __init__(self, folder: Path):
        self.files = shard_files(folder)
        self.where = {name: file for file in self.files for name in shapes_in(file)}

    @property
    def largest(self) -> int:
        """Bytes of the largest file."""
        return max(file.stat().st_size for file in self.files)

    def loader(self, model: nn.Module) -> OffloadedWeightsLoader:
        """The tensors of `model` by its own names; tied ones share a file's. InputError for one that is not there."""
        tied = {id(p): name for name, p in model.named_parameters() if name in self.where}
        index = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if NEW in name:
                continue
            stored = name if name in self.where else tied.get(id(parameter))
            if stored is None:
                raise InputError(f"{self.files[0].parent} holds no tensor {name!r}, which a streamed conversion needs")
            self._check(stored, parameter)
            index[name] = {"safetensors_file": str(self.where[stored]), "weight_name": stored}
        return OffloadedWeightsLoader(index=index)

    def _check(self, name: str, parameter: nn.Parameter) -> None:
        with safe_open(self.where[name], "pt") as file:
            shape = file.get_slice(name).get_shape()
        if tuple(shape) != tuple(parameter.shape):
            raise InputError(f"{self.where[name]}: {name!r} is {shape}, the config says {list(parameter.shape)}")


def local_folder(source: str, revision: str | None) -> Path:
    """The folder of a source, downloaded if it is a Hub id. InputError for a GGUF file, which has to be unpacked."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        raise InputError(f"{source!r}: a GGUF file's tensors have to be unpacked; a streamed conversion cannot do that")
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(FILES)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(f"cannot download {source!r}: {error}") from error


# --- the model ----------------------------------------------------------------------------------------------


def streamed_model(
    source: str,
    folder: Path,
    plan: ConversionPlan,
    *,
    context: int | None = None,
    device: str = "cpu",
    **loading: Any,
) -> tuple[PreTrainedModel, Shards]:
    """A converted model, in evaluation mode, whose old parameters are read from `folder` when they are needed.

    The new ones are at their initial values. InputError for weights that are quantised, or go by other names.
    """
    config: PreTrainedConfig = load_config(source, **loading)
    if config.to_dict().get("quantization_config"):
        raise InputError(f"{source!r} is quantised; a streamed conversion reads plain tensors")
    if context:
        config = stretched_config(config, context)
    shards = Shards(folder)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    model.tie_weights()
    model = kernelize_model(model, list(plan.layers)).eval()
    for attention in kernelized_layers(model).values():
        attention.kernelize.to_empty(device=device)
    reset_kernels(model)
    _attach(model, shards.loader(model), device)
    for layer in layers_of(model):
        layer.register_forward_hook(lambda *_: _give_back())
    return model, shards


def _give_back() -> None:
    """Returns what is freed to the system: glibc's heap would keep pieces of what every layer has taken for a while."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _attach(model: PreTrainedModel, loader: Mapping[str, torch.Tensor], device: str) -> None:
    for name, module in model.named_modules():
        if NEW in f".{name}." or not list(module.parameters(recurse=False)):
            continue
        weights = PrefixedDataset(loader, f"{name}.")
        add_hook_to_module(module, AlignDevicesHook(execution_device=device, offload=True, weights_map=weights))


@contextmanager
def recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Within the context a backward pass computes each layer again, so that no layer's weights are held for it."""
    layers = layers_of(model)
    for layer in layers:
        layer.gradient_checkpointing = layer.training = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False


# --- save ---------------------------------------------------------------------------------------------------


def save_streamed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shards: Shards,
    output: str | Path,
    *,
    overwrite: bool = False,
    document: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """The source's weight files as they are, one more with the new parameters, and what else a checkpoint has.

    Raises as `convert.save`; `output` is complete or not there.
    """
    new = {name: p.detach() for name, p in model.named_parameters() if NEW in f".{name}"}
    remove_hook_from_module(model, recurse=True)
    with new_folder(output, overwrite=overwrite) as aside:
        model.save_pretrained(aside, state_dict=dict(new))
        (aside / INDEX).unlink(missing_ok=True)
        names = [f"model-{i:05}-of-{len(shards.files) + 1:05}.safetensors" for i in range(1, len(shards.files) + 2)]
        (aside / WEIGHTS).rename(aside / names[-1])
        for file, name in zip(shards.files, names, strict=False):
            shutil.copyfile(file, aside / name)
        renamed = dict(zip(shards.files, names, strict=False))
        index = {name: renamed[file] for name, file in shards.where.items()} | dict.fromkeys(new, names[-1])
        size = sum((aside / name).stat().st_size for name in names)
        (aside / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2))
        tokenizer.save_pretrained(aside)
        document(aside)
    return Path(output)
