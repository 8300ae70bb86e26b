"""Transfer, a few layers at a time, for a model that the device cannot hold.

A layer's transfer loss depends on the original's hidden states and on its own parameters alone (`TransferProbe` passes
the original's output on). So the layers can be trained in groups, one after the other: a group reads the hidden states
before it from a store on disk, trains, and leaves behind those after it. Only the group, the embeddings and what stands
between the layers is on the device; the rest of the model waits in host memory. Each group sees all of the stage's
batches, so the stage computes what it would compute at once, and reads and writes its tokens' hidden states a group.

With all layers in one group this is the stage itself. With fewer there is one difference: gradients are clipped by the
norm of a group's, not of all layers'.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .calibrate import instead
from .data import Row
from .errors import KernelizeError
from .objectives import Losses, Transfer
from .recipe import TransferWeights
from .runtime.modeling import family_of, kernelized_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Group:
    """Converted layers that are trained together, and the blocks from the last group's end to theirs."""

    layers: tuple[int, ...]
    first: int
    end: int


def groups(model: PreTrainedModel, size: int) -> list[Group]:
    """The converted layers of a model, `size` at a time."""
    converted = sorted(kernelized_layers(model))
    parts = [tuple(converted[start : start + size]) for start in range(0, len(converted), size)]
    firsts = [0, *(part[-1] + 1 for part in parts[:-1])]
    return [Group(part, first, part[-1] + 1) for part, first in zip(parts, firsts, strict=True)]


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, in their order."""
    return list(model.get_submodule(family_of(model.config.model_type).layers).children())


def place(model: PreTrainedModel, group: Group | None, device: torch.device | str, away: torch.device | str) -> int:
    """Moves `group`'s blocks and what stands between blocks to `device`, all else `away`; how many parameters it holds.

    None moves everything there. The LM head, which no transfer asks, stays away unless it is the embedding too.
    """
    parked = _parked(model, group) if group else set()
    seen = set()
    for module in model.modules():
        target = away if module in parked else device
        module._apply(lambda t, target=target: t.to(target), recurse=False)
        if module not in parked:
            seen |= {(id(p), p.numel()) for p in module.parameters(recurse=False)}
    return sum(size for _, size in seen)


def _parked(model: PreTrainedModel, group: Group) -> set[nn.Module]:
    blocks, head = blocks_of(model), model.get_output_embeddings()
    away = [block for i, block in enumerate(blocks) if not group.first <= i < group.end]
    if head.weight is not model.get_input_embeddings().weight:
        away.append(head)
    return {module for root in away for module in root.modules()}


class Store:
    """Hidden states of a process's rows on disk, by the block that they enter: written aside and renamed."""

    def __init__(self, folder: Path, process: int):
        self.folder, self.process = folder, process

    def path(self, block: int, step: int, row: int) -> Path:
        return self.folder / str(block) / f"{step}-{row}-{self.process}.safetensors"

    def write(self, block: int, step: int, first: int, out: Tensor | tuple) -> None:
        """What the block before `block` gave for the rows `first` … of a step."""
        for row, hidden in enumerate(out[0] if isinstance(out, tuple) else out, first):
            path = self.path(block, step, row)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({type(out).__name__: hidden.detach().cpu().clone()}, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)

    def read(self, block: int, step: int, rows: range) -> Tensor | tuple:
        """What `write` was given for these rows; KernelizeError if it is not there."""
        try:
            found = [item for row in rows for item in load_file(self.path(block, step, row)).items()]
        except (OSError, SafetensorError) as error:
            raise KernelizeError(
                f"{self.path(block, step, rows.start)}: {error}; a stage with layers_at_a_time resumes with as many "
                "processes as it was started with, and needs what it has stored"
            ) from error
        hidden = torch.stack([x for _, x in found])
        return (hidden,) if found[0][0] == "tuple" else hidden

    def forget(self, block: int) -> None:
        """Removes this process's states that enter `block`."""
        for path in (self.folder / str(block)).glob(f"*-{self.process}.safetensors"):
            path.unlink()


class BlockTransfer(Transfer):
    """`Transfer` for one group; the losses are its layers' share of the mean over all converted layers."""

    def __init__(self, model: PreTrainedModel, weights: TransferWeights, group: Group, store: Store):
        nn.Module.__init__(self)
        vars(self)["model"] = model  # not as a submodule: a data-parallel wrapper must see the group alone
        self.blocks = nn.ModuleList(blocks_of(model)[group.first : group.end])
        self._no_split_modules = []
        self.group, self.store, self.step, self.row = group, store, 0, 0
        self.all_layers = len(kernelized_layers(model))
        self._watch(weights, group.layers)

    def begin(self, step: int) -> None:
        self.step, self.row = step, 0

    def parts(self, rows: Row) -> Iterator[Row]:
        taken, device, entering = range(self.row, self.row + len(rows.input_ids)), rows.input_ids.device, None
        if self.group.first:
            entering = send_to_device(self.store.read(self.group.first, self.step, taken), device)
        with self._only_group(entering) as left:
            yield rows
        if self.group.layers[-1] < max(kernelized_layers(self.model)):
            self.store.write(self.group.end, self.step, self.row, left[-1])
        self.row = taken.stop

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, answers: Tensor, counts: Tensor | None = None
    ) -> Losses:
        losses = super().forward(input_ids, position_ids, labels, answers, counts)
        share = len(self.group.layers) / self.all_layers
        return Losses(losses.loss * share, losses.terms * share, losses.layers)

    @contextmanager
    def _only_group(self, entering: Any) -> Iterator[list[Any]]:
        """Within the context a forward computes the group's blocks; gives the list that their last output goes to."""
        blocks, head = blocks_of(self.model), self.model.get_output_embeddings()
        left: list[Any] = []
        last = blocks[self.group.end - 1]
        before = [(block, lambda *_, **__: entering) for block in blocks[: self.group.first]]
        after = [(block, lambda *_, **__: left[-1]) for block in blocks[self.group.end :]]
        hook = last.register_forward_hook(lambda _, __, out: left.append(out))
        try:
            with instead([*before, *after, (head, lambda hidden: hidden)]):
                yield left
        finally:
            hook.remove()
