"""What int4 costs weights that are on no grid of sixteen levels: a converted checkpoint, shaken by half a step.

    python benchmarks/int4_loss.py out --text wikitext2_test.jsonl --pieces 2

Weights from a 4-bit GGUF file lie on such a grid, and `kernelize quantize --bits 4` then loses nothing; trained weights
do not. Every linear weight is moved by up to half a step of its group, evenly drawn; the shaken model is compared with
its own int4.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch

from kernelize.convert import load
from kernelize.evaluate import evaluate, make_suite
from kernelize.quantize import GROUP, LEVELS, linear_layers, quantize_model


@torch.no_grad()
def shake(model) -> None:
    """Moves every weight that int4 would take by up to half a step of its group."""
    random = torch.Generator().manual_seed(0)
    for module in linear_layers(model, 4).values():
        groups = module.weight.view(module.out_features, -1, GROUP)  # [O, G, 32]
        low, high = groups.aminmax(dim=-1, keepdim=True)
        groups.add_((torch.rand(groups.shape, generator=random) - 0.5) * (high - low) / LEVELS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--text", default="novel")
    parser.add_argument("--pieces", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    whole, tokenizer = load(given.folder, dtype="float32")
    shake(whole)
    quantised = copy.deepcopy(whole)
    quantize_model(quantised, 4)
    suite = make_suite("ppl", quick=True, text=given.text, pieces=given.pieces)
    rows = evaluate({"teacher": (whole, tokenizer), "int4": (quantised, tokenizer)}, [suite])
    found = {f"{row.model} {row.metric}": row.value for row in rows if row.metric in ("ppl", "ppl_ratio", "kl")}
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
