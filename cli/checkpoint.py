"""plan, convert, info, list: what is, and what would become, of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .inspection import SIZES, auto_recipe, show_measured
from .options import (
    Device,
    DType,
    Json,
    KernelFlags,
    Overwrite,
    Revision,
    Source,
    Trust,
    Written,
    only_with,
    with_kernel_flags,
)
from .output import followed, say, show_plan, show_predictions, table, typed, write_json
from .progress import Progress

if TYPE_CHECKING:
    from kernelize.recipe import Recipe

Lengths = Annotated[str, typer.Option(help="Lengths in tokens for the cost table.")]
LENGTHS = "512,2k,8k,32k,128k"


@with_kernel_flags
def plan(
    source: Source,
    kernel: KernelFlags,
    lengths: Lengths = LENGTHS,
    output: Written = None,
    machine: Annotated[
        str | None, typer.Option(help="Predict the training too, on rtx4090, a100, h100 or h200.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="With --machine: how many of them, by default 1.")
    ] = None,
    engine: Annotated[
        Literal["ddp", "fsdp2", "zero3"] | None,
        typer.Option(help="With --machine: whole models (ddp, the default), or sharded."),
    ] = None,
    dtype: DType = None,
    device: Device = None,
    revision: Revision = None,
    trust: Trust = False,
    json: Json = None,
) -> None:
    """Show what would become of each layer, and its cost.

    Needs the config alone, no weights, but for --keep auto:N: that measures, for minutes.
    """
    from kernelize.evaluate import parse_lengths
    from kernelize.files import write_file
    from kernelize.pipeline import check_machine, plan_source, predict_stages

    if machine is None:
        only_with("--machine", {"--processes": processes, "--engine": engine})
    else:
        check_machine(machine)
    where: dict[str, Any] = {"processes": processes or 1, "engine": engine or "ddp"}
    with Progress("layers") as progress:
        recipe, report = plan_source(
            source,
            kernel.recipe,
            lengths=parse_lengths(lengths),
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust,
            on_progress=progress,
        )
    show_kept(recipe)
    show_plan(report)
    found = []
    if machine is not None:
        loading: dict[str, Any] = {"revision": revision, "trust_remote_code": trust}
        found = predict_stages(source, recipe, machine, **where, **loading)
        show_predictions(found, f"{where['processes']} x {machine}, {where['engine']}")
    if output is not None:
        write_file(followed(output), recipe.to_yaml())
        say(f"wrote {output}; next: kernelize convert {typed(source)} --config {typed(output)}")
    predicted = {"predictions": [prediction.to_dict() for prediction in found]}
    write_json(json, {**report.to_dict(), "keep_costs": recipe.keep_costs, **(predicted if found else {})})


def show_kept(recipe: Recipe) -> None:
    """What a recipe that chose its softmax layers found."""
    if recipe.keep_costs:
        costs = sorted(recipe.keep_costs.items(), key=lambda item: -item[1])
        head = ("layer", "nats an answer's token", "")
        rows = ((layer, f"{cost:.4f}", "softmax" if int(layer) in recipe.keep else "") for layer, cost in costs)
        table("What replacing a layer costs in retrieval", head, rows, left=(0, 2))


def _check_spec(spec: str | None, state_bytes: int | None, stream: bool, kernel: KernelFlags) -> None:
    """Refuses options that another one would leave without effect."""
    if spec is None and state_bytes is not None:
        raise typer.BadParameter("--state-bytes is what --spec auto may spend; alone it does nothing")
    if spec and stream:
        raise typer.BadParameter(
            f"--spec {spec} inspects the model in memory, and --stream is for those that do not fit"
        )
    if spec and kernel.options:
        raise typer.BadParameter(
            f"--spec {spec} chooses recipe and kernels itself; leave out {next(iter(kernel.options))}"
        )


def _stretched(make: Callable[[int], Recipe], context: int, layers: int) -> Recipe:
    return make(layers).model_copy(update={"context": context})


@with_kernel_flags
def convert(
    source: Source,
    kernel: KernelFlags,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the checkpoint.")] = Path("out"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the plan; the same as `plan`.")] = False,
    spec: Annotated[
        Literal["auto"] | None, typer.Option(help="auto: inspect the model, and choose map and slots by layer.")
    ] = None,
    state_bytes: Annotated[int | None, typer.Option(min=1, help="With --spec auto: bytes a sequence may hold.")] = None,
    context: Annotated[
        str | None, typer.Option(help="Stretch rotary positions to so many tokens, such as 64k (YaRN).")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read weights from their files a layer at a time: in little memory.")
    ] = False,
    overwrite: Overwrite = False,
    dtype: DType = None,
    device: Device = None,
    revision: Revision = None,
    trust: Trust = False,
    json: Json = None,
) -> None:
    """Convert a model by a plan, and save it.

    The new parameters start from the model's own statistics on a sample text.
    """
    from kernelize.evaluate import parse_length
    from kernelize.files import check_output
    from kernelize.pipeline import convert_source, plan_source, streamable

    if not dry_run:
        check_output(output, overwrite)
    loading: dict[str, Any] = {"revision": revision, "trust_remote_code": trust}
    make: Callable[[int], Recipe] = kernel.recipe
    _check_spec(spec, state_bytes, stream, kernel)
    if spec == "auto":
        inspected = auto_recipe(source, state_bytes, dtype=dtype, device=device, **loading)
        make = partial(lambda found, layers: found, inspected)
    if context is not None:
        make = partial(_stretched, make, parse_length(context))
    if stream:
        make = partial(streamable, make)
    with Progress("layers") as progress:
        recipe, report = plan_source(source, make, dtype=dtype, device=device, on_progress=progress, **loading)
    show_kept(recipe)
    if not dry_run:
        typer.echo(f"converting {source} …", err=True)
        with Progress("readings") as progress:
            report = convert_source(
                source, lambda layers: recipe, output, overwrite=overwrite, stream=stream, dtype=dtype,
                device=device, on_progress=progress, **loading,
            )  # fmt: skip
    show_plan(report)
    say("dry run: nothing was written" if dry_run else f"wrote {output}; next: kernelize check {typed(output)}")
    write_json(json, {**report.to_dict(), "keep_costs": recipe.keep_costs})


def info(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A kernelized checkpoint.")], json: Json = None
) -> None:
    """Show a checkpoint's origin, plan and measured quality."""
    from kernelize.card import read_config, read_facts
    from kernelize.plan import ConversionPlan
    from kernelize.runtime.ops import describe

    facts = read_facts(folder)
    show_plan(facts.cost)
    for how in dict.fromkeys(
        map(describe, ConversionPlan.from_dict(read_config(folder)["kernelize"]).converted.values())
    ):
        say(f"prefill and training run on {how}")
    origin = facts.source.name if facts.source else "not recorded"
    trained = "not recorded" if facts.tokens is None else f"{facts.tokens:,}"
    say(f"made from {origin}; tokens trained: {trained}; {len(facts.rows)} measured values")
    write_json(json, {"name": facts.name, "source": origin, "tokens": facts.tokens, "plan": facts.cost.to_dict(),
                      "rows": list(facts.rows), "commands": list(facts.commands)})  # fmt: skip


