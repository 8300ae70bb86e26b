"""Which layers must keep softmax: by what their replacement costs in retrieval, measured, in rounds.

The cost of a layer is what the model loses of the log probability of answers (`kernelize.retrieval`, training wordings)
when that layer is converted. Costs interact: of two layers that can do the same, either seems free to convert while the
other is there. So layers are given up in rounds, the cheapest first, and what is left is measured again beside those
that are gone. Restoring single layers of a converted model would not do: a path through two layers shows only when
both are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .audit import Read, compare, near, standing_in
from .data import Encoded, encode_retrieval
from .errors import InputError
from .objectives import Features
from .runtime.modeling import kernelized_layers
from .runtime.state import Kernel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEFT = 0.6  # of the layers, after a round
KINDS = ("several", "copying", "table")  # of the texts that layers are measured on
LENGTH = 1024  # tokens of each

OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Kept:
    """The layers that keep softmax, and what each layer's replacement cost, in nats a token of the answers, when it was
    last measured: for those given up, in their round. `before` and `after`: the cost of the answers without and with
    the conversion of all layers that are not kept."""

    layers: tuple[int, ...]
    costs: dict[int, float]
    before: float
    after: float


def retrieval_texts(
    tokenizer: PreTrainedTokenizerBase, haystack: str, length: int = LENGTH, kinds: Sequence[str] = KINDS, seed: int = 0
) -> list[Encoded]:
    """A text of each kind, up to `length` tokens. InputError if a text of that length has no room for a question."""
    texts = [encode_retrieval(haystack, tokenizer, f"{seed} {kind}", length, length, kind) for kind in kinds]
    if not all(any(text.answers) for text in texts):
        raise InputError(f"length={length} is too short to ask for anything; the least that makes sense is about 256")
    return texts


@torch.inference_mode()
def choose_layers(
    model: PreTrainedModel,
    texts: Sequence[Encoded],
    count: int,
    *,
    kl: float = 0.0,
    on_progress: OnProgress | None = None,
) -> Kept:
    """The `count` converted layers of `model` whose conversion costs most; the model stays as it was.

    `kl` is the weight of the divergence from the unconverted model, nats a token of the whole texts, in the cost.
    """
    layers = tuple(kernelized_layers(model))
    if not 0 < count < len(layers):
        raise InputError(f"keep=auto:{count}: a number from 1 to {len(layers) - 1}, below that of converted layers")
    return _Choice(model.eval(), texts, kl, on_progress).run(count)


def softmax(query: Tensor, key: Tensor, value: Tensor, kernel: Kernel) -> Tensor:
    """The attention that a layer had before it was converted."""
    if kernel.softcap is None and kernel.sink_logits is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=kernel.scaling, enable_gqa=True)
    spec = kernel.spec.replace(window=query.shape[2], reach=0)
    return near(query, key, value, kernel._replace(spec=spec))[0].to(value.dtype)


class _Choice:
    def __init__(self, model: PreTrainedModel, texts: Sequence[Encoded], kl: float, on_progress: OnProgress | None):
        self.model, self.texts, self.kl, self.on_progress = model, texts, kl, on_progress
        self.features = Features(model)
        self.exact = set(kernelized_layers(model))  # the layers that are softmax now
        self.blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.block_of = {i: self._block(attention) for i, attention in kernelized_layers(model).items()}
        self.teacher: list[Read] = []  # of each text
        self.done = self.total = 0

    def _block(self, attention: nn.Module) -> int:
        """The index of the block that holds an attention; what stands before it does not depend on it."""
        return next((i for i, block in enumerate(self.blocks) if attention in set(block.modules())), 0)

    def run(self, count: int) -> Kept:
        self.total = sum(size + 1 for size in sizes(len(self.exact), count)[:-1]) + 1
        costs: dict[int, float] = {}
        before = None
        for left in sizes(len(self.exact), count)[1:]:
            now, outputs = self._baseline()
            before = now if before is None else before
            found = {i: self._without(i, outputs) - now for i in sorted(self.exact)}
            costs |= found
            self.exact = set(sorted(found, key=lambda i: -found[i])[:left])
        after, _ = self._baseline()
        assert before is not None
        return Kept(tuple(sorted(self.exact)), dict(sorted(costs.items())), before, after)

    def _baseline(self) -> tuple[float, list[list[Any]]]:
        """The cost as it is now; and what the blocks give for each text."""
        outputs: list[list[Any]] = []
        with standing_in(self.model, dict.fromkeys(self.exact, softmax)):
            reads = []
            for text in self.texts:
                with recorded(self.blocks) as given:
                    reads.append(self._read(text))
                outputs.append(given)
        self.teacher = self.teacher or reads
        self._tick("texts")
        return self._cost(reads), outputs

    def _without(self, layer: int, outputs: list[list[Any]]) -> float:
        """The cost with `layer` converted besides; only it and what comes after are computed again."""
        first = self.block_of[layer]
        with standing_in(self.model, dict.fromkeys(self.exact - {layer}, softmax)):
            reads = []
            for text, given in zip(self.texts, outputs, strict=True):
                with replayed(self.blocks[:first], given[:first]):
                    reads.append(self._read(text))
        self._tick(f"layer {layer}")
        return self._cost(reads)

    def _read(self, text: Encoded) -> Read:
        ids = torch.tensor([text.ids], device=self.model.device)
        read, head = self.features(ids, torch.arange(ids.shape[1], device=ids.device)[None])
        return read[0], head

    def _cost(self, reads: Sequence[Read]) -> float:
        """Nats a token of the answers, and of the whole texts if their divergence counts."""
        sums = [answer_cost(text, read) for text, read in zip(self.texts, reads, strict=True)]
        cost = sum(sums) / sum(sum(text.answers) for text in self.texts)
        if not self.kl:
            return cost
        both = zip(reads, self.teacher, self.texts, strict=True)
        divergence = sum(compare(mine, theirs, torch.tensor(text.ids))[1] for mine, theirs, text in both)
        return cost + self.kl * divergence / sum(len(text.ids) - 1 for text in self.texts)

    def _tick(self, label: str) -> None:
        self.done += 1
        if self.on_progress:
            self.on_progress(self.done, self.total, label)


def sizes(layers: int, count: int) -> list[int]:
    """How many layers are softmax before each round and after the last: 30, 18, 11, 7."""
    found = [layers]
    while found[-1] > count:
        found.append(max(count, min(found[-1] - 1, math.ceil(LEFT * found[-1]))))
    return found


def answer_cost(text: Encoded, read: Read) -> float:
    """The negative log probability of a text's answers, each token after the true ones before it."""
    features, head = read
    at = torch.tensor(text.answers, device=features.device).nonzero()[:, 0]
    wanted = torch.tensor(text.ids, device=features.device)[at]
    scores = head(features[at - 1]).float().log_softmax(-1)
    return float(-scores.gather(1, wanted[:, None]).double().sum())


@contextmanager
def recorded(blocks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Gathers what the blocks return within the context, in their order."""
    given: list[Any] = []
    hooks = [block.register_forward_hook(lambda _, __, out: given.append(out)) for block in blocks]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replayed(blocks: Sequence[nn.Module], given: Sequence[Any]) -> Iterator[None]:
    """Within the context the blocks compute nothing, and return what they are given."""
    for block, out in zip(blocks, given, strict=True):
        vars(block)["forward"] = lambda *_, out=out, **__: out
    try:
        yield
    finally:
        for block in blocks:
            del vars(block)["forward"]
