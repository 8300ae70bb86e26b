"""Trains one model by several recipes and seeds, and measures what each recovers beside the teacher, on unseen text.

    python benchmarks/recipes.py --data DATA --output OUT --minutes 9 --device cuda
    python benchmarks/recipes.py --data DATA --output OUT --recipes recall default --seeds 0 1 2 --only train

DATA holds train/*.parquet, eval/*.jsonl (wikitext2_test.jsonl: rows with a column `text`, joined; and question sets)
and longdocs/*.txt.xz. A recipe's own data is replaced by that text; `retrieval` hides its facts in it. In turn: the
training text is searched for evaluation text; all are converted; all are trained, `--jobs` at a time, seed after seed;
all models are measured side by side; OUT/table.md says what came out. With `--minutes` the work ends in time, and the
same command goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kernelize.audit import audit
from kernelize.convert import convert, demo_source, load, save, stretch
from kernelize.evaluate import Passkey, Perplexity, Row, Suite, Tasks, evaluate, load_rows, save_rows
from kernelize.overlap import overlaps
from kernelize.pipeline import as_converted, budget, calibration, document, keep_chosen, plan_for, read_source
from kernelize.recipe import DataSource, Recipe, Stage, load_recipe
from kernelize.report import write_report
from kernelize.runtime.modeling import kernelized_layers, plan_entry, plan_of
from kernelize.train import finetune

RECIPES = ("recall", "forecast", "default", "dropout", "window-distilled", "hybrid-quarter", "lolcats", "liger",
           "pure-linear", "window-only")  # fmt: skip
# shares of documents: of the tokens about .2 books, .3 textbooks, .12 documentation, .06 code, .07 chat
TEXT = {"books_fiction_nonfiction": 0.042, "openstax_textbooks": 0.118, "technical_docs": 0.041, "code": 0.021,
        "instruct": 0.44}  # fmt: skip
HAYSTACKS = {"books_fiction_nonfiction": 0.11, "openstax_textbooks": 0.04, "technical_docs": 0.02}
WIKI, BOOK, WITHOUT_QUESTIONS = "eval/wikitext2_test.jsonl", "longdocs/middlemarch.txt.xz", ("wikitext2_test",)
PARTS = ("overlap", "convert", "train", "measure")
SUITES = ("wikitext", "book", "passkey", "tasks", "audit")
SLOW = ("passkey",)  # so slow that each model is measured in a process of its own
GRACE = 40  # seconds before the end at which trainings are told to stop: a step and a checkpoint
TEACHER = "teacher"


class TimeUpError(Exception):
    """The minutes that were given are over."""


@dataclass(frozen=True)
class Clock:
    end: float  # time.time(), so that processes agree

    @classmethod
    def of(cls, minutes: float | None) -> Clock:
        return cls(float("inf") if minutes is None else time.time() + 60 * minutes)

    def __call__(self, *_: Any) -> None:
        """Raises TimeUpError when it is."""
        if time.time() > self.end:
            raise TimeUpError


@dataclass(frozen=True)
class Run:
    """One model to train."""

    recipe: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.recipe}.{self.seed}"


# --- what is trained ------------------------------------------------------------------------------------------


def mixture(data: Path, origins: set[str | None]) -> tuple[DataSource, ...]:
    """The training text for a stage whose data has such builtins: with retrieval, a fifth of the documents ask for
    something that stands in them, or all do.
    """
    sources = [DataSource(path=str(data / f"train/{name}.parquet"), weight=w) for name, w in TEXT.items()]
    asking = [DataSource(path=str(data / f"train/{name}.parquet"), builtin="retrieval", weight=w)
              for name, w in HAYSTACKS.items()]  # fmt: skip
    if origins == {"retrieval"}:
        return tuple(asking)
    return tuple(sources + asking if "retrieval" in origins else sources)


def on_text(recipe: Recipe, data: Path, tokens: int | None = None, trial: bool = False, seed: int = 0) -> Recipe:
    """The recipe on that text; `tokens` in all its stages together; a trial takes one step of two short rows."""
    total = sum(stage.total_steps * stage.batch_tokens for stage in recipe.stages)
    stages = []
    for stage in recipe.stages:
        changes: dict[str, Any] = {"data": mixture(data, {source.builtin for source in stage.data})}
        if tokens:
            changes |= {"tokens": max(1, (stage.total_steps * stage.batch_tokens) * tokens // total), "steps": None}
        if trial:
            length = min(stage.sequence_length, 512)
            changes |= {"steps": 1, "tokens": None, "sequence_length": length, "batch_tokens": 2 * length,
                        "micro_batch": 1, "warmup": 0.0}  # fmt: skip
        stages.append(Stage.model_validate({**dict(stage), **changes}))
    return recipe.model_copy(update={"stages": tuple(stages), "seed": seed})


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Within the context no other process is inside one with the same path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def source_of(args: argparse.Namespace) -> str:
    return args.source or str(demo_source())


def converted(name: str, args: argparse.Namespace) -> tuple[Any, Any, Recipe]:
    """(model, tokenizer, recipe) before training: made once a recipe, the same for every seed."""
    folder = args.output / "converted" / name
    with alone(args.output / f"locks/{name}"):
        if not (folder / "config.json").is_file():
            _convert(load_recipe(name), folder, args)
    recipe = Recipe.from_yaml((folder / "recipe.yaml").read_text("utf-8"))
    return *load(str(folder), device=args.device, dtype="float32"), recipe


def convert_all(args: argparse.Namespace) -> None:
    """Before anything trains: a conversion is the host's work, so on a GPU several go on at once."""
    with ProcessPoolExecutor(args.converting, mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(convert_one, args=args), dict.fromkeys((*args.recipes, *args.untrained))))


