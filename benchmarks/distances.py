"""How far back a model still finds a fact: the loss of answers when all that is far is shown at one distance.

    python benchmarks/distances.py CONVERTED --data DATA [--distances 512 4096 8192]

CONVERTED is an untrained or trained conversion with rotary positions. Its sinks and slots beyond `--near` tokens are
shown as if they stood V tokens back, for each V; the text is training text of DATA (see recipes.py) in which the
package's own retrieval tasks hide facts and ask for them. A V at which answers cost much is no `reach` for a recipe.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from recipes import at_reach, mixture
from torch import Tensor

from kernelize.convert import load
from kernelize.data import Documents, Row, Rows, batches
from kernelize.runtime.state import Rotation


@contextmanager
def shown_at(distance: int) -> Iterator[None]:
    """What is beyond reach stands so far back, whatever the reach is."""
    plain = Rotation.turn

    def turn(self: Rotation, x: Tensor, pos: Tensor, to: float) -> Tensor:
        return plain(self, x, pos, distance if to else 0)  # keys are turned to 0

    Rotation.turn = turn  # type: ignore[method-assign]
    try:
        yield
    finally:
        Rotation.turn = plain  # type: ignore[method-assign]


@torch.inference_mode()
def answer_logits(model: Any, ids: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """What a model says before each token of an answer, [N, V] float32, and the tokens that stand there, [N].

    ids [b, T]; answers [b, T] bool.
    """
    ids, asked = ids.to(model.device), answers[:, 1:].to(model.device)
    return model(input_ids=ids, use_cache=False).logits[:, :-1][asked].float(), ids[:, 1:][asked]


def answers(model: Any, rows: list[Row]) -> tuple[float, float]:
    """(loss of an answer's tokens in nats, how many of them would be chosen)."""
    losses, right = [], []
    for row in rows:
        logits, labels = answer_logits(model, row.input_ids, row.answers)
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
        right.append((logits.argmax(-1) == labels).float())
    return float(torch.cat(losses).mean()), float(torch.cat(right).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--near", type=int, default=400, help="tokens within which distances stay as they are")
    parser.add_argument("--distances", type=int, nargs="+", default=[512, 1024, 2048, 4096, 6000, 8000, 8192, 16384])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    args = parser.parse_args()
    model, tokenizer = load(args.model, dtype="float32")
    source = Rows(Documents(mixture(args.data, {"retrieval"}), seed=0), tokenizer, args.length, joined=True)
    rows, _ = next(iter(batches(source(None), args.rows, 1, 0, 1)))
    print("true distances: loss {:.3f}, right {:.2f}".format(*answers(at_reach(model, 0), rows)), flush=True)
    at_reach(model, args.near)
    for distance in args.distances:
        with shown_at(distance):
            print(f"{distance}: loss {{:.3f}}, right {{:.2f}}".format(*answers(model, rows)), flush=True)


if __name__ == "__main__":
    main()
