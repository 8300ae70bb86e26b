"""A long document on two CPU cores without torch: speed and memory while it is read, and beside another export.

    python examples/edge/long_document.py EXPORTED book.txt --tokens 32768 [--beside OTHER]

`kernelize export CHECKPOINT --precision int8 -o EXPORTED` makes the folder. For the original as OTHER, see
benchmarks/edge.py: it is exported by the same command, with a window of the whole context.
"""

from __future__ import annotations

import argparse
import resource
import time

from kernelize.edge import EdgeModel

STEPS = 32


def read(folder: str, text: str, tokens: int) -> None:
    """Reads up to `tokens` tokens of the text, and tells at every doubling how long tokens take then."""
    model = EdgeModel(folder, threads=2)
    state, ids = model.start(), model.encode(text)[:tokens]
    print(f"{folder}: {model.facts['precision']}, {sum(model.facts['files'].values()) / 1e6:,.1f} MB")
    print(
        f"{'tokens read':>12} {'reading, tokens/s':>18} {'writing, tokens/s':>18} {'state, MB':>10} {'process, MB':>12}"
    )
    at, end = 0, 512
    while at < len(ids):
        end = min(end, len(ids))
        start = time.monotonic()
        model.read(state, [ids[at:end]])
        speed = (end - at) / (time.monotonic() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(f"{end:12,} {speed:18,.1f} {writing(model, state):18,.1f} {state.nbytes / 1e6:10,.2f} {peak:12,.0f}")
        at, end = end, end * 2


def writing(model: EdgeModel, state) -> float:
    """Tokens a second from here, on a copy: the document goes on where it was."""
    ahead, start = state.copy(), time.monotonic()
    for _ in range(STEPS):
        model.step(ahead, ahead.logits.argmax(-1))
    return STEPS / (time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exported")
    parser.add_argument("document")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--beside", help="another exported folder that reads the same")
    options = parser.parse_args()
    with open(options.document, encoding="utf-8") as file:
        text = file.read()
    for folder in (options.exported, options.beside):
        if folder:
            read(folder, text, options.tokens)


if __name__ == "__main__":
    main()