def convert_one(name: str, args: argparse.Namespace) -> None:
    converted(name, args)


def _convert(recipe: Recipe, folder: Path, args: argparse.Namespace) -> None:
    began = time.monotonic()
    if recipe.keep_auto:
        recipe = keep_chosen(source_of(args), recipe, device=args.device, dtype="float32")
    teacher, tokenizer = load(source_of(args), dtype="float32", device=args.device)
    plan = plan_for(recipe, teacher.config)
    if recipe.context:
        teacher = stretch(teacher, recipe.context)
    sizes = {"length": 256, "texts": (1, 1)} if args.trial else {}
    texts, priced = calibration(tokenizer, teacher), budget(tokenizer, teacher, recipe, **sizes)
    model = convert(teacher, plan, calibration=texts[:1] if args.trial else texts, budget=priced)
    recipe = as_converted(recipe, model).model_copy(update={"source": source_of(args)})
    save(model, tokenizer, folder, document=lambda aside: _note(aside, recipe, folder.name, args))
    print(f"{recipe.name}: converted in {time.monotonic() - began:.0f} s", flush=True)


def _note(aside: Path, recipe: Recipe, name: str, args: argparse.Namespace) -> None:
    document(aside, recipe=recipe, name=name, source=read_source(source_of(args)))


def train(run: Run, args: argparse.Namespace) -> None:
    """Trains one model into OUT/NAME.SEED, or goes on with it; a SIGTERM makes it keep what it has."""
    folder = args.output / run.name
    model, tokenizer, recipe = converted(run.recipe, args)
    if not recipe.stages:
        return
    recipe = on_text(recipe, args.data, args.tokens, args.trial, run.seed)
    teacher, _ = load(source_of(args), dtype=args.dtype, device=args.device)
    began, resume = time.monotonic(), (folder / "checkpoints").is_dir()
    result = finetune(
        model, tokenizer, recipe, folder, teacher=teacher, resume=resume, overwrite=not resume, on_event=teller(run),
        document=lambda aside: _note(aside, recipe, folder.name, args),
    )  # fmt: skip
    how = "trained" if result.completed else "stopped"
    print(f"{run.name}: {how} after {time.monotonic() - began:.0f} s", flush=True)


