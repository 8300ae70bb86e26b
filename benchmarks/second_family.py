"""Whether the default recipe is tuned to one checkpoint: the same recipe, unchanged, on a small GPT-NeoX trained here.

    python benchmarks/second_family.py --data DATA --output OUT --minutes 9.5 --device cuda [--beside OUT_OF_RECIPES]

The GPT-NeoX (another attention class, partial rotary positions, LayerNorms, parallel residuals) learns the text of
benchmarks/recipes.py for `--pretrain-minutes`. A recipe can recover only what its teacher takes from far back, so the
teacher is taught to look there: rows of 8192 tokens, documents that ask for what stands in them, and a loss to which
their answers count as much as all other tokens together; at first short rows of such documents alone, in which looking
back is learned soonest.

Then recipes.py converts it and trains `default`, and beside it converts the untrained control of as many positions. All
three are measured on wikitext, on a novel in pieces of 8192, and on answers to what is hidden in another novel; neither
novel is training text. Of the gap in nats between control and teacher, and of the control's divergence from the
teacher, the recipe recovers a share. Where the low end of the gap's interval over pieces is no more than .001, or than
what another rounding of the teacher's numbers makes of it, there is none to recover, which is said instead. `--beside`
reads the same shares of the first family from there.

A run that was stopped goes on where it was, but for the pretraining, which is done in one go.
"""

from __future__ import annotations

import argparse
import itertools
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from distances import answer_logits
from recipes import BOOK, TEACHER, WIKI, Clock, TimeUpError, mixture, source_of
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from kernelize.convert import load, load_tokenizer, save
from kernelize.data import HAYSTACK_PER_TOKEN, Documents, Rows, batches, encode_retrieval, haystacks, prefetched
from kernelize.data import Row as TextRow
from kernelize.evaluate import Perplexity, Row, Subject, evaluate, load_rows, save_rows
from kernelize.retrieval import KINDS
from kernelize.suites import Record, Tick, Unit, Work

LENGTH = 8192  # tokens that the teacher is trained for, as the first family's
BATCH, MICRO = 65_536, 32_768  # tokens of a batch, and at a time
RATE, WARMUP, LEAST = 1e-3, 200, 0.05  # learning rate, steps until it is reached, its part at the end
SHAPE = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 2048}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
HAYSTACK = "longdocs/war-and-peace.txt.xz"  # in which the measured answers are hidden
CONTROL, MINE, ROUNDED = "window-only.0", "default.0", "teacher rounded otherwise"
FOLDERS = {TEACHER: "gpt-neox", CONTROL: "converted/window-only", MINE: "default.0"}
LEAST_GAP = 0.001  # nats; less is none, however sure
DTYPES = ("float32", "bfloat16")  # of all models on a CPU and on a GPU; the teacher is measured in the other one, too


class Phase(NamedTuple):
    """A part of the pretraining: until when (1: the end), tokens of a row, origins of the text as in `mixture`."""

    until: float
    length: int
    origins: set[str | None]


PHASES = (Phase(0.25, 1024, {"retrieval"}), Phase(1.0, LENGTH, {None, "retrieval"}))


# --- the teacher ----------------------------------------------------------------------------------------------


def new_model(tokenizer: Any, trial: bool) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    shape = TINY if trial else SHAPE
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPTNeoXConfig(vocab_size=len(tokenizer), max_position_embeddings=LENGTH, rotary_pct=0.25, **shape, **ends)
    return GPTNeoXForCausalLM(config)


def rate(step: int, part: float) -> float:
    """Linear up, then a cosine down over the `part` of the time that has passed."""
    return min(1.0, (step + 1) / WARMUP) * (LEAST + (1 - LEAST) * (1 + math.cos(math.pi * min(1.0, part))) / 2)


