"""A kernelized checkpoint and its original under ONNX Runtime, after 512 and 32k tokens.

    python benchmarks/edge.py CHECKPOINT --teacher SOURCE --document BOOK.txt --text WIKITEXT.jsonl --output edge-bench

Every number is in OUTPUT/rows.json as soon as it is measured; a second call measures what is missing. Each row is
measured in a process of its own, whose peak of memory it gives. The original is exported by the same command: as a
kernelized model whose window is the whole context, which is softmax attention with keys and values in one buffer. Its
32k tokens are random keys and values: reading them takes it half an hour, and a step costs the same.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

LENGTHS = (512, 32768)
PRECISIONS = ("fp32", "int8", "int8-float", "int4")
STEPS = 96  # that are timed: a multiple of the block, so that as many blocks end at every length
PROMPT, PARITY_STEPS = 1024, 200
ROWS, PIECE = 8, 768  # of the text whose loss is measured: rows that are read at once, tokens of each
SKIPPED = 256  # first tokens of a row, which window and slots hold exactly


# --- what is exported ---------------------------------------------------------------------------------------


def export_all(options: argparse.Namespace) -> None:
    """The checkpoint in every precision, traced once; and the original in int8."""
    import onnx_ir as ir

    from kernelize.convert import load
    from kernelize.export import Graphs, export_model, trace_graphs, write_graphs

    output = Path(options.output)
    wanted = [precision for precision in PRECISIONS if not (output / precision).exists()]
    if wanted:
        model, tokenizer = load(options.checkpoint, dtype="float32")
        if "fp32" in wanted:
            graphs = trace_graphs(model, Path(options.checkpoint).name, print)
            write_graphs(graphs, model, tokenizer, output / "fp32", "fp32")
        facts = json.loads((output / "fp32" / "kernelize-edge.json").read_text("utf-8"))
        for precision in wanted:
            if precision != "fp32":
                parts = (ir.load(output / "fp32" / f"{name}.onnx") for name in ("model", "leave"))
                write_graphs(Graphs(*parts, facts), model, tokenizer, output / precision, precision)
    if options.teacher and not (output / "teacher").exists():
        model, tokenizer = load(options.teacher, dtype="float32")
        export_model(as_one_window(model), tokenizer, output / "teacher", precision="int8", name="teacher")


def as_one_window(model):
    """The original as a kernelized model that keeps all keys and values."""
    from kernelize.convert import convert
    from kernelize.plan import ConversionPlan
    from kernelize.runtime.spec import KernelSpec

    room = max(LENGTHS) + 2 * STEPS
    spec = KernelSpec(feature_map="none", window=room, sinks=0, slots=0, policy="attention", decay="none")
    return convert(model, ConversionPlan.uniform(spec, model.config.num_hidden_layers))


# --- rows ---------------------------------------------------------------------------------------------------


def decoding(options: argparse.Namespace, name: str, length: int) -> dict:
    """A document is read, then its further tokens one by one."""
    from kernelize.edge import EdgeModel

    model = EdgeModel(Path(options.output) / name, threads=options.threads)
    ids = document(options, model, length + STEPS)
    state, start = model.start(), time.monotonic()
    if name == "teacher":
        fill(state, length)
    else:
        model.read(state, [ids[:length]])
    read, times, began = time.monotonic() - start, [], time.process_time()
    for token in ids[length:]:
        start = time.monotonic()
        model.step(state, [token])
        times.append(time.monotonic() - start)
    row = {"tokens_per_second": STEPS / sum(times), "median_milliseconds": 1e3 * float(np.median(times))}
    row |= {"tokens_per_cpu_second": STEPS / (time.process_time() - began), "threads": options.threads}
    row |= {"state_bytes": state.nbytes, "file_bytes": model.facts["files"]["weights.bin"]}
    return row if name == "teacher" else row | {"read_tokens_per_second": length / read}


def document(options: argparse.Namespace, model, length: int) -> list[int]:
    ids = model.encode(Path(options.document).read_text("utf-8"))
    return (ids * -(-length // len(ids)))[:length]


def fill(state, length: int) -> None:
    """Keys and values of `length` tokens that nobody computed."""
    random = np.random.default_rng(0)
    for name, array in state.arrays.items():
        if name.startswith(("keys.", "values.")):
            array[:, :, :length] = random.standard_normal((1, 1, length, array.shape[-1]), np.float32)
    state.arrays["pos"].reshape(-1, state.arrays["keys.0"].shape[2])[:, :length] = np.arange(length)
    state.seen[:] = length


def parity(options: argparse.Namespace, name: str) -> dict:
    """The largest difference of logits to PyTorch over steps after a prompt, relative to the largest logit."""
    import torch

    from kernelize.convert import load
    from kernelize.edge import EdgeModel

    edge, (model, _) = EdgeModel(Path(options.output) / name, threads=2), load(options.checkpoint, dtype="float32")
    ids = document(options, edge, PROMPT + PARITY_STEPS)
    state, worst = edge.start(), 0.0
    with torch.no_grad():
        wanted = model(torch.tensor([ids]), use_cache=False).logits[0, PROMPT - 1 :].double().numpy()
    edge.read(state, [ids[:PROMPT]])
    for n in range(PARITY_STEPS + 1):
        worst = max(worst, float(np.abs(state.logits[0] - wanted[n]).max()) / max(1.0, float(np.abs(wanted[n]).max())))
        if n < PARITY_STEPS:
            edge.step(state, [ids[PROMPT + n]])
    return {"largest_difference": worst, "steps": PARITY_STEPS, "prompt": PROMPT}


def loss(options: argparse.Namespace, name: str) -> dict:
    """Nats a token of the last tokens of each row, every one written by a step."""
    from kernelize.edge import EdgeModel

    model = EdgeModel(Path(options.output) / name, threads=2)
    text = "".join(json.loads(line)["text"] for line in Path(options.text).read_text("utf-8").splitlines())
    ids = np.array(model.encode(text)[: ROWS * PIECE]).reshape(ROWS, PIECE)
    state, nats = model.start(ROWS), []
    model.read(state, ids[:, :SKIPPED])
    for n in range(SKIPPED, PIECE):
        scores = state.logits - state.logits.max(-1, keepdims=True)
        nats.append(np.log(np.exp(scores).sum(-1)) - scores[np.arange(ROWS), ids[:, n]])
        model.step(state, ids[:, n])
    return {"nats": float(np.mean(nats)), "tokens": ROWS * (PIECE - SKIPPED)}


def rows(options: argparse.Namespace) -> list[list]:
    """What is to be measured: the name of a function above and its further arguments."""
    wanted: list[list] = [["parity", "fp32"]]
    wanted += [["loss", name] for name in PRECISIONS] if options.text else []
    wanted += [["decoding", name, length] for name in ("int8", "int4") for length in LENGTHS]
    return wanted + ([["decoding", "teacher", max(LENGTHS)]] if options.teacher else [])


def measure(options: argparse.Namespace) -> None:
    """One row, in this process; printed as JSON."""
    what, *arguments = json.loads(options.row)
    row = {"decoding": decoding, "parity": parity, "loss": loss}[what](options, *arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"row": [what, *arguments], **row, "peak_bytes": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a kernelized checkpoint")
    parser.add_argument("--teacher", help="its original")
    parser.add_argument("--document", required=True, help="a text of 33k tokens; a shorter one is repeated")
    parser.add_argument("--text", help="JSON lines with a field text, for the loss")
    parser.add_argument("--output", required=True, help="folder for exports and rows.json")
    parser.add_argument("--threads", type=int, default=2, help="of the rows about decoding (default 2)")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        measure(options)
        return
    export_all(options)
    path = Path(options.output) / "rows.json"
    done = json.loads(path.read_text("utf-8")) if path.exists() else []
    for row in rows(options):
        if row not in [old["row"] for old in done]:
            command = [sys.executable, *sys.argv, "--row", json.dumps(row)]
            found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            done.append(json.loads(found.splitlines()[-1]))
            path.write_text(json.dumps(done, indent=1) + "\n", "utf-8")
        print(done[[old["row"] for old in done].index(row)])


if __name__ == "__main__":
    main()