def teller(run: Run) -> Any:
    def tell(event: dict) -> None:
        if event["event"] == "step" and (event["step"] % 20 == 0 or event["step"] == event["steps"]):
            losses = {name: round(value, 4) for name, value in event["metrics"].items()}
            print(f"{run.name} {event['stage']} {event['step']}/{event['steps']} "
                  f"{event['tokens_per_second']:,.0f} tokens/s {losses}", flush=True)  # fmt: skip

    return tell


def is_trained(run: Run, args: argparse.Namespace) -> bool:
    if not load_recipe(run.recipe).stages:
        return (args.output / "converted" / run.recipe / "config.json").is_file()
    return (args.output / run.name / "config.json").is_file()


def train_all(runs: Sequence[Run], args: argparse.Namespace, clock: Clock) -> None:
    """Each run in a process of its own, `args.jobs` at a time. Raises TimeUpError, with all that was trained kept."""
    waiting, running = [run for run in runs if not is_trained(run, args)], dict[Run, subprocess.Popen]()
    try:
        while waiting or running:
            for run in [run for run, process in running.items() if process.poll() is not None]:
                if code := running.pop(run).returncode:
                    raise SystemExit(f"{run.name} ended with code {code}; see above")
            if time.time() > clock.end - GRACE:
                raise TimeUpError
            while waiting and len(running) < args.jobs:
                run = waiting.pop(0)
                running[run] = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--one", run.name])
            time.sleep(0.5)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for process in running.values():
            process.wait()


# --- what is measured -----------------------------------------------------------------------------------------


def question_sets(data: Path) -> tuple[str, ...]:
    return tuple(sorted(p.stem for p in (data / "eval").glob("*.jsonl") if p.stem not in WITHOUT_QUESTIONS))


def suites(args: argparse.Namespace) -> dict[str, Suite]:
    """What is measured, in this order."""
    wiki, book = str(args.data / WIKI), str(args.data / BOOK)
    tasks = Tasks(folder=str(args.data / "eval"), names=question_sets(args.data), batch=args.batch)
    if args.trial:
        return {
            "wikitext": Perplexity(lengths=(512,), pieces=2, text=wiki),
            "book": Perplexity(lengths=(1024,), pieces=2, text=book),
            "passkey": Passkey(lengths=(256,), depths=(0.5,), trials=2),
            "tasks": dataclasses.replace(tasks, limit=2),
        }
    return {
        "wikitext": Perplexity(lengths=(2048,), pieces=args.pieces, text=wiki, chunk=2048),
        "book": Perplexity(lengths=(8192, 65536), pieces=args.book_pieces, text=book, chunk=args.chunk),
        "passkey": Passkey(lengths=tuple(512 * 2**i for i in range(7)), chunk=args.prompt),
        "tasks": tasks,
    }


def folders(runs: Sequence[Run], args: argparse.Namespace) -> dict[str, str]:
    """Name -> folder: the teacher, untrained conversions that were asked for, all that is trained."""
    found = {TEACHER: source_of(args)}
    found |= {f"{name} untrained": str(args.output / "converted" / name) for name in args.untrained}
    for run in runs:
        if is_trained(run, args):
            stages = load_recipe(run.recipe).stages
            found[run.name] = str(args.output / (run.name if stages else f"converted/{run.recipe}"))
    return {name: folder for name, folder in found.items() if args.model in (None, name)}


