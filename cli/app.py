"""The Typer application, and what an error becomes: one line on stderr and an exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from kernelize.errors import KernelizeError
from kernelize.runtime.spec import SpecError

from . import (
    benchmark,
    checkpoint,
    demonstration,
    evaluation,
    exporting,
    generation,
    inspection,
    publication,
    quantization,
    serving,
    training,
)
from .codes import BAD_INPUT, FAILURE, INTERRUPTED

DEBUG = "--debug"
CHATTY = ("torchao", "torch.utils._pytree")  # at import torchao lists the GPU libraries that a CPU has no use for

app = typer.Typer(
    help="Replace softmax attention of a pretrained decoder by kernelized attention: linear time, constant state.",
    epilog="kernelize COMMAND --help explains a command. Exit codes: 0 done, 1 failure, 2 bad input, 130 interrupted.",
    add_completion=False,
    rich_markup_mode=None,
)
for command in (
    checkpoint.plan,
    inspection.inspect,
    checkpoint.convert,
    training.finetune,
    evaluation.evaluate,
    evaluation.check,
    evaluation.audit,
    evaluation.overlap,
    benchmark.bench,
    generation.generate,
    serving.serve,
    quantization.quantize,
    exporting.export,
    publication.push,
    checkpoint.info,
    evaluation.report,
    checkpoint.list_,
    demonstration.demo,
):
    app.command(command.__name__.strip("_"))(command)


def _version(wanted: bool) -> None:
    if wanted:
        from kernelize import __version__

        typer.echo(f"kernelize {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code. `--debug` may stand before or after the command's name."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not sys.stderr.isatty():  # Transformers' own bars are for terminals
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        code = app([a for a in given if a != DEBUG], prog_name="kernelize", standalone_mode=False) or 0
    except Exception as error:
        if DEBUG in given:
            traceback.print_exc()
        return report_error(error)
    if code == INTERRUPTED:  # Typer turns Ctrl-C into this code, and says nothing
        typer.echo("interrupted", err=True)
    return code


def report_error(error: BaseException) -> int:
    """Prints one line about `error`; the exit code for it."""
    if isinstance(error, typer.TyperException):
        message, code = error.format_message(), error.exit_code
    elif isinstance(error, KernelizeError):
        message, code = str(error), error.exit_code
    elif isinstance(error, SpecError):
        message, code = str(error), BAD_INPUT
    else:
        message, code = f"{type(error).__name__}: {error} ({DEBUG} shows the traceback)", FAILURE
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return code
