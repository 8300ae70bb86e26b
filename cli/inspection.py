"""inspect: what attention does in each layer, which kernel comes nearest, and the plan that follows.

Also what `list --measure` and `convert --spec auto` need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kernelize.files import write_file

from .options import Device, DType, Json, Revision, Source, Trust, Written, in_a_folder, only_with
from .output import followed, say, show, show_plan, typed, write_json
from .progress import Progress, doing

if TYPE_CHECKING:
    from kernelize.inspect import Inspection
    from kernelize.plan import ConversionPlan
    from kernelize.recipe import Recipe

Tokens = Annotated[
    int | None, typer.Option(min=256, help="Length of each text in tokens; by default 1536, if the model has them.")
]
Maps = Annotated[list[str], typer.Option("--map", help="Feature map to measure; may be repeated.")]
Sizes = Annotated[list[int], typer.Option("--size", help="Features a head to measure; may be repeated.")]
Layers = Annotated[str | None, typer.Option(help="Layers to inspect, e.g. 0,7,12-14; by default all.")]
Text = Annotated[str | None, typer.Option(help="Text to measure on: .txt, .txt.xz, .jsonl, or a sample.")]
MAPS, SIZES = ("none", "codebook"), (32, 128)


def inspect(
    source: Source,
    state_bytes: Annotated[int | None, typer.Option(help="Recommend a plan of at most so many bytes.")] = None,
    output: Written = None,
    plot: Annotated[
        Path | None, typer.Option(callback=in_a_folder, help="Draw layers and heads: .png, .pdf or .svg.")
    ] = None,
    layers: Layers = None,
    maps: Maps = list(MAPS),  # noqa: B006  Typer reads the default, nothing changes it
    sizes: Sizes = list(SIZES),  # noqa: B006
    windows: Annotated[
        list[int] | None, typer.Option("--window", help="Window to measure, by default 64; may be repeated.")
    ] = None,
    decays: Annotated[
        list[str] | None, typer.Option("--decay", help="Decay to measure, by default fixed; may be repeated.")
    ] = None,
    tokens: Tokens = None,
    text: Text = None,
    device: Device = None,
    dtype: DType = None,
    revision: Revision = None,
    trust: Trust = False,
    json: Json = None,
) -> None:
    """Show ranks, look-back and the error of kernels, layer by layer."""
    from kernelize.inspect import head_table, map_table, recommend
    from kernelize.inspect import plot as draw
    from kernelize.pipeline import load_for_use
    from kernelize.plan import describe, parse_layers

    if state_bytes is None:
        only_with("--state-bytes", {"--output": output})
    chosen = parse_layers(layers) if layers else None
    with doing(f"loading {source}"):
        loaded = load_for_use(source, device=device, dtype=dtype, revision=revision, trust_remote_code=trust)
    kernels = {"maps": maps, "sizes": sizes, "windows": windows or (), "decays": decays or ()}
    report = inspect_loaded(*loaded, tokens=tokens, text=text, layers=chosen, **kernels)
    show(head_table(report))
    show(map_table(report.maps))
    found = report.to_dict()
    if state_bytes is not None:
        plan = recommend(report, state_bytes)
        show_plan(describe(plan, loaded[0].config))
        found["plan"] = plan.to_dict()
        if output is not None:
            write_file(followed(output), recommended(plan).to_yaml())
            say(f"wrote {output}; next: kernelize convert {typed(source)} --config {typed(output)}")
    if plot is not None:
        draw(report, plot)
        say(f"wrote {plot}")
    write_json(json, found)


def inspect_loaded(model, tokenizer, *, tokens: int | None = None, text: str | None = None, **options) -> Inspection:
    """Inspects a loaded model on the shipped texts, with a bar; `options` as `inspect_model`."""
    from kernelize.inspect import inspect_model
    from kernelize.measure import sample_texts, usual_tokens

    texts = sample_texts(tokenizer, tokens or usual_tokens(model), text)
    with Progress("layers") as progress:
        return inspect_model(model, texts, on_progress=progress, **options)


def recommended(plan: ConversionPlan) -> Recipe:
    return plan.to_recipe("inspected", "recommended by `kernelize inspect`")


def auto_recipe(source: str, state_bytes: int | None, **loading) -> Recipe:
    """The recipe of `convert --spec auto --state-bytes N`."""
    from kernelize.errors import InputError
    from kernelize.inspect import recommend
    from kernelize.pipeline import load_for_use

    if state_bytes is None:
        raise InputError("--spec auto needs --state-bytes: how many bytes a sequence may hold")
    return recommended(recommend(inspect_loaded(*load_for_use(source, **loading)), state_bytes))


def show_measured(
    source: str,
    sizes: Sequence[int] = SIZES,
    *,
    layers: Sequence[int] | None = None,
    maps: Sequence[str] | None = None,
    json: Path | None = None,
    **loading,
) -> None:
    """The table of `list --measure SOURCE`: every map on the queries and keys of a few layers, best first."""
    from kernelize.inspect import map_table
    from kernelize.measure import measure_maps, sample_texts, usual_tokens
    from kernelize.pipeline import load_for_use

    model, tokenizer = load_for_use(source, **loading)
    texts = sample_texts(tokenizer, usual_tokens(model))
    with Progress("maps") as progress:
        rows = measure_maps(model, texts, sizes, maps=maps, layers=layers, on_progress=progress)
    show(map_table(rows))
    write_json(json, {"maps": [asdict(row) for row in rows]})