def models(runs: Sequence[Run], args: argparse.Namespace) -> dict[str, tuple[Any, Any]]:
    """Name -> (model, tokenizer) of `folders`, the first recipe also at other reaches."""
    named = folders(runs, args)
    found = {name: load(folder, device=args.device, dtype=args.dtype) for name, folder in named.items()}
    for run in runs:
        for reach in args.reaches if run.recipe == args.recipes[0] and run.name in named else ():
            model, tokenizer = load(named[run.name], device=args.device, dtype=args.dtype)
            found[f"{run.recipe} reach {reach}.{run.seed}"] = at_reach(model, reach), tokenizer
    tokenizer = next(iter(found.values()))[1]  # one object: texts are cut once
    return {name: (model, tokenizer) for name, (model, _) in found.items()}


def measure_apart(runs: Sequence[Run], args: argparse.Namespace, clock: Clock) -> None:
    """Every suite in a process of its own, the slowest one for each model: small models leave most of a GPU idle.
    What was measured is kept."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", "measure", "--together"]
    if args.minutes:
        command += ["--minutes", str(max(0.0, clock.end - time.time()) / 60)]
    shares = [[name, "--model", model] for name in args.suites if name in SLOW for model in folders(runs, args)]
    shares += [[name] for name in args.suites if name not in SLOW]
    running = {" of ".join(share[::2]): subprocess.Popen([*command, "--suites", *share]) for share in shares}
    if failed := [name for name, process in running.items() if process.wait()]:
        raise SystemExit(f"{', '.join(failed)}: not measured; see above")


def at_reach(model: Any, reach: int) -> Any:
    """The model with another reach in all converted layers: nothing that is trained depends on it."""
    layers = [spec and spec.replace(reach=reach) for spec in plan_of(model.config)]
    for i, attention in kernelized_layers(model).items():
        attention.kernelize.spec = layers[i]
    model.config.kernelize = plan_entry(layers)
    return model


def measure(runs: Sequence[Run], args: argparse.Namespace, clock: Clock) -> None:
    for name in args.untrained:
        converted(name, args)
    found, folder = models(runs, args), args.output / "rows"
    folder.mkdir(exist_ok=True)
    for name, suite in suites(args).items():
        if name not in args.suites:
            continue
        rows = evaluate(found, [suite], cache=args.output / f"measured-{name}.jsonl", on_progress=clock)
        if args.model:  # they are in the cache
            continue
        keep_rows(rows, folder / f"{name}.json")
        write_report(rows, args.output / f"report-{name}")
        write_table(args, list(found))
    for name, (model, tokenizer) in found.items():
        if (
            "audit" in args.suites
            and name != TEACHER
            and " reach " not in name
            and not (folder / f"audit-{name}.json").exists()
        ):
            audit_one(name, model, found[TEACHER][0], tokenizer, args, clock)
            write_table(args, list(found))


def keep_rows(rows: Sequence[Row], path: Path) -> None:
    """Saves them in place of those of the same models; what other calls measured of others stays."""
    measured = {row.model for row in rows}
    with alone(path.parent.parent / f"locks/{path.name}"):
        others = [row for row in load_rows(path) if row.model not in measured] if path.exists() else []
        save_rows([*others, *rows], path)


def audit_one(name: str, model: Any, teacher: Any, tokenizer: Any, args: argparse.Namespace, clock: Clock) -> None:
    """Rows of the audit to OUT/rows; all of it into the card of a trained model."""
    size = {"length": 256, "pieces": 1, "trials": 1} if args.trial else {}
    found = audit(model, teacher, tokenizer, name=name, text=str(args.data / BOOK), on_progress=clock, **size)
    if (args.output / name).is_dir():
        document(args.output / name, audit=found.to_dict())
    rows = [dataclasses.replace(row, model=name, metric=f"{row.metric} {row.model.partition(', ')[2]}")
            for row in found.rows]  # fmt: skip
    rise = Row(name, "audit", "rise", None, None, found.rise, None, None, 1)
    save_rows([*rows, rise], args.output / f"rows/audit-{name}.json")


def check_overlap(args: argparse.Namespace) -> None:
    """SystemExit if the training text holds text that models are evaluated on; what was searched is noted in OUT."""
    path = args.output / "overlap.json"
    if not path.exists():
        training = sorted({str(args.data / f"train/{name}.parquet") for name in TEXT})
        evaluation = [str(args.data / BOOK), *map(str, sorted((args.data / "eval").glob("*.jsonl")))]
        found = [dataclasses.asdict(line) for line in overlaps(training, evaluation)]
        path.write_text(json.dumps(found, indent=1))
    lines = json.loads(path.read_text())
    if bad := [line for line in lines if line["documents"]]:
        raise SystemExit(f"training text holds evaluation text: {bad[0]}")
    print(f"no run of 13 words is both in {len({x['training'] for x in lines})} training files and in "
          f"{len({x['evaluation'] for x in lines})} evaluation files", flush=True)  # fmt: skip


# --- the table ------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A line of the table: of which rows it is the mean, what it must reach and should."""

    title: str
    suite: str
    metrics: tuple[tuple[str, int | None], ...]  # (metric, length); of several the mean
    target: str = ""
    digits: int = 3


