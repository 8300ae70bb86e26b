"""export: a checkpoint as files for edge runtimes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from kernelize.units import data_size

from .options import Json, Overwrite, Revision, Trust
from .output import say, table, typed, write_json


def export(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A kernelized checkpoint: folder or Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the files.")] = Path("edge"),
    to: Annotated[str, typer.Option("--to", help="onnx or executorch.")] = "onnx",
    precision: Annotated[
        str, typer.Option(help="Of the weights: fp32; for ONNX fp16, int8-float, int8 or int4 too.")
    ] = "fp32",
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust: Trust = False,
    json: Json = None,
) -> None:
    """Write a checkpoint as graphs for ONNX Runtime, which needs no torch, or as a program (.pte) for ExecuTorch.

    They are run and compared with the checkpoint before the folder appears. `python -m kernelize.edge` runs them.
    """
    from kernelize.export import export as export_source

    done = export_source(
        source, output, to=to, precision=precision, overwrite=overwrite, on_progress=lambda what: say(f"{what} …"),
        revision=revision, trust_remote_code=trust,
    )  # fmt: skip
    table("Files", ("file", "size"), ((name, data_size(size)) for name, size in done.files.items()))
    say(f"state {data_size(done.state_bytes)} a row at any length; logits differ by {done.difference:.1e}, relatively")
    say(f"wrote {output}; next: python -m kernelize.edge {typed(output)} --prompt 'Once upon a time'")
    write_json(json, dataclasses.asdict(done))
