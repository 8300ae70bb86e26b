"""What a command prints: tables on stdout, and the same as JSON in a file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelize.files import write_file
from kernelize.units import data_size

from .progress import speaks

if TYPE_CHECKING:
    from rich.table import Table

    from kernelize.plan import LayerRow, LengthRow, PlanReport
    from kernelize.predict import Prediction


def write_json(path: Path | None, data: Any) -> None:
    """Writes `data` to `path`, if one was given."""
    if path is not None and speaks():
        write_file(followed(path), json.dumps(data, indent=1, default=str) + "\n")


def followed(path: Path) -> Path:
    """Where a link leads to; what is no file (a pipe, a device such as /dev/stdout) by the name that it has here."""
    return path if path.exists() and not path.is_file() else path.resolve()


def typed(name: object) -> str:
    """A name as a shell takes it: what is shown as the next command can be copied."""
    return shlex.quote(str(name))


def say(text: str) -> None:
    """A line of result on stdout."""
    if speaks():
        print(text, flush=True)


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]], *, left: Collection[int] = (0,)) -> None:
    """Prints a table; columns stand right, those of `left` left."""
    from rich import box
    from rich.table import Table

    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, name in enumerate(head):
        shown.add_column(name, justify="left" if i in left else "right", overflow="fold")
    for row in rows:
        shown.add_row(*map(str, row))
    show(shown)


def show(shown: Table) -> None:
    """Prints a table of rich."""
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 200  # a file or a pipe: no reason to fold
    if speaks():
        console.print(shown)


def _flops(count: float) -> str:
    return f"{count / 1e6:,.1f} M"


def span(layers: Sequence[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"


def show_plan(report: PlanReport) -> None:
    """The plan by runs of equal layers, then cost by length."""
    windows = report.shape.windows or (None,) * len(report.layers)
    runs = [list(run) for _, run in groupby(report.layers, key=lambda row: (row.spec, row.spec or windows[row.layer]))]
    table("Layers", ("layers", "attention", "window", "sinks", "slots", "memory", "new parameters", "state"), (
        (span([row.layer for row in run]), *_layer_cells(run, windows[run[0].layer])) for run in runs
    ))  # fmt: skip
    shape = report.shape
    table(
        f"Cost a sequence ({shape.dtype}; FLOPs of attention a token)",
        ("tokens", "KV cache", "converted", "prefill", "converted", "decoding", "converted"),
        map(_length_cells, report.lengths),
    )
    say(f"{report.new_parameters:,} new parameters; state of the converted layers {data_size(report.state_bytes)} a "
        "sequence at any length")  # fmt: skip
    say(f"cheaper than softmax {_from(report.break_even_bytes)} in memory, {_from(report.break_even_flops)} in FLOPs "
        "of decoding")  # fmt: skip


def _from(length: int | None) -> str:
    return "at no length" if length is None else f"from {length:,} tokens"


def show_predictions(found: Sequence[Prediction], where: str) -> None:
    """Memory and time of every stage, as predicted."""
    head = (
        "stage",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "gathered, logits",
        "memory",
        "hours",
        "stored",
    )
    table(f"Training, predicted for {where}", head, (
        (p.stage, *map(data_size, map(round, (p.weights, p.gradients, p.optimizer, p.activations, p.gathered + p.logits,
                                              p.memory))), f"{p.seconds / 3600:.2f}", data_size(round(p.stored_bytes)))
        for p in found
    ))  # fmt: skip
    say("a prediction from shapes, not a measurement; docs/scaling.md says how far it was off where it was checked")


def _length_cells(row: LengthRow) -> tuple[str, ...]:
    sizes = map(data_size, (row.teacher_cache_bytes, row.cache_bytes))
    costs = (row.teacher_prefill_flops, row.prefill_flops, row.teacher_decode_flops, row.decode_flops)
    return (f"{row.length:,}", *sizes, *map(_flops, costs))


def _layer_cells(run: Sequence[LayerRow], window: int | None) -> tuple[str, ...]:
    """`window`: the layers' own, where they keep softmax."""
    spec = run[0].spec
    if spec is None:
        return ("softmax", f"{window:,}" if window else "", "", "", "", "", "")
    memory = f"{spec.feature_map} {spec.feature_dim}, decay {spec.decay}" if spec.has_memory else "none"
    new, state = sum(r.new_parameters for r in run), sum(r.state_bytes for r in run)
    budget = "/".join(map(str, spec.head_slots)) or spec.slots
    slots = f"{budget} {spec.policy}" if spec.slots else "0"
    return (
        "kernelized",
        f"{spec.window} by {spec.block}",
        str(spec.sinks),
        slots,
        memory,
        f"{new:,}",
        data_size(state),
    )


def stream(text: str) -> None:
    """A piece of generated text on stdout, at once."""
    if speaks():
        print(text, end="", flush=True)
