"""push: a checkpoint to the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from kernelize.units import data_size

from .options import Json
from .output import say, table, write_json
from .progress import doing


def push(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A kernelized checkpoint.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="NAME or OWNER/NAME on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made if it is missing.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Verify, and show what would be sent.")] = False,
    json: Json = None,
) -> None:
    """Verify a checkpoint and upload it to the Hub.

    It is reloaded in a clean process and compared before anything is sent, as one commit. Sub-folders int8, int4, onnx,
    onnx-fp16, onnx-int8-float, onnx-int8, onnx-int4 and executorch go with it.
    """
    from kernelize.hub import push as push_folder

    with doing(f"verifying {folder}") if dry_run else doing(f"verifying and sending {folder}"):
        sent = push_folder(folder, repo_id, private=private, revision=revision, dry_run=dry_run, on_progress=say)
    lines = ((file.path, data_size(file.size), file.sha256[:12]) for file in sent.files)
    table(f"Files, {data_size(sent.size)} in all", ("file", "size", "sha256"), lines)
    say(f"reloaded without kernelize: logits differ by {sent.verified.difference:.1e}")
    say("dry run: nothing was sent" if dry_run else f"sent as {sent.commit} to {sent.url}")
    write_json(json, dataclasses.asdict(sent))
