"""finetune: the recipe's stages."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .codes import INTERRUPTED
from .options import DType, Json, Overwrite, Source
from .output import say, typed, write_json
from .progress import TrainingProgress

Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Text for all stages: a file, dataset, sample or self; may be repeated. Tasks of retrieval, if the recipe "
        "has any, are hidden in the files; with retrieval among the names nothing else is read than they say."
    ),
]


def finetune(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the result.")],
    config: Annotated[str, typer.Option(help="Recipe: a .yaml file or a name from `kernelize list`.")] = "default",
    teacher: Annotated[str | None, typer.Option(help="The original model, for stages that distil from it.")] = None,
    data: Data = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens a sequence, in all stages; a batch is as many whole ones as it has room for."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens to train on, in each stage: rounded up to whole steps of the recipe's batch_tokens."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of data order and dropout.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the same run into --output stopped.")] = False,
    overwrite: Overwrite = False,
    dtype: DType = None,
    json: Json = None,
) -> None:
    """Train a converted checkpoint by a recipe's stages.

    SOURCE is what `convert` or an earlier `finetune` wrote.
    """
    from kernelize.pipeline import finetune_source, override_stages
    from kernelize.recipe import load_recipe

    changes = {"data": data, "sequence_length": sequence_length, "tokens": tokens}
    recipe = override_stages(load_recipe(config), seed=seed, **changes)
    with TrainingProgress() as progress:
        result = finetune_source(
            source,
            recipe,
            output,
            teacher=teacher,
            resume=resume,
            overwrite=overwrite,
            dtype=dtype,
            on_event=progress.event,
        )
    write_json(json, dataclasses.asdict(result))
    if not result.completed:
        instead = " in place of --overwrite" if overwrite else ""
        say(f"stopped early; the same command with --resume{instead} goes on, from {output}")
        raise typer.Exit(INTERRUPTED)
    say(f"wrote {output}; next: kernelize evaluate {typed(output)} --teacher SOURCE --card")
