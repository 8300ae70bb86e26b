"""Text from a model, handed over piece by piece while it is written."""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import TextStreamer, set_seed
from transformers.cache_utils import Cache

from .decode import Decoder, Sampling, refused
from .errors import InputError
from .states import generate_from, read
from .subject import check_learned
from .texts import unbroken

log = logging.getLogger("kernelize")


@dataclass(frozen=True)
class Completion:
    """What was asked and written, and how long it took."""

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float


class _Streamer(TextStreamer):
    """Hands each finished piece of text to `on_text`."""

    def __init__(self, tokenizer, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)


class Conversation:
    """Answers prompts: each for itself, or with `chat` as turns of one conversation in the tokenizer's template.

    With `state` each prompt, or the conversation, goes on from what that cache has read, which stays as it is.
    temperature 0 takes the likeliest token; top_p None is what the checkpoint says. On a GPU a kernelized model writes
    through `Decoder`, where that can, its step `compiled` if asked for; `generate` serves the rest. Raises InputError
    for numbers out of range, a prompt that is empty or, with what may follow, beyond learned positions, `chat` with a
    model that has no chat template, and `compiled` where no `Decoder` writes.
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        chat: bool = False,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float | None = None,
        seed: int = 0,
        state: Cache | None = None,
        compiled: bool = False,
        on_text: Callable[[str], None] = lambda text: None,
    ):
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens} is below 1")
        top_p = (model.generation_config.top_p or 1.0) if top_p is None else top_p
        sampling = Sampling(temperature, top_k, top_p)
        if chat and not tokenizer.chat_template:
            raise InputError("the model has no chat template; leave out --chat")
        self.model, self.tokenizer, self.chat, self.on_text = model, tokenizer, chat, on_text
        self.state = state
        self.messages: list[dict[str, str]] = []
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        chosen = {"do_sample": True, **dataclasses.asdict(sampling)} if temperature else {"do_sample": False}
        self.settings = {**chosen, "max_new_tokens": max_new_tokens, "pad_token_id": pad}
        if compiled and state is not None:
            raise InputError("--compile is for prompts that are read from their beginning; leave out --load-state")
        self.decoder = decoder_for(model, sampling, compiled)
        set_seed(seed)

    def answer(self, prompt: str) -> Completion:
        """Streams the continuation to `on_text` and returns it whole."""
        if not unbroken(prompt, "the prompt").strip():
            raise InputError("the prompt is empty")
        inputs = self._encode(prompt).to(self.model.device)
        start, asked = time.monotonic(), inputs["input_ids"].shape[1]
        check_room(self.model, self.state, asked + self.settings["max_new_tokens"])
        streamer = _Streamer(self.tokenizer, self.on_text)
        written = self._write(inputs, streamer)  # [T]
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": text})
        return Completion(prompt, text, asked, len(written), time.monotonic() - start)

    def _write(self, inputs, streamer: TextStreamer) -> Tensor:
        """The tokens [T] that follow, which `streamer` has seen."""
        ids = inputs["input_ids"]
        if self.state is not None:
            return generate_from(self.model, copy.deepcopy(self.state), ids, **self.settings, streamer=streamer)[0]
        if self.decoder is None:
            return self.model.generate(**inputs, **self.settings, streamer=streamer)[0, ids.shape[1] :]
        streamer.put(ids)

        def hand_over(tokens: Tensor) -> None:  # [1, n]
            streamer.put(self._until_end(tokens[0]))

        count = self.settings["max_new_tokens"]
        written = self.decoder.write(ids, inputs.get("attention_mask"), max_new_tokens=count, on_tokens=hand_over)
        streamer.end()
        return self._until_end(written[0])

    def _until_end(self, tokens: Tensor) -> Tensor:
        """tokens [T] up to the first that ends a text, included."""
        assert self.decoder is not None
        ends = torch.isin(tokens, torch.tensor(self.decoder.eos, dtype=tokens.dtype)).nonzero()
        return tokens[: int(ends[0]) + 1] if len(ends) else tokens

    def _encode(self, prompt: str):
        """input_ids and attention_mask [1, T]."""
        if not self.chat:
            return encode(self.tokenizer, prompt, self.state)
        self.messages.append({"role": "user", "content": prompt})
        return self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )


def encode(tokenizer, text: str, after: Cache | None = None):
    """input_ids and attention_mask [1, T] of a text, or of what comes `after` its beginning; InputError if empty."""
    if not unbroken(text, "the prompt").strip():
        raise InputError("the prompt is empty")
    begins = after is None
    return tokenizer(text, return_tensors="pt", return_token_type_ids=False, add_special_tokens=begins)


def check_room(model, after: Cache | None, tokens: int) -> None:
    """InputError where so many tokens, `after` those of a cache, are more than the model's learned positions."""
    before = 0 if after is None else int(after.get_seq_length())
    check_learned(model, Path(model.name_or_path).name or model.config.model_type, before + tokens)


def read_text(model, tokenizer, text: str, after: Cache | None = None) -> tuple[Cache, int]:
    """What the model remembers of `text`, read `after` what it read before; and how many tokens that was."""
    ids = encode(tokenizer, text, after)["input_ids"]
    check_room(model, after, ids.shape[1])
    return read(model, ids, after=after), ids.shape[1]


def decoder_for(model, sampling: Sampling, compiled: bool = False) -> Decoder | None:
    """The decoder where it gains something: on a GPU. The log says why a kernelized model there goes without."""
    if compiled:
        return Decoder(model, sampling, compiled=True)
    if model.device.type != "cuda":
        return None
    if reason := refused(model):
        log.warning("decoding through generate, without a CUDA graph: %s", reason)
        return None
    return Decoder(model, sampling)
