"""generate: text from a checkpoint, streamed to stdout."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from .options import Device, DType, Json, Revision, Source, Trust
from .output import stream, write_json
from .progress import doing

PROMPT_MARK = "> "


def generate(
    source: Source,
    prompt: Annotated[str | None, typer.Argument(help="Text to go on from; by default stdin.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template; on a terminal, converse.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from so many likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the likeliest tokens that make up this share; by default all.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Device = None,
    dtype: DType = None,
    revision: Revision = None,
    trust: Trust = False,
    json: Json = None,
) -> None:
    """Continue a prompt, or converse.

    With any causal LM, kernelized or not.
    """
    from kernelize.generate import Conversation
    from kernelize.pipeline import load_for_use

    with doing(f"loading {source}"):
        loaded = load_for_use(source, device=device, dtype=dtype, revision=revision, trust_remote_code=trust)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    settings |= {"top_k": top_k, "top_p": top_p}
    talk = Conversation(*loaded, chat=chat, on_text=stream, **settings)
    done = []
    for text in [prompt] if prompt is not None else _prompts(chat):
        done.append(talk.answer(text))
        stream("\n")
    write_json(json, [dataclasses.asdict(completion) for completion in done])


def _prompts(chat: bool) -> Iterator[str]:
    """All of stdin as one prompt; line by line until it ends in a conversation on a terminal."""
    if not (chat and sys.stdin.isatty()):
        yield sys.stdin.read()
        return
    print(f"{PROMPT_MARK}", end="", file=sys.stderr, flush=True)
    for line in sys.stdin:
        if line.strip():
            yield line.strip()
        print(f"{PROMPT_MARK}", end="", file=sys.stderr, flush=True)
