"""demo: the whole job on a small real checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .evaluation import show_checks
from .options import SOURCE_HELP, Json, Overwrite
from .output import say, show_plan, stream, table, typed, write_json
from .progress import Progress, TrainingProgress

NEXT = """\
Wrote {output}, an ordinary checkpoint, and {report}. What to do next:
  kernelize generate {typed} --chat            talk to it
  kernelize info {typed}                       plan, training and measured quality
  kernelize push {typed} NAME --dry-run        what would go to the Hub
  kernelize convert SOURCE -o out               your own model: a Hub id, a folder or a .gguf file
  kernelize finetune out -o tuned --teacher SOURCE --data FILE   and your own text, for as long as you like"""


def demo(
    source: Annotated[str | None, typer.Option(help=f"{SOURCE_HELP} By default SmolLM2-135M-Instruct.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoint and report.")] = Path(
        "demo-out"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Two training steps a stage, short texts.")] = False,
    overwrite: Overwrite = False,
    json: Json = None,
) -> None:
    """Do the whole job on a small real model, in minutes on a CPU."""
    from kernelize.demo import Listener, run, summary
    from kernelize.errors import KernelizeError

    with (
        Progress("readings") as converting,
        TrainingProgress() as training,
        Progress() as measuring,
        Progress("checks") as checking,
    ):
        listener = Listener(
            lambda step: say(f"▸ {step}"), show_plan, converting, training.event, measuring, checking, stream
        )
        result = run(output, source, quick=quick, overwrite=overwrite, listener=listener)
    say("")
    show_checks(result.checks)
    table("Result", *summary(result.rows))
    say(NEXT.format(output=result.output, report=result.report, typed=typed(result.output)))
    write_json(json, dataclasses.asdict(result))
    if failed := [row.name for row in result.checks if row.failed]:
        raise KernelizeError(f"checks failed: {', '.join(failed)}")