def lines(data: Path) -> list[Line]:
    def single(title: str, suite: str, metric: str, length: int | None, target: str = "", digits: int = 3) -> Line:
        return Line(title, suite, ((metric, length),), target, digits)

    keys = tuple(512 * 2**i for i in range(7))
    tasks = tuple((f"{name}/acc", None) for name in question_sets(data))
    return [
        single("wikitext, perplexity", "wikitext", "ppl", 2048, "≤ 22.0", 2),
        single("wikitext, KL to the teacher", "wikitext", "kl", 2048, "≤ .08", 4),
        *(single(f"book to {n // 1024}k, against the teacher", "book", "ppl_ratio_at", n, "≤ 1.05")
          for n in (1024, 2048, 4096, 8192)),
        *(single(f"book to {n // 1024}k, against its own 4k–8k", "book", "drift_at", n, "≤ 1.03")
          for n in (16384, 32768, 65536)),
        *(single(f"passkey at {n}", "passkey", "passkey", n, "≥ .40" if n > 8192 else "", 2) for n in keys),
        Line("passkey, mean of 512…4k", "passkey", tuple(("passkey", n) for n in keys[:4]), "≥ .70", 2),
        Line(f"mean of {len(tasks)} tasks, accuracy", "tasks", tasks, "teacher − .010"),
        single("KL without slots and memory, times", "audit", "rise", None, "≥ 2", 2),
    ]  # fmt: skip


def write_table(args: argparse.Namespace, names: Sequence[str]) -> None:
    """OUT/table.md: a column a recipe, mean over its seeds; in brackets the interval, or the seeds' least and most.

    `names` come first, then whatever else was measured into OUT.
    """
    rows = [dataclasses.replace(row, suite=path.stem.partition("-")[0])
            for path in sorted((args.output / "rows").glob("*.json")) for row in load_rows(path)]  # fmt: skip
    index = {(row.model, row.suite, row.metric, row.length): row for row in rows if row.depth is None}
    columns: dict[str, list[str]] = {}
    for name in dict.fromkeys([*names, *(model for model, *_ in index)]):
        columns.setdefault(name.rpartition(".")[0] or name, []).append(name)
    head = ["measure", *(f"{c} ({len(m)} seeds)" if len(m) > 1 else c for c, m in columns.items()), "must reach"]
    body = [[line.title, *(cell(line, members, index) for members in columns.values()), line.target]
            for line in lines(args.data)]  # fmt: skip
    tokens = ["training tokens", *(trained_tokens(members[0], args) for members in columns.values()), "≤ 50M"]
    table = [head, ["---"] * len(head), tokens, *body]
    text = "\n".join("| " + " | ".join(entry) + " |" for entry in table)
    (args.output / "table.md").write_text(text + "\n", "utf-8")