def text(phase: Phase, tokenizer: Any, args: argparse.Namespace) -> Iterator[list[TextRow]]:
    """Global batches without end, as micro-batches [b, T]; of a trial two small ones."""
    length, batch, micro = (128, 256, 128) if args.trial else (phase.length, BATCH, MICRO)
    documents = Documents(mixture(args.data, phase.origins), seed=0, haystack=HAYSTACK_PER_TOKEN * length)
    rows = Rows(documents, tokenizer, length, joined=True)
    ahead = prefetched(batches(rows(None), batch // length, micro // length))
    return (rows for rows, _ in itertools.islice(ahead, 2 if args.trial else None))


def step_on(model: Any, rows: list[TextRow], device: str) -> Tensor:
    """Gradients of a global batch's mean cross-entropy plus that of its answers alone; returns the two, [2]."""
    counts = torch.tensor([sum(row.labels[:, 1:].numel() for row in rows), sum(int(row.answers.sum()) for row in rows)])
    counts, total = counts.clamp(min=1).to(device), torch.zeros(2, device=device)
    for row in rows:
        labels = F.pad(row.labels[:, 1:], (0, 1), value=-100).to(device)  # of the next token: no copy of the logits
        asked = F.pad(row.answers[:, 1:], (0, 1)).to(device)
        with torch.autocast(device.partition(":")[0], torch.bfloat16):
            logits = model(input_ids=row.input_ids.to(device), use_cache=False).logits
            each = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")  # [b T]
        means = torch.stack((each.sum(), (each * asked.flatten()).sum())) / counts
        means.sum().backward()
        total += means.detach()
    return total


def pretrain(output: Path, args: argparse.Namespace) -> None:
    """Trains the model from nothing for so many minutes, and saves it."""
    tokenizer = load_tokenizer(source_of(args))
    model = new_model(tokenizer, args.trial).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    began, step, tokens = time.monotonic(), 0, 0
    for phase in PHASES:
        for rows in text(phase, tokenizer, args):
            seconds = time.monotonic() - began
            if (part := seconds / (60 * args.pretrain_minutes)) >= phase.until:
                break
            for group in optimizer.param_groups:
                group["lr"] = RATE * rate(step, part)
            losses = step_on(model, rows, args.device)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step, tokens = step + 1, tokens + sum(row.input_ids.numel() for row in rows)
            if step % 100 == 0:
                mean, answers = losses.tolist()
                print(f"pretraining {step}, rows of {phase.length}: loss {mean:.3f}, of answers {answers:.3f}, "
                      f"{tokens / (time.monotonic() - began):,.0f} tokens/s", flush=True)  # fmt: skip
    print(f"pretrained on {tokens / 1e6:.1f}M tokens in {time.monotonic() - began:.0f} s", flush=True)
    save(model.eval(), tokenizer, output)


# --- what is measured -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers(Perplexity):
    """The same of the tokens of answers alone: each piece is a document as long as the longest of `lengths`, and asks
    for something that stands in it; the package's own kinds of task in turn."""

    kind = "answers"

    @property
    def edges(self) -> tuple[int, ...]:
        return (self.reach,)

    def units(self, tokenizer: Any) -> list[Unit]:
        texts = itertools.cycle(haystacks(self.text, "text", HAYSTACK_PER_TOKEN * self.reach))
        kinds, found = itertools.cycle(KINDS), list[Unit]()
        for number in range(self.pieces or 0):
            seed = f"{self.kind} {self.seed} {number}"  # no seed of a training document is made like that
            document = encode_retrieval(
                next(texts)["haystack"], tokenizer, seed, self.reach, shortest=self.reach, kind=next(kinds)
            )
            if any(document.answers[1:]):
                found.append(Unit([document.ids], {"answers": document.answers}, len(document.ids)))
        return found

    def measure(self, work: Work, reference: tuple[Subject, Unit] | None, tick: Tick) -> list[Record]:
        theirs = _logits(*reference)[0].log_softmax(-1) if reference else None
        records = []
        for subject, unit in work:
            logits, labels = _logits(subject, unit)
            records.append(_record(logits.log_softmax(-1), labels, None if subject.name == TEACHER else theirs))
            tick(unit.cost)
        return records


def _logits(subject: Subject, unit: Unit) -> tuple[Tensor, Tensor]:
    return answer_logits(subject.model, torch.tensor(unit.ids), torch.tensor([unit.settings["answers"]]))


def _record(scores: Tensor, labels: Tensor, theirs: Tensor | None) -> Record:
    """Sums over N answer tokens as `Perplexity` keeps them; scores and theirs [N, V] log probabilities, labels [N]."""
    nll = F.nll_loss(scores, labels, reduction="sum").item()
    record: Record = {"nll": [nll], "count": [len(labels)], "bytes": [], "trained": None, "excess": None, "kl": None}
    if theirs is not None:
        record["excess"] = [nll - F.nll_loss(theirs, labels, reduction="sum").item()]
        record["kl"] = [F.kl_div(scores, theirs, reduction="sum", log_target=True).clamp(min=0).item()]
    return record


def suites(args: argparse.Namespace) -> dict[str, Perplexity]:
    wiki, book, hidden = (str(args.data / name) for name in (WIKI, BOOK, HAYSTACK))
    if args.trial:
        return {
            "wikitext": Perplexity(lengths=(512,), pieces=2, text=wiki),
            "book": Perplexity(lengths=(1024,), pieces=2, text=book),
            "answers": Answers(lengths=(1024,), pieces=2 * len(KINDS), text=hidden),
        }
    chunk = LENGTH if args.device.startswith("cuda") else 2048  # tokens whose logits are kept
    return {
        "wikitext": Perplexity(lengths=(2048,), pieces=None, text=wiki, chunk=2048),
        "book": Perplexity(lengths=(LENGTH,), pieces=None, text=book, chunk=chunk),
        "answers": Answers(lengths=(LENGTH,), pieces=20 * len(KINDS), text=hidden),
    }


def measure(args: argparse.Namespace, clock: Clock) -> None:
    """Rows of teacher, control and recipe to OUT/rows; what was measured before is in a cache."""
    other, dtype = DTYPES if args.device.startswith("cuda") else DTYPES[::-1]
    found = {name: load(str(args.output / folder), device=args.device, dtype=dtype) for name, folder in FOLDERS.items()}
    found[ROUNDED] = load(str(args.output / FOLDERS[TEACHER]), device=args.device, dtype=other)
    tokenizer = found[TEACHER][1]  # one object: texts are cut once
    models = {name: (model, tokenizer) for name, (model, _) in found.items()}
    (args.output / "rows").mkdir(exist_ok=True)
    for name, suite in suites(args).items():
        rows = evaluate(models, [suite], cache=args.output / f"measured-{name}.jsonl", on_progress=clock)
        save_rows(rows, args.output / f"rows/{name}.json")


# --- what it says ---------------------------------------------------------------------------------------------


class Gap(NamedTuple):
    """How far control and recipe are from the teacher, in nats a token, each with its interval over pieces."""

    control: tuple[float, float, float]  # value, low, high
    mine: tuple[float, float, float]
    rounding: float  # how far the teacher is from itself in other numbers, at most; 0 where that was not measured

    @property
    def exists(self) -> bool:
        return self.control[1] > max(LEAST_GAP, self.rounding)

    def share(self) -> tuple[float, float, float]:
        """Of it recovered, with the interval that the recipe's own distance has."""
        value, low, high = (1 - distance / self.control[0] for distance in self.mine)
        return value, high, low


def gap(rows: list[Row], metric: str, length: int) -> Gap | None:
    """By `ppl_ratio`, which is paired piece by piece, or `kl`; None where the rows lack one of the two models."""
    of = math.log if metric == "ppl_ratio" else float
    found = {row.model: (of(row.value), of(row.low), of(row.high))
             for row in rows if (row.metric, row.length) == (metric, length) and row.low is not None}  # fmt: skip
    if not {CONTROL, MINE} <= set(found):
        return None
    return Gap(found[CONTROL], found[MINE], max(map(abs, found.get(ROUNDED, (0.0,)))))


def interval(numbers: tuple[float, float, float], digits: int = 4) -> str:
    return "{0:.{n}f} [{1:.{n}f}, {2:.{n}f}]".format(*numbers, n=digits)


def share_of(found: Gap | None) -> str:
    if found is None:
        return "not measured"
    if not found.exists:
        return (f"no gap to recover: the control is {interval(found.control)} from the teacher, "
                f"the recipe {interval(found.mine)}, rounding up to {found.rounding:.4f}")  # fmt: skip
    return f"{interval(found.share(), 2)} recovered of a gap of {interval(found.control)}"


def lines(name: str, length: int, rows: list[Row], beside: list[Row] | None) -> Iterator[str]:
    """A line for the loss and one for the divergence. beside: the first family's rows, if it is to be compared."""
    losses = {row.model: math.log(row.value) for row in rows if (row.metric, row.length) == ("ppl", length)}
    divergence = {row.model: row.value for row in rows if (row.metric, row.length) == ("kl", length)} | {TEACHER: 0.0}
    for what, metric, values in (("loss", "ppl_ratio", losses), ("KL", "kl", divergence)):
        each = ", ".join(f"{model} {values[model]:.4f}" for model in (TEACHER, CONTROL, MINE))
        other = "" if beside is None else f"; the first family: {share_of(gap(beside, metric, length))}"
        yield f"{name} {length}, {what}: {each}; {share_of(gap(rows, metric, length))}{other}"


def report(args: argparse.Namespace) -> None:
    print("nats a token; in brackets 95 % over pieces, the shares' by the recipe's own distance")
    for name, suite in suites(args).items():
        beside, other = None, args.beside and args.beside / f"rows/{name}.json"
        if other:
            beside = load_rows(other) if other.exists() else []
        for line in lines(name, suite.reach, load_rows(args.output / f"rows/{name}.json"), beside):
            print(line)


# --- the command ----------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, clock: Clock) -> None:
    """What recipes.py makes of the teacher. Raises TimeUpError if it had to stop before all was there."""
    rest = ["--minutes", str(max(0.0, clock.end - time.time()) / 60)] if args.minutes else []
    rest += ["--trial"] if args.trial else []
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("recipes.py")), "--data", args.data, "--output", args.output,
         "--source", args.output / FOLDERS[TEACHER], "--recipes", "default", "window-only", "--only", "train",
         "--device", args.device, *rest],
        check=True,
    )  # fmt: skip
    if not all((args.output / folder / "config.json").is_file() for folder in FOLDERS.values()):
        raise TimeUpError


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--source", help="whose tokenizer it gets; by default the demo's SmolLM2-135M-Instruct")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=None, help="of all, pretraining included, to go on next time")
    parser.add_argument("--pretrain-minutes", type=float, default=8)
    parser.add_argument("--beside", type=Path, default=None, help="the output folder of recipes.py on the first family")
    parser.add_argument("--trial", action="store_true", help="a tiny model, a few steps: whether all of it runs")
    return parser.parse_args()


def main() -> None:
    args = parse()
    clock, teacher = Clock.of(args.minutes), args.output / FOLDERS[TEACHER]
    if not (teacher / "config.json").is_file():
        pretrain(teacher, args)
        torch.cuda.empty_cache()  # other processes train next
    try:
        train(args, clock)
        measure(args, clock)
    except TimeUpError:
        print("time is up; the same command goes on from here")
        return
    report(args)


if __name__ == "__main__":
    main()
