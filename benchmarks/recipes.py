"""Trains one model by several recipes and measures what each recovers, beside the teacher, on text nobody trained on.

    python benchmarks/recipes.py --data DATA --output OUT [--recipes default recall window-distilled] [--device cuda]

DATA holds train/*.parquet, eval/wikitext2_test.jsonl (rows with a column `text`, joined) and longdocs/*.txt.xz. A
recipe's own data is replaced by that mixture; `retrieval` hides its facts in the same text. What is measured goes to
OUT/rows.json and OUT/report, and a run that was stopped goes on from OUT/measured.jsonl and the trained models in OUT.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch

from kernelize.convert import convert, demo_source, load
from kernelize.evaluate import Passkey, Perplexity, evaluate, save_rows
from kernelize.pipeline import budget, calibration, plan_for
from kernelize.recipe import DataSource, Recipe, load_recipe
from kernelize.report import write_report
from kernelize.train import finetune

# shares of documents: of the tokens about .2 books, .3 textbooks, .12 documentation, .06 code, .07 chat
TEXT = {"books_fiction_nonfiction": 0.042, "openstax_textbooks": 0.118, "technical_docs": 0.041, "code": 0.021,
        "instruct": 0.44}  # fmt: skip
HAYSTACKS = {"books_fiction_nonfiction": 0.11, "openstax_textbooks": 0.04, "technical_docs": 0.02}


def mixture(data: Path, retrieval: bool) -> tuple[DataSource, ...]:
    """The training text; with `retrieval`, a fifth of the documents ask for something that stands in them."""
    sources = [DataSource(path=str(data / f"train/{name}.parquet"), weight=w) for name, w in TEXT.items()]
    if retrieval:
        sources += [DataSource(path=str(data / f"train/{name}.parquet"), builtin="retrieval", weight=w)
                    for name, w in HAYSTACKS.items()]  # fmt: skip
    return tuple(sources)


def on_text(recipe: Recipe, data: Path, steps: int | None) -> Recipe:
    """The recipe on that text; `steps` cuts every stage short, for a trial."""
    stages = []
    for stage in recipe.stages:
        asks = any(source.builtin == "retrieval" for source in stage.data)
        changes = {"data": mixture(data, asks)} | ({"tokens": None, "steps": steps} if steps else {})
        stages.append(stage.model_copy(update=changes))
    return recipe.model_copy(update={"stages": tuple(stages)})


def tell(event: dict) -> None:
    if event["event"] == "step" and (event["step"] % 20 == 0 or event["step"] == event["steps"]):
        losses = {name: round(value, 4) for name, value in event["metrics"].items()}
        print(f"{event['stage']} {event['step']}/{event['steps']} {event['tokens_per_second']:,.0f} tokens/s {losses}",
              flush=True)  # fmt: skip


def trained(name: str, teacher, tokenizer, args: argparse.Namespace):
    """The model that the recipe makes, from OUT if it is there."""
    folder = args.output / name
    if (folder / "config.json").is_file():
        return load(str(folder), device=args.device, dtype=args.dtype)[0]
    recipe = on_text(load_recipe(name), args.data, args.steps)
    texts, priced = calibration(tokenizer, teacher), budget(tokenizer, teacher, recipe)
    model = convert(copy.deepcopy(teacher), plan_for(recipe, teacher.config), calibration=texts, budget=priced)
    start, original = time.monotonic(), copy.deepcopy(teacher).to(getattr(torch, args.dtype))
    finetune(model, tokenizer, recipe, folder, teacher=original, overwrite=True, on_event=tell)
    print(f"{name}: trained in {time.monotonic() - start:.0f} s", flush=True)
    return model.to(args.device, getattr(torch, args.dtype)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=["default", "recall", "window-distilled"])
    parser.add_argument("--source", default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", help="of the teacher, and of all models when they are measured")
    parser.add_argument("--pieces", type=int, default=24)
    parser.add_argument("--steps", type=int, default=None, help="of every stage, for a trial; by default the recipe's")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    teacher, tokenizer = load(args.source or str(demo_source()), dtype="float32", device=args.device)
    models = {name: (trained(name, teacher, tokenizer, args), tokenizer) for name in args.recipes}
    models = {"teacher": (teacher.to(getattr(torch, args.dtype)), tokenizer), **models}
    wiki, book = (str(args.data / name) for name in ("eval/wikitext2_test.jsonl", "longdocs/middlemarch.txt.xz"))
    suites = {
        "wikitext": Perplexity(lengths=(2048,), pieces=args.pieces, text=wiki, chunk=2048),
        "book": Perplexity(lengths=(8192,), pieces=2, text=book, chunk=2048),
        "passkey": Passkey(chunk=2048),
    }
    for name, suite in suites.items():
        rows = evaluate(models, [suite], cache=args.output / "measured.jsonl")
        save_rows(rows, args.output / f"{name}.json")
        for row in rows:
            if row.metric in ("ppl", "ppl_at", "kl", "passkey") and row.depth is None:
                print(f"{row.model:20s} {row.metric:8s} {row.length:6d} {row.value:.4f}", flush=True)
        write_report(rows, args.output / f"report-{name}")


if __name__ == "__main__":
    main()