def cell(line: Line, members: Sequence[str], index: dict[tuple, Row]) -> str:
    values, only = [], None
    for name in members:
        rows = [index.get((name, line.suite, *metric)) for metric in line.metrics]
        if any(row is None for row in rows):
            continue
        values.append(sum(row.value for row in rows if row) / len(rows))
        only = rows[0] if len(rows) == 1 else None
    if not values:
        return "–"
    mean, show = sum(values) / len(values), f"{{:.{line.digits}f}}".format
    if len(values) > 1:
        return f"{show(mean)} [{show(min(values))}, {show(max(values))}]"
    return f"{show(mean)} [{show(only.low)}, {show(only.high)}]" if only and only.low is not None else show(mean)


def trained_tokens(name: str, args: argparse.Namespace) -> str:
    """What the log of a run says, in millions."""
    log = args.output / name / "train.jsonl"
    stages: dict[str, int] = {}
    for event in map(json.loads, log.read_text().splitlines() if log.exists() else ()):
        if event["event"] == "step":
            stages[event["stage"]] = event["tokens"]
    return f"{sum(stages.values()) / 1e6:.2f}M" if stages else "0"


# --- the command ----------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--untrained", nargs="*", default=["default"], help="conversions to measure as they are")
    parser.add_argument("--reaches", nargs="*", type=int, default=[], help="of the first recipe: measure these too")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--minutes", type=float, default=None, help="after which the work ends, to go on next time")
    parser.add_argument("--jobs", type=int, default=None, help="trainings at a time: by default 2 on a GPU, 1 without")
    parser.add_argument("--converting", type=int, default=None, help="conversions at a time: by default 8 on a GPU")
    parser.add_argument("--tokens", type=int, default=None, help="of every recipe in all; by default its own")
    parser.add_argument("--source", default=None, help="the teacher; by default the demo's SmolLM2-135M-Instruct")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="of the teacher, and of all models when they are measured")
    parser.add_argument("--pieces", type=int, default=None, help="of wikitext; by default all on a GPU, else 8")
    parser.add_argument("--book-pieces", type=int, default=3, help="of 65,536 tokens")
    parser.add_argument("--together", action="store_true", help="all suites in this process; without a GPU")
    parser.add_argument("--trial", action="store_true", help="one step, a few short texts: whether all of it runs")
    parser.add_argument("--model", default=None, help=argparse.SUPPRESS)  # to measure alone, into the cache
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    gpu = args.device.startswith("cuda")
    args.dtype = args.dtype or ("bfloat16" if gpu else "float32")
    args.jobs, args.converting = args.jobs or (2 if gpu else 1), args.converting or (8 if gpu else 1)
    # of tokens whose logits are kept, of a prompt's tokens, of questions: a GPU waits for the host
    args.chunk, args.prompt, args.batch = (8192, 32768, 128) if gpu else (2048, 2048, 16)
    args.together = args.together or not gpu
    args.pieces = args.pieces or (None if gpu else 8)
    args.output.mkdir(parents=True, exist_ok=True)
    return args


def work(args: argparse.Namespace) -> None:
    clock, runs = Clock.of(args.minutes), [Run(name, seed) for seed in args.seeds for name in args.recipes]
    try:
        if "overlap" in args.only:
            check_overlap(args)
        if "convert" in args.only:
            convert_all(args)
        if "train" in args.only:
            train_all(runs, args, clock)
        if "measure" in args.only and not args.together:
            measure_apart(runs, args, clock)
        if "measure" in args.only:
            measure(runs, args, clock)  # what was measured already is only put together
    except TimeUpError:
        print("time is up; the same command goes on from here", flush=True)
    left = [run.name for run in runs if not is_trained(run, args)]
    print(f"not trained yet: {', '.join(left)}" if left else "all is trained", flush=True)


def main() -> None:
    args = parse()
    if args.one:
        name, _, seed = args.one.rpartition(".")
        train(Run(name, int(seed)), args)
    else:
        work(args)


if __name__ == "__main__":
    main()
