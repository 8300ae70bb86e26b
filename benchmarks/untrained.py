"""What conversion alone keeps: teacher, untrained windows, and kernelized models with and without slots shared out.

    python benchmarks/untrained.py --data DATA --output OUT [--device cuda] [--dtype bfloat16] [--source MODEL]

DATA holds eval/wikitext2_test.jsonl (rows with a column `text`, joined) and longdocs/*.txt.xz. Everything that is
converted holds 260 positions a key head on average, but the window of 64. Models are converted in float32, kept in
OUT/models and measured in `--dtype`; `--model` and `--suite` choose some of each. The rows go to OUT/SUITE.json and
the pictures beside it; a run that was stopped goes on from OUT/measured.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from kernelize.budget import Budget, budget_texts
from kernelize.convert import convert, demo_source, load, save
from kernelize.evaluate import Passkey, Perplexity, Suite, evaluate, sample_text, save_rows
from kernelize.pipeline import calibration
from kernelize.plan import ConversionPlan
from kernelize.report import write_report
from kernelize.runtime.modeling import kernelized_layers
from kernelize.runtime.spec import KernelSpec

PLAIN = KernelSpec(feature_map="none", policy="attention", slots=0, block=1)
CONVERTED = {  # name -> (every layer's spec, by what slots are shared out; None: nothing, not even calibrated)
    "shared": (KernelSpec(aging=1024), "layers"),
    "heads": (KernelSpec(aging=1024), "heads"),
    "equal": (KernelSpec(aging=1024), "uniform"),
    "window64": (PLAIN.replace(window=64), None),
    "window256": (PLAIN.replace(window=256), None),
}
WITHOUT = "shared-without-memory"  # the slots as `shared` gives them out, its memory left out of both sums
MODELS = ("teacher", *CONVERTED, WITHOUT)
METRICS = ("ppl", "ppl_at", "kl", "passkey")


def make(source: str, folder: Path, wanted: Sequence[str]) -> None:
    """Converts what `folder` lacks of the `wanted` models, in float32."""
    names = {"shared" if name == WITHOUT else name for name in wanted}
    missing = {name: entry for name, entry in CONVERTED.items() if name in names and not (folder / name).exists()}
    if not missing:
        return
    teacher, tokenizer = load(source, dtype="float32")
    texts, priced = calibration(tokenizer, teacher), budget_texts(tokenizer, sample_text("train"), 2048)
    for name, (spec, by) in missing.items():
        start, plan = time.monotonic(), ConversionPlan.uniform(spec, teacher.config.num_hidden_layers)
        model = convert(
            copy.deepcopy(teacher),
            plan,
            calibration=texts if by else None,
            budget=Budget(priced, by == "heads") if by in ("layers", "heads") else None,
        )
        save(model, tokenizer, folder / name)
        print(f"{name}: converted in {time.monotonic() - start:.1f} s", flush=True)
        print("  slots:", [x["head_slots"] or x["slots"] for x in model.config.kernelize["layers"]], flush=True)


def model_of(name: str, source: str, folder: Path, **loading: str) -> tuple:
    """(model, tokenizer) of one of MODELS."""
    if name != WITHOUT:
        return load(source if name == "teacher" else folder / name, **loading)
    model, tokenizer = load(folder / "shared", **loading)
    for layer in kernelized_layers(model).values():
        with torch.no_grad():
            layer.kernelize.log_gate.fill_(-1e4)
    return model, tokenizer


def suites(data: Path, book: str, pieces: int) -> dict[str, Suite]:
    wiki, novel = str(data / "eval/wikitext2_test.jsonl"), str(data / f"longdocs/{book}.txt.xz")
    return {
        "wikitext": Perplexity(lengths=(2048,), pieces=pieces, text=wiki, chunk=2048),
        "passkey": Passkey(lengths=(512, 1024, 2048), chunk=2048),
        "book": Perplexity(lengths=(8192,), pieces=2, text=novel, chunk=2048),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--source", default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pieces", type=int, default=24)
    parser.add_argument("--book", default="middlemarch")
    parser.add_argument("--model", action="append", choices=MODELS, help="more than once; by default all")
    parser.add_argument("--suite", action="append", choices=("wikitext", "passkey", "book"), help="by default all")
    args = parser.parse_args()
    source, folder = args.source or str(demo_source()), args.output / "models"
    names = args.model or MODELS
    make(source, folder, names)
    compared = {name: model_of(name, source, folder, dtype=args.dtype, device=args.device) for name in names}
    for name, suite in suites(args.data, args.book, args.pieces).items():
        if not args.suite or name in args.suite:
            measure(name, suite, compared, args.output)


def measure(name: str, suite: Suite, compared: dict[str, tuple], output: Path) -> None:
    start = time.monotonic()
    rows = evaluate(compared, [suite], cache=output / "measured.jsonl")
    save_rows(rows, output / f"{name}.json")
    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    for row in rows:
        if row.metric in METRICS and row.depth is None:
            interval = f"[{row.low:.4f}, {row.high:.4f}]"
            print(f"  {row.model:22s} {row.metric:8s} {row.length:6d} {row.value:.4f} {interval}", flush=True)
    write_report(rows, output / name)


if __name__ == "__main__":
    main()
