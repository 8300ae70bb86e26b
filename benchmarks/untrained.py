"""What conversion alone keeps: teacher, untrained windows, and kernelized models with uniform and shared-out slots.

    python benchmarks/untrained.py --data DATA --output OUT [--device cuda] [--source MODEL]

DATA holds eval/wikitext2_test.jsonl (rows with a column `text`, joined) and longdocs/*.txt.xz. Everything that is
converted holds 260 positions a key head on average, but the window of 64. The rows go to OUT/rows.json and the
pictures beside it; a run that was stopped goes on from OUT/measured.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

from kernelize.budget import budget_texts
from kernelize.convert import convert, demo_source, load
from kernelize.evaluate import Passkey, Perplexity, evaluate, sample_text, save_rows
from kernelize.pipeline import calibration
from kernelize.plan import ConversionPlan
from kernelize.report import write_report
from kernelize.runtime.spec import KernelSpec

PLAIN = KernelSpec(feature_map="none", policy="attention", slots=0, block=1)


def models(source: str, device: str) -> dict[str, tuple]:
    """Name -> (model, tokenizer), all from one teacher."""
    teacher, tokenizer = load(source, dtype="float32", device=device)
    layers = teacher.config.num_hidden_layers
    texts = {
        "calibration": calibration(tokenizer, teacher),
        "budget": budget_texts(tokenizer, sample_text("train"), 2048),
    }

    def kernelized(spec: KernelSpec, *given: str):
        options = {name: texts[name] for name in given}
        return convert(copy.deepcopy(teacher), ConversionPlan.uniform(spec, layers), **options), tokenizer

    start = time.monotonic()
    spec = KernelSpec(aging=1024)
    auto = kernelized(spec, "calibration", "budget")
    print(f"converted with budget and calibration in {time.monotonic() - start:.1f} s", flush=True)
    print("slots a layer:", [spec["slots"] for spec in auto[0].config.kernelize["layers"]], flush=True)
    return {
        "teacher": (teacher, tokenizer),
        "window 64": kernelized(PLAIN.replace(window=64)),
        "window 256": kernelized(PLAIN.replace(window=256)),
        "kernelized, equal slots": kernelized(spec, "calibration"),
        "kernelized, shared slots": auto,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--source", default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pieces", type=int, default=24)
    parser.add_argument("--book", default="middlemarch")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    wiki = Perplexity(
        lengths=(2048,), pieces=args.pieces, text=str(args.data / "eval/wikitext2_test.jsonl"), chunk=2048
    )
    book = Perplexity(
        lengths=(2048, 8192, 16384), pieces=2, text=str(args.data / f"longdocs/{args.book}.txt.xz"), chunk=2048
    )
    compared = models(args.source or str(demo_source()), args.device)
    for name, suite in (("wikitext", wiki), ("passkey", Passkey(chunk=2048)), ("book", book)):
        start = time.monotonic()
        rows = evaluate(compared, [suite], cache=args.output / "measured.jsonl")
        save_rows(rows, args.output / f"{name}.json")
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        for row in rows:
            if row.metric in ("ppl", "ppl_at", "kl", "passkey") and row.depth is None:
                interval = f"[{row.low:.4f}, {row.high:.4f}]"
                print(f"  {row.model:26s} {row.metric:8s} {row.length:6d} {row.value:.4f} {interval}", flush=True)
        write_report(rows, args.output / name)


if __name__ == "__main__":
    main()
