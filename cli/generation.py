"""generate: text from a checkpoint, streamed to stdout."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from kernelize.units import data_size

from .options import Device, DType, Json, Revision, Source, Trust, in_a_folder, only_with
from .output import say, stream, write_json
from .progress import doing

PROMPT_MARK = "> "
LAST_SEED = 2**32 - 1  # that NumPy takes
SaveState = Annotated[
    Path | None,
    typer.Option(metavar="FILE", callback=in_a_folder, help="Read the prompt, write what is remembered of it to FILE."),
]
LoadState = Annotated[Path | None, typer.Option(metavar="FILE", help="Go on from what --save-state has written.")]


def generate(
    source: Source,
    prompt: Annotated[str | None, typer.Argument(help="Text to go on from; by default stdin.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template; on a terminal, converse.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Sample from so many likeliest tokens; by default, or 0: from all.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the likeliest tokens that make up this share; by default all.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=LAST_SEED, help="Of the sampling; by default 0.")] = None,
    save_state: SaveState = None,
    load_state: LoadState = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="On a GPU: let torch.compile fuse the step first, which takes a minute.")
    ] = False,
    device: Device = None,
    dtype: DType = None,
    revision: Revision = None,
    trust: Trust = False,
    json: Json = None,
) -> None:
    """Continue a prompt, or converse.

    With any causal LM, kernelized or not. A kernelized one can read a document once (--save-state) and answer many
    questions about it (--load-state) at the cost of the question.
    """
    from kernelize import states
    from kernelize.errors import InputError
    from kernelize.generate import Conversation
    from kernelize.pipeline import load_for_use

    if not temperature:
        only_with("a --temperature above 0", {"--top-k": top_k, "--top-p": top_p, "--seed": seed})
    if compiled and save_state is not None:
        raise InputError("--save-state writes no tokens; leave out --compile")
    if chat and save_state is not None:
        raise InputError("--save-state reads plain text; leave out --chat, or give it with --load-state")
    with doing(f"loading {source}"):
        model, tokenizer = load_for_use(source, device=device, dtype=dtype, revision=revision, trust_remote_code=trust)
    if save_state is not None:
        states.check_savable(model)
    before = None if load_state is None else states.load_state(load_state, model)
    if save_state is not None:
        text = sys.stdin.read() if prompt is None else prompt
        read_document(model, tokenizer, text, before, save_state, json)
        return
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed or 0}
    settings |= {"top_k": top_k or 0, "top_p": top_p, "compiled": compiled}
    talk = Conversation(model, tokenizer, chat=chat, on_text=stream, state=before, **settings)
    done = []
    for text in [prompt] if prompt is not None else _prompts(chat):
        done.append(talk.answer(text))
        stream("\n")
    write_json(json, [dataclasses.asdict(completion) for completion in done])


def read_document(model, tokenizer, text: str, before, path: Path, json: Path | None) -> None:
    """What `--save-state` does: reads, goes on from the state `before` if there is one, and writes nothing but it."""
    from kernelize.generate import read_text
    from kernelize.states import save_state

    with doing("reading"):
        cache, tokens = read_text(model, tokenizer, text, before)
    written = save_state(cache, path, model).stat().st_size
    say(f"read {tokens:,} tokens; wrote {path}, {data_size(written)}")
    write_json(json, {"state": str(path), "tokens": tokens, "bytes": written})


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
