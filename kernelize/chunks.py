"""Training on sequences that are longer than memory: a chunk at a time, with the layers' states carried over.

A chunk's loss is differentiated before the next chunk is read, so no more than one chunk's activations exist. What a
chunk owes to earlier ones goes through the states between them, and the recipe says how far the gradient follows:

- `truncate`: it stops at the chunk's start, as in truncated backpropagation through time;
- `recompute`: it is the whole sequence's. All chunks are read once without gradients, which leaves the state before
  each in host memory; then from the last to the first they are read again and differentiated, the gradient of a
  chunk's entering state being handed to the chunk before it.

The teacher reads along with a key-value cache, and no further than its own context.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .data import Row
from .objectives import Distil, Losses, Read
from .recipe import DistilWeights
from .runtime.cache import adopt_cache, kernel_layers
from .runtime.modeling import kernelized_layers
from .runtime.state import State

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Across = Literal["truncate", "recompute"]


class ChunkedDistil(Distil):
    """As `Distil`, in chunks of `size` tokens; every layer's state is of constant size."""

    def __init__(
        self, model: PreTrainedModel, teacher: PreTrainedModel, weights: DistilWeights, size: int, across: Across
    ):
        super().__init__(model, teacher, weights)
        self.size, self.across = size, across
        self.cache, self.teacher_cache = DynamicCache(), DynamicCache()
        self.asked: list[Tensor | None] = []  # gradients that the chunks after this one have left at its last state
        self.only_reads = False
        self.kept: dict[int, Tensor] = {}  # the teacher's features of a chunk, by its first position

    def pieces(self, rows: Row) -> int:
        return -(-rows.input_ids.shape[1] // self.size)

    def parts(self, rows: Row) -> Iterator[Row]:
        self.teacher_cache = DynamicCache(config=self.teacher_features.model.config)
        chunks = [chunk_of(rows, start, self.size) for start in range(0, rows.input_ids.shape[1], self.size)]
        yield from self._truncated(chunks) if self.across == "truncate" else self._recomputed(chunks)
        self.cache, self.teacher_cache = DynamicCache(), DynamicCache()

    def _truncated(self, chunks: list[Row]) -> Iterator[Row]:
        states: list[State] = []
        for number, chunk in enumerate(chunks):
            self.cache = self._entering(states, number)
            yield chunk
            states = [leaf(state, False) for state in states_of(self.cache)]

    def _recomputed(self, chunks: list[Row]) -> Iterator[Row]:
        device = chunks[0].input_ids.device
        entering, random = self._read(chunks)
        for number in reversed(range(len(chunks))):
            torch.set_rng_state(random[number])
            states = [leaf(state.map(lambda t: t.to(device)), True) for state in entering.pop()]
            self.cache = self._entering(states, number)
            yield chunks[number]
            self.asked = [x.grad for state in states for x in differentiable(state)]
        self.asked = []

    @torch.no_grad()
    def _read(self, chunks: list[Row]) -> tuple[list[list[State]], list[Tensor]]:
        """The layers' states before each chunk, in host memory, and the random numbers' state there."""
        entering, random, states = [], [], list[State]()
        self.only_reads = True
        for number, chunk in enumerate(chunks):
            entering.append([state.map(lambda t: t.to("cpu")) for state in states])
            random.append(torch.get_rng_state())
            self.cache = self._entering(states, number)
            self(*chunk)
            states = states_of(self.cache)
        self.only_reads = False
        return entering, random

    def _entering(self, states: list[State], number: int) -> DynamicCache:
        """The cache that holds the layers' `states` after `number` chunks; none before the first."""
        cache = DynamicCache(config=self.model.config)
        adopt_cache(cache, tuple(kernelized_layers(self.model)))
        for layer, state in zip(kernel_layers(cache), states, strict=bool(states)):
            layer.advance(state, number * self.size)
        return cache

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, answers: Tensor, counts: Tensor | None = None
    ) -> Losses:
        if self.only_reads:
            self.read_student(input_ids, position_ids)
            if (teacher := self.read_teacher(input_ids, position_ids)) is not None:
                self.kept[int(position_ids[0, 0])] = teacher[0].to("cpu")
            nothing = input_ids.new_zeros(0, dtype=torch.float32)
            return Losses(nothing, nothing, nothing)
        losses = super().forward(input_ids, position_ids, labels, answers, counts)
        left = [x for state in states_of(self.cache) for x in differentiable(state)]
        pulls = [(x * g).sum() for x, g in zip(left, self.asked, strict=True) if g is not None] if self.asked else []
        return losses._replace(carried=torch.stack(pulls).sum()) if pulls else losses

    def read_student(self, input_ids: Tensor, position_ids: Tensor) -> Read:
        return self.student_features(input_ids, position_ids, self.cache)

    @torch.no_grad()
    def read_teacher(self, input_ids: Tensor, position_ids: Tensor) -> Read | None:
        start = int(position_ids[0, 0])
        if self.reach is not None and start >= self.reach:
            return None
        if start not in self.kept:
            return self.teacher_features(input_ids, position_ids, self.teacher_cache)
        return self.kept.pop(start).to(input_ids.device), self.teacher_features.head


def chunk_of(rows: Row, start: int, size: int) -> Row:
    """The chunk [b, size] from `start` on; labels and answers have the next token besides, if there is one."""
    inside, known = slice(start, start + size), slice(start, start + size + 1)
    return Row(rows.input_ids[:, inside], rows.position_ids[:, inside], rows.labels[:, known], rows.answers[:, known])


def states_of(cache: DynamicCache) -> list[State]:
    return [layer.state for layer in kernel_layers(cache) if layer.state is not None]


def leaf(state: State, requires_grad: bool) -> State:
    """The same numbers without their history."""
    return state.map(lambda t: t.detach().requires_grad_(requires_grad and t.is_floating_point()))


def differentiable(state: State) -> list[Tensor]:
    return [x for x in state if x.is_floating_point()]
