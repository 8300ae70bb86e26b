"""Tokens from a kernelized model at a constant cost each; on a GPU the whole step is one CUDA graph.

A step reads the last token, picks the next one on the device, and puts it where the next step finds it. The host only
replays the step, and fetches what was written a block of tokens later: it never waits for a single token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import Cache

from .compiled import compiled_layers
from .errors import InputError, first_line
from .runtime.cache import CACHE, kernel_layers
from .runtime.modeling import KernelizedModelMixin

log = logging.getLogger("kernelize")

BLOCK = 16  # tokens between two looks of the host at what was written
# tokens of all prompts that are read at once: bounds the memory; a GPU waits for the host between small chunks
CHUNK = {"cpu": 8192}
CHUNK_ELSEWHERE = 32768
WARM_UPS = 2  # steps before a capture: kernels compile, libraries allocate
HOST_ROPES = ("dynamic", "longrope")  # their frequencies are chosen on the host, by the length
# settings of a generation_config that change what is written, and that `Decoder` does not know
FOREIGN = (
    "repetition_penalty", "no_repeat_ngram_size", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "min_length", "min_new_tokens", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
    "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "guidance_scale", "num_beams",
    "stop_strings", "max_time", "watermarking_config", "prompt_lookup_num_tokens",
)  # fmt: skip
NEUTRAL = (None, 0, 1, False)


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked. Temperature 0 takes the likeliest; top_k 0 and top_p 1 leave all in the race."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name, fits, allowed in (
            ("temperature", self.temperature >= 0, "0 or above"),
            ("top_k", self.top_k >= 0, "0 (all) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
        ):
            if not fits:
                raise InputError(f"{name}={getattr(self, name)} is not allowed: {allowed}")

    def pick(self, logits: Tensor) -> Tensor:
        """logits [B, V] -> tokens [B], without a look of the host (torch.multinomial takes one)."""
        if not self.temperature:
            return logits.argmax(-1)
        scores = logits.float()
        for warp in self._warpers():
            scores = warp(None, scores)
        return (scores.softmax(-1) / torch.empty_like(scores).exponential_()).argmax(-1)

    def _warpers(self) -> list[Any]:
        limits: list[Any] = [TopKLogitsWarper(self.top_k)] if self.top_k else []
        limits += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
        return [TemperatureLogitsWarper(float(self.temperature)), *limits]


def refused(model: Any) -> str | None:
    """Why `Decoder` cannot write for this model as `model.generate` does, or None."""
    if not isinstance(model, KernelizedModelMixin):
        return "the model is not kernelized"
    config: Any = model.config
    kept = sorted(set(range(config.num_hidden_layers)) - set(model.converted))
    if kept:
        return f"layer {kept[0]} keeps softmax attention, which the decoder does not support"
    asked = model.generation_config.to_dict()  # type: ignore[attr-defined]
    others = [name for name in FOREIGN if asked.get(name) not in NEUTRAL]
    return f"generation_config sets {others[0]}={asked[others[0]]!r}" if others else None


def uncapturable(model: Any) -> str | None:
    """Why a step of this model cannot be a CUDA graph, or None."""
    if model.device.type != "cuda":
        return f"the model is on {model.device.type}, not on a GPU"
    rope = (model.config.to_dict().get("rope_parameters") or {}).get("rope_type")
    return f"rope_type={rope!r} asks the host for the length" if rope in HOST_ROPES else None


@torch.no_grad()
def prefill(
    model: Any, ids: Tensor, mask: Tensor | None = None, chunk: int | None = None
) -> tuple[Cache, Tensor, Tensor]:
    """(cache, logits [B, V] of the next token, tokens read [B]) of ids [B, T], `chunk` tokens of each at a time.

    `mask` [B, T] is 0 at padding, which stands on the left; InputError where it does not.
    """
    if mask is not None and not bool(mask[:, -1].all()):
        raise InputError("a padded batch must be padded on the left: the last token of a row is padding")
    if mask is not None and bool(mask.all()):
        mask = None
    cache, (rows, T) = DynamicCache(config=model.config), ids.shape
    chunk = chunk or max(1, CHUNK.get(ids.device.type, CHUNK_ELSEWHERE) // rows)
    positions = torch.arange(T, device=ids.device).expand_as(ids) if mask is None else mask.cumsum(1) - 1
    for start in range(0, T, chunk):
        end = min(start + chunk, T)
        logits = model(
            input_ids=ids[:, start:end],
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=positions[:, start:end].clamp(min=0),
            **{CACHE: cache},
            use_cache=True,
            logits_to_keep=1,
        ).logits
    return cache, logits[:, -1], positions[:, -1] + 1


class Step:
    """One token for every row, in tensors that stay where they are; `run` is the step or its CUDA graph."""

    def __init__(self, model: Any, cache: Cache, rows: int, sampling: Sampling, eos: list[int], pad: int):
        self.model, self.cache, self.sampling = model, cache, sampling
        new = {"dtype": torch.int64, "device": model.device}
        self.token = torch.zeros(rows, 1, **new)  # the last one written
        self.position = torch.zeros(rows, 1, **new)  # of `token`
        self.count = torch.zeros(1, **new)  # tokens written since `fetch`
        self.written = torch.zeros(rows, BLOCK, **new)
        self.done = torch.zeros(rows, dtype=torch.bool, device=model.device)
        self.eos, self.pad = torch.tensor(eos, **new), torch.tensor(pad, **new)
        self.run: Callable[[], None] = self.once
        for layer in kernel_layers(cache):
            layer.hold()

    def begin(self, cache: Cache, logits: Tensor, read: Tensor) -> None:
        """Takes over what `prefill` gives, and picks the first token."""
        if cache is not self.cache:
            for mine, theirs in zip(kernel_layers(self.cache), kernel_layers(cache), strict=True):
                mine.overwrite(theirs)
        self.count.zero_()
        self.done.zero_()
        self.position.copy_(read[:, None] - 1)
        self.put(logits)

    def once(self) -> None:
        """The model on the last token, and the pick of the next."""
        out = self.model(
            input_ids=self.token, position_ids=self.position, use_cache=True, **{CACHE: self.cache}
        )  # fmt: skip
        self.put(out.logits[:, -1])

    def put(self, logits: Tensor) -> None:  # [B, V]
        token = torch.where(self.done, self.pad, self.sampling.pick(logits))
        self.done |= (token[:, None] == self.eos).any(1)
        self.written.index_copy_(1, self.count, token[:, None])
        self.token.copy_(token[:, None])
        self.position += 1
        self.count.copy_((self.count + 1) % BLOCK)

    def capture(self, compiled: bool = False) -> None:
        """Makes `run` a CUDA graph, with `compiled` of fused layers (which takes a minute).

        RuntimeError of torch where the model asks the host for something, or cannot be compiled; the step then is as it
        was.
        """
        tuned = self.token.shape[0] == 1
        with compiled_layers(self.model, tuned=tuned) if compiled else nullcontext():
            self._capture()

    def _capture(self) -> None:
        mine = (self.token, self.position, self.count, self.written, self.done)
        before, states = [x.clone() for x in mine], [layer.snapshot() for layer in kernel_layers(self.cache)]

        def restore() -> None:
            for x, old in zip(mine, before, strict=True):
                x.copy_(old)
            for layer, (state, length) in zip(kernel_layers(self.cache), states, strict=True):
                layer.put_back(state, length)

        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self.once()
            torch.cuda.current_stream().wait_stream(stream)
            restore()
            # a capture that fails would leave its own stream the current one
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, stream=stream):
                self.once()
        finally:  # what was tried has moved the state on, to wherever it came
            torch.cuda.current_stream().wait_stream(stream)
            restore()
        self.run = graph.replay

    def fetch(self, n: int) -> Callable[[], Tensor]:
        """Begins to copy the last `n` tokens [B, n] to the host; the call that comes back waits for them."""
        if self.written.device.type != "cuda":
            kept = self.written[:, :n].clone()
            return lambda: kept
        copy = torch.empty(self.written.shape, dtype=torch.int64, pin_memory=True)
        copy.copy_(self.written, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def wait() -> Tensor:
            arrived.synchronize()
            return copy[:, :n]

        return wait


class Decoder:
    """Writes for prompts, one batch after the other; a graph is captured once for each number of rows.

    With `compiled` torch.compile fuses the graph's layers, which takes a minute. InputError for a model that `refused`
    names, or where there is no graph to compile. Where a step cannot be captured, `eager` says why.
    """

    def __init__(self, model: Any, sampling: Sampling | None = None, *, graph: bool = True, compiled: bool = False):
        if reason := refused(model):
            raise InputError(f"the decoder does not serve this model: {reason}")
        self.model, self.sampling = model, sampling or Sampling()
        self.eager = uncapturable(model) if graph else "no graph was asked for"
        if compiled and self.eager:
            raise InputError(f"nothing to compile, the step is no CUDA graph: {self.eager}")
        self.compiled = compiled
        eos = model.generation_config.eos_token_id
        self.eos = [eos] if isinstance(eos, int) else list(eos or [])
        pad = model.generation_config.pad_token_id
        self.pad = pad if pad is not None else (self.eos or [0])[0]
        self.steps: dict[int, Step] = {}

    @torch.no_grad()
    def write(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        on_tokens: Callable[[Tensor], None] = lambda tokens: None,
    ) -> Tensor:
        """Tokens [B, N] on the host that follow ids [B, T]; a row that has ended goes on with padding.

        `on_tokens` gets them block by block [B, n] while they are written.
        """
        ended = torch.zeros(ids.shape[0], dtype=torch.bool)
        parts: list[Tensor] = []

        def take(waiting: Callable[[], Tensor]) -> bool:
            """Hands over a block; whether every row has ended."""
            tokens = waiting()
            ended.logical_or_(torch.isin(tokens, torch.tensor(self.eos, dtype=torch.int64)).any(1))
            parts.append(tokens)
            on_tokens(tokens)
            return bool(ended.all())

        before = None
        for waiting in self._blocks(self.start(*prefill(self.model, ids, mask)), max_new_tokens):
            if before is not None and take(before):  # while the next block is written
                return torch.cat(parts, 1)
            before = waiting
        if before is not None:
            take(before)
        return torch.cat(parts, 1)

    def _blocks(self, step: Step, tokens: int) -> Iterator[Callable[[], Tensor]]:
        for start in range(0, tokens, BLOCK):
            n = min(BLOCK, tokens - start)
            for _ in range(n - (start == 0)):  # the prompt has given the first one
                step.run()
            yield step.fetch(n)

    def start(self, cache: Cache, logits: Tensor, read: Tensor) -> Step:
        """The step that goes on after what `prefill` gives."""
        rows = logits.shape[0]
        if rows in self.steps:
            self.steps[rows].begin(cache, logits, read)
            return self.steps[rows]
        step = Step(self.model, cache, rows, self.sampling, self.eos, self.pad)
        step.begin(cache, logits, read)
        if self.eager is None and self.compiled:
            self.compiled = self._captured(step, True, "decoding without torch.compile") is None
        if self.eager is None and not self.compiled:
            self.eager = self._captured(step, False, "decoding without a CUDA graph")
        self.steps[rows] = step
        return step

    @staticmethod
    def _captured(step: Step, compiled: bool, otherwise: str) -> str | None:
        """Makes the step's graph; why it could not, which the log says, too."""
        try:
            step.capture(compiled)
        except RuntimeError as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            log.warning("%s: %s", otherwise, reason)
            return reason
        return None
