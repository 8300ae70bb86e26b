"""evaluate, check, report: what a checkpoint keeps of its teacher, and whether its state is right."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Device, DType, Json, Overwrite, Revision, Source, Trust, only_with
from .output import say, show, table, write_json
from .progress import Progress, doing

if TYPE_CHECKING:
    from kernelize.audit import Audit
    from kernelize.check import CheckRow

Sources = Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Hub ids, folders, or .gguf files.")]
SUITES = "ppl, code, passkey, recall, generation, tasks, lm-eval; may be repeated."
Suites = Annotated[list[str], typer.Option("--suite", help=SUITES)]
LENGTHS = "Lengths in tokens, e.g. 1k,4k; or of one suite, e.g. ppl=128k; repeatable."
Lengths = Annotated[list[str] | None, typer.Option("--lengths", help=LENGTHS)]
Names = Annotated[list[str] | None, typer.Option("--task", help="A question set, or a task of lm-eval; repeatable.")]


def evaluate(
    sources: Sources,
    teacher: Annotated[str | None, typer.Option(help="The original model, to be measured beside the others.")] = None,
    suite: Suites = ["ppl", "passkey"],  # noqa: B006  Typer reads the default, nothing changes it
    lengths: Lengths = None,
    text: Annotated[
        str | None, typer.Option(help="Text for perplexity and generation: .txt, .txt.xz, .jsonl, or a sample.")
    ] = None,
    haystack: Annotated[str | None, typer.Option(help="Text in which the recall tasks hide things.")] = None,
    pieces: Annotated[int | None, typer.Option(help="Pieces of the text that perplexity takes.")] = None,
    trials: Annotated[int | None, typer.Option(help="Prompts a recall task, length and depth.")] = None,
    tasks_data: Annotated[Path | None, typer.Option(help="Folder of question sets: NAME.jsonl.")] = None,
    task: Names = None,
    limit: Annotated[int | None, typer.Option(help="Rows of a question set that are asked: the first ones.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of prompts and intervals.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small settings, for two CPU cores.")] = False,
    cache: Annotated[Path | None, typer.Option(help="File of measurements; a killed run goes on from it.")] = None,
    card: Annotated[bool, typer.Option("--card", help="Put the numbers into the first SOURCE's model card.")] = False,
    device: Device = None,
    dtype: DType = None,
    json: Json = None,
) -> None:
    """Measure models side by side, by position and length."""
    from kernelize.pipeline import as_rows, evaluate_sources
    from kernelize.report import rows_table

    folder, names = str(tasks_data) if tasks_data else None, tuple(task) if task else None
    settings = {"text": text, "haystack": haystack, "pieces": pieces, "trials": trials, "folder": folder,
                "names": names, "limit": limit, "seed": seed}  # fmt: skip
    with Progress() as progress:
        rows = evaluate_sources(
            sources,
            suite,
            teacher=teacher,
            lengths=_lengths(lengths, suite) if lengths else None,
            settings={name: value for name, value in settings.items() if value is not None},
            quick=quick,
            cache=cache,
            card=card,
            device=device,
            dtype=dtype,
            on_progress=progress,
        )
    show(rows_table(rows))
    write_json(json, {"rows": as_rows(rows)})


def _lengths(texts: list[str], suites: list[str]) -> dict[str, tuple[int, ...]]:
    """By suite; those of a suite that is not asked for are refused."""
    from kernelize.evaluate import lengths_by_suite

    found = lengths_by_suite(texts)
    for text in texts:
        suite, named, _ = text.partition("=")
        if named and suite not in suites:
            only_with(f"--suite {suite}", {f"--lengths {text}": text})
    return found


def check(
    source: Source,
    against: Annotated[
        str | None,
        typer.Option("--against", "--teacher", help="The original: with a long window, logits are its own."),
    ] = None,
    device: Device = None,
    dtype: DType = None,
    revision: Revision = None,
    trust: Trust = False,
    json: Json = None,
) -> None:
    """Check that every way to run a model agrees.

    Full forward, chunks, single steps, padded batches, a reload: the logits must be the same.
    """
    from kernelize.check import check as run_checks
    from kernelize.errors import KernelizeError
    from kernelize.pipeline import load_for_use

    options: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust}
    with doing(f"loading {source}"):
        model, tokenizer = load_for_use(source, revision=revision, **options)
        original = load_for_use(against, **options)[0] if against else None
    with Progress("checks") as progress:
        rows = run_checks(model, tokenizer, against=original, on_progress=progress)
    show_checks(rows)
    write_json(json, {"checks": [dataclasses.asdict(row) for row in rows]})
    if failed := [row.name for row in rows if row.failed]:
        raise KernelizeError(f"{source} fails {len(failed)} of {len(rows)} checks: {', '.join(failed)}")


def show_checks(rows: Iterable[CheckRow]) -> None:
    """The lines of a check, with the largest differences found."""
    head = ("check", "result", "difference", "allowed", "note")
    table("Checks", head, map(_check_cells, rows), left=(0, 1, 4))


def _check_cells(row: CheckRow) -> tuple[str, ...]:
    numbers = ("–" if number is None else f"{number:.1e}" for number in (row.difference, row.bound))
    result = "not run" if row.passed is None else "passed" if row.passed else "FAILED"
    return (row.name, result, *numbers, row.note)


def audit(
    source: Source,
    against: Annotated[str, typer.Option(help="The original model.")],
    length: Annotated[str, typer.Option(help="Tokens of each text and passkey prompt.")] = "2k",
    pieces: Annotated[int, typer.Option(min=1, help="Texts.")] = 4,
    trials: Annotated[int, typer.Option(min=1, help="Passkey prompts at each of five depths.")] = 4,
    text: Annotated[str, typer.Option(help="Text: .txt, .txt.xz, .jsonl, or a sample.")] = "novel",
    card: Annotated[bool, typer.Option("--card", help="Put what is found into SOURCE's model card.")] = False,
    device: Device = None,
    dtype: DType = None,
    json: Json = None,
) -> None:
    """Show what window, slots and memory are worth.

    Takes each away in turn; shows where each layer's attention goes, and what a layer does not use.
    """
    from kernelize.evaluate import parse_length
    from kernelize.pipeline import audit_source

    options: dict[str, Any] = {"length": parse_length(length), "pieces": pieces, "trials": trials, "text": text}
    with Progress() as progress:
        found = audit_source(source, against, card=card, device=device, dtype=dtype, on_progress=progress, **options)
    show_audit(found)
    write_json(json, found.to_dict())


def show_audit(found: Audit) -> None:
    """What is left when parts are taken away, each layer's shares, and how far the exact ones reach."""
    from kernelize.audit import SOURCES
    from kernelize.evaluate import METRICS

    measured = [row for row in found.rows if row.metric in ("ppl", "kl", "passkey")]
    models = dict.fromkeys(row.model for row in measured)
    cells = {model: [METRICS[r.metric].show(r.value) for r in measured if r.model == model] for model in models}
    table("What is left", ("model", "perplexity", "KL", "passkey"), ((model, *cells[model]) for model in models))
    table("Share of attention", ("layer", *SOURCES, "verdict"), (
        (line.layer, *(f"{getattr(line, source):.1%}" for source in SOURCES), line.verdict) for line in found.layers
    ), left=(0, 5))  # fmt: skip
    near = {(r.metric.split("_")[1], r.length): r.value for r in found.rows if r.metric.endswith("_at")}
    edges = sorted({edge for _, edge in near if edge is not None})
    table("Share of attention by distance, mean over layers", ("tokens away, below", *SOURCES[:3]), (
        (f"{edge:,}", *(f"{near.get((source, edge), 0):.1%}" for source in SOURCES[:3])) for edge in edges
    ))  # fmt: skip
    say(f"without slots and memory the divergence from the teacher is {found.rise:.1f} times as large")


