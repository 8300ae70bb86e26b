"""quantize: int8 or int4 weights of a converted checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kernelize.units import data_size

from .options import Device, DType, Json, Overwrite
from .output import say, typed, write_json
from .progress import Progress


def quantize(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A kernelized checkpoint.")],
    bits: Annotated[int, typer.Option(help="8, or 4: sixteen levels in groups of 32.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the quantised checkpoint.")],
    text: Annotated[str | None, typer.Option(help="Text to measure on: .txt, .txt.xz, .jsonl, or a sample.")] = None,
    pieces: Annotated[int | None, typer.Option(min=1, help="Pieces of 2,048 tokens of it; by default 2.")] = None,
    overwrite: Overwrite = False,
    device: Device = None,
    dtype: DType = None,
    json: Json = None,
) -> None:
    """Make the linear weights int8 or int4, and measure the loss.

    What kernelize added, embeddings and the state keep their precision. Needs torchao: pip install kernelize[quantize]
    """
    from kernelize.pipeline import quantize_source

    settings = {name: value for name, value in (("text", text), ("pieces", pieces)) if value is not None}
    with Progress("tokens") as progress:
        made = quantize_source(
            folder, bits, output, overwrite=overwrite, device=device, dtype=dtype, settings=settings,
            on_progress=progress,
        )  # fmt: skip
    say(f"{made.share:.0%} of {made.parameters:,} parameters are int{bits}; files: {data_size(made.bytes_before)} → "
        f"{data_size(made.bytes_after)}")  # fmt: skip
    say(f"perplexity ×{made.value('ppl_ratio'):.4f}, KL {made.value('kl'):.5f} nats a token, beside the model before")
    say(f"wrote {output}; next: kernelize push {typed(output)} NAME --dry-run")
    write_json(json, made.to_dict())
