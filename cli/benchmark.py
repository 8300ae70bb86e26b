"""bench: how fast a model is beside its teacher."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from .options import Device, DType, Json, KernelFlags, Trust, only_with, with_kernel_flags
from .output import say, show, write_json
from .progress import Progress

LENGTHS = "1k,4k,16k"


@with_kernel_flags
def bench(
    kernel: KernelFlags,
    source: Annotated[str | None, typer.Argument(metavar="[SOURCE]", help="Hub id, folder, or .gguf file.")] = None,
    against: Annotated[str | None, typer.Option(help="The original model, measured in the same run.")] = None,
    shape: Annotated[str | None, typer.Option(help="Instead of a SOURCE: random weights, e.g. llama3-8b.")] = None,
    alone: Annotated[bool, typer.Option("--alone", help="With --shape: leave out the softmax model.")] = False,
    lengths: Annotated[str, typer.Option(help="Lengths in tokens, e.g. 1k,128k,1m.")] = LENGTHS,
    batch: Annotated[str, typer.Option(help="Sequences at once, e.g. 1,16.")] = "1",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode for a timing.")] = 32,
    chunk: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a prompt that are read at once; by default 8192 on a CPU, 32768 on a GPU."),
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="Also time forward and backward.")] = False,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="On a GPU: let torch.compile fuse what is around the attention of both."),
    ] = False,
    shared_prompt: Annotated[
        bool, typer.Option("--shared-prompt", help="The sequences of a batch go on from one prompt, read once.")
    ] = False,
    card: Annotated[bool, typer.Option("--card", help="Put the numbers into SOURCE's model card.")] = False,
    device: Device = None,
    dtype: DType = None,
    trust: Trust = False,
    json: Json = None,
) -> None:
    """Time reading, writing and training, beside the teacher.

    Flags of the kernel are for --shape; a SOURCE brings its own.
    """
    from kernelize.bench import Settings
    from kernelize.bench import bench as run
    from kernelize.bench import break_even as faster_from
    from kernelize.evaluate import parse_lengths
    from kernelize.pipeline import as_rows, check_card, contenders_for, keep_speed
    from kernelize.report import rows_table

    if shape is None:
        only_with("--shape", {**kernel.options, "--alone": alone or None})
    if card:
        check_card(source)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust}
    chosen = contenders_for(source, against, shape, kernel.recipe, alone=alone, **options)
    settings = Settings(parse_lengths(lengths), parse_counts(batch), tokens, chunk, train, compiled, shared_prompt)
    with Progress("cases") as progress:
        found = run(chosen, settings, progress)
    if card:
        keep_speed(str(source), found)
    show(rows_table(found.rows))
    for name, how in found.ran.items():
        say(f"{name}: {how}")
    crossings = faster_from(found.rows, chosen[0].name, "teacher") if len(chosen) > 1 else {}
    for what, length in crossings.items():
        say(f"{what}: " + (f"faster than the teacher from {length:,} tokens on" if length else "nowhere faster"))
    write_json(json, {"rows": as_rows(found.rows), "ran": found.ran, "break_even": crossings,
                      "settings": dataclasses.asdict(settings)})  # fmt: skip


def parse_counts(text: str) -> tuple[int, ...]:
    """ "1,16" → (1, 16)."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise typer.BadParameter(f"{text!r} is not a list of positive numbers such as 1,16")
    return tuple(sorted({int(part) for part in parts}))