def list_(
    families: Annotated[bool, typer.Option("--families", help="Only the model families.")] = False,
    measure: Annotated[str | None, typer.Option(help="Measure every map on this model's queries and keys.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers to measure, e.g. 3,11,18.")] = None,
    maps: Annotated[list[str] | None, typer.Option("--map", help="Only these maps; may be repeated.")] = None,
    sizes: Annotated[
        list[int] | None, typer.Option("--size", help="Features a head, by default 32 and 128; may be repeated.")
    ] = None,
    device: Device = None,
    json: Json = None,
) -> None:
    """List maps, rules, model families and recipes."""
    from kernelize.catalogue import catalogue
    from kernelize.plan import parse_layers

    if measure is None:
        only_with("--measure", {"--layers": layers, "--map": maps, "--size": sizes, "--device": device})
    else:
        if families:
            raise typer.BadParameter("--families lists, and --measure measures; leave out one of them")
        chosen = parse_layers(layers) if layers else None
        show_measured(measure, sizes or SIZES, layers=chosen, maps=maps or None, json=json, device=device)
        return
    groups = {name: group for name, group in catalogue().items() if not families or name == "model families"}
    for group, entries in groups.items():
        table(group, ("name", "what"), entries.items(), left=(0, 1))
    write_json(json, groups)
