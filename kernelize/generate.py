"""Text from a model, handed over piece by piece while it is written."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

from transformers import TextStreamer, set_seed
from transformers.cache_utils import Cache

from .errors import InputError
from .states import generate_from, read


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
    temperature 0 takes the likeliest token. Raises InputError for numbers out of range, an empty prompt, and `chat`
    with a model that has no chat template.
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        chat: bool = False,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        state: Cache | None = None,
        on_text: Callable[[str], None] = lambda text: None,
    ):
        if max_new_tokens < 1 or temperature < 0:
            raise InputError(f"max_new_tokens={max_new_tokens} is below 1, or temperature={temperature} below 0")
        if chat and not tokenizer.chat_template:
            raise InputError("the model has no chat template; leave out --chat")
        self.model, self.tokenizer, self.chat, self.on_text = model, tokenizer, chat, on_text
        self.state = state
        self.messages: list[dict[str, str]] = []
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        self.settings = {**sampling, "max_new_tokens": max_new_tokens, "pad_token_id": pad}
        set_seed(seed)

    def answer(self, prompt: str) -> Completion:
        """Streams the continuation to `on_text` and returns it whole."""
        if not prompt.strip():
            raise InputError("the prompt is empty")
        inputs = self._encode(prompt).to(self.model.device)
        start, asked = time.monotonic(), inputs["input_ids"].shape[1]
        streamer = _Streamer(self.tokenizer, self.on_text)
        written = self._write(inputs, streamer)  # [T]
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": text})
        return Completion(prompt, text, asked, len(written), time.monotonic() - start)

    def _write(self, inputs, streamer: TextStreamer):
        ids = inputs["input_ids"]
        if self.state is None:
            return self.model.generate(**inputs, **self.settings, streamer=streamer)[0, ids.shape[1] :]
        return generate_from(self.model, copy.deepcopy(self.state), ids, **self.settings, streamer=streamer)[0]

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
    if not text.strip():
        raise InputError("the prompt is empty")
    begins = after is None
    return tokenizer(text, return_tensors="pt", return_token_type_ids=False, add_special_tokens=begins)


def read_text(model, tokenizer, text: str, after: Cache | None = None) -> tuple[Cache, int]:
    """What the model remembers of `text`, read `after` what it read before; and how many tokens that was."""
    ids = encode(tokenizer, text, after)["input_ids"]
    return read(model, ids, after=after), ids.shape[1]