def overlap(
    training: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Training text: .txt, .txt.xz, .jsonl, .parquet.")
    ],
    against: Annotated[list[str], typer.Option("--against", help="Evaluation text; may be repeated.")],
    json: Json = None,
) -> None:
    """Look for evaluation text in training text.

    Fails if a run of 13 words, or a whole item of 8 to 12, is in both.
    """
    from kernelize.errors import KernelizeError
    from kernelize.overlap import overlaps

    with doing("reading"):
        found = overlaps(training, against)
    head = ("training", "evaluation", "documents", "of", "shared runs", "one of them")
    table("Overlap", head, map(dataclasses.astuple, found), left=(0, 1, 5))
    write_json(json, {"overlap": [dataclasses.asdict(line) for line in found]})
    if shared := sum(line.documents for line in found):
        raise KernelizeError(f"{shared} training documents share runs of words with evaluation text")


def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="What evaluate --json wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report.")] = Path("report"),
    teacher: Annotated[str | None, typer.Option(help="The model to compare with; by default `teacher`.")] = None,
    overwrite: Overwrite = False,
    json: Json = None,
) -> None:
    """Draw tables and pictures of evaluations.

    HTML in one file, Markdown, and PNG.
    """
    from kernelize.files import check_output
    from kernelize.pipeline import as_rows
    from kernelize.report import load_all, rows_table, tables, write_report

    rows = load_all(files)
    page = write_report(rows, check_output(output, overwrite), teacher=teacher)
    for part in tables(rows):
        show(rows_table(part, teacher if teacher in {row.model for row in part} else None))
    say(f"wrote {page}")
    write_json(json, {"rows": as_rows(rows)})
