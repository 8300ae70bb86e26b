"""Whether the default recipe is tuned to one checkpoint: the same recipe, unchanged, on a small GPT-NeoX trained here.

    python benchmarks/second_family.py --data DATA --output OUT --minutes 9 --device cuda [--beside OUT_OF_RECIPES]

The GPT-NeoX (another attention class, partial rotary positions, LayerNorms, parallel residuals) learns the text of
benchmarks/recipes.py for `--pretrain-minutes`; then recipes.py trains `default` on it and measures that beside the
untrained control of as many positions. Of the gap in log perplexity between control and teacher, the recipe recovers a
share; `--beside` reads the same share of the first family from there. A run that was stopped goes on where it was, but
for the pretraining, which is done in one go.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from recipes import mixture
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from kernelize.convert import demo_source, load, save
from kernelize.data import Documents, Rows, batches, prefetched
from kernelize.evaluate import load_rows

LENGTH, ROWS, MICRO = 2048, 32, 16  # tokens of a row; rows of a batch, and at a time
RATE, WARMUP, LEAST = 1e-3, 200, 0.05  # learning rate, steps until it is reached, its part at the end
SHAPE = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 2048}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
SUITE, METRIC = "wikitext", "ppl"


def new_model(tokenizer: Any, trial: bool) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    shape = TINY if trial else SHAPE
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPTNeoXConfig(vocab_size=len(tokenizer), max_position_embeddings=LENGTH, rotary_pct=0.25, **shape, **ends)
    return GPTNeoXForCausalLM(config)


def rate(step: int, part: float) -> float:
    """Linear up, then a cosine down over the `part` of the time that has passed."""
    return min(1.0, (step + 1) / WARMUP) * (LEAST + (1 - LEAST) * (1 + math.cos(math.pi * min(1.0, part))) / 2)


def step_on(model: Any, rows: list[Any], device: str) -> Tensor:
    """Gradients of the mean cross-entropy of a global batch; returns it."""
    total = torch.zeros((), device=device)
    for row in rows:
        ids, labels = row.input_ids.to(device), row.labels.to(device)
        with torch.autocast(device.partition(":")[0], torch.bfloat16):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss / len(rows)
        loss.backward()
        total += loss.detach()
    return total


def pretrain(output: Path, args: argparse.Namespace) -> None:
    """Trains the model from nothing for so many minutes, and saves it."""
    _, tokenizer = load(str(demo_source()))
    model = new_model(tokenizer, args.trial).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    length, count, micro = (128, 2, 1) if args.trial else (LENGTH, ROWS, MICRO)
    rows = Rows(Documents(mixture(args.data, {None}), seed=0), tokenizer, length, joined=True)
    began, seconds, step = time.monotonic(), 60 * args.pretrain_minutes, 0
    for batch, _ in prefetched(batches(rows(None), count, micro, 0, 1)):
        part = (time.monotonic() - began) / seconds
        if part >= 1 or (args.trial and step == 3):
            break
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate(step, part)
        loss = step_on(model, batch, args.device)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 100 == 0:
            speed = step * count * length / (time.monotonic() - began)
            print(f"pretraining {step}: loss {float(loss):.3f}, {speed:,.0f} tokens/s", flush=True)
    print(f"pretrained on {step * count * length / 1e6:.1f}M tokens", flush=True)
    save(model.eval(), tokenizer, output)


def recovered(folder: Path, control: str = "window-only.0", mine: str = "default.0") -> float:
    """The share of the gap in log perplexity, from the control's to the teacher's, that the recipe closes."""
    rows = load_rows(folder / f"rows/{SUITE}.json")
    found = {row.model: math.log(row.value) for row in rows if row.metric == METRIC}
    return (found[control] - found[mine]) / (found[control] - found["teacher"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=None, help="of recipes.py, after the pretraining")
    parser.add_argument("--pretrain-minutes", type=float, default=8)
    parser.add_argument("--beside", type=Path, default=None, help="the output folder of recipes.py on the first family")
    parser.add_argument("--trial", action="store_true", help="a tiny model, a few steps: whether all of it runs")
    args = parser.parse_args()
    teacher = args.output / "gpt-neox"
    if not (teacher / "config.json").is_file():
        pretrain(teacher, args)
    rest = ["--minutes", str(args.minutes)] if args.minutes else []
    rest += ["--trial"] if args.trial else []
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("recipes.py")), "--data", args.data, "--output", args.output,
         "--source", teacher, "--recipes", "default", "window-only", "--untrained", "--only", "train", "measure",
         "--suites", SUITE, "--device", args.device, *rest],
        check=True,
    )  # fmt: skip
    if not (args.output / f"rows/{SUITE}.json").exists():
        return
    share = recovered(args.output)
    print(f"gpt-neox: {share:.3f} of the gap between control and teacher is closed")
    if args.beside:
        first = recovered(args.beside)
        print(f"the first family: {first:.3f}; ratio {share / first:.3f}")


if __name__ == "__main__":
    main()
