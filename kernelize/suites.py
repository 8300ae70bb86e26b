"""Suites: what is asked of a model, cut into units of work; a unit leaves one record, rows are computed from records.

Question sets and lm-eval are suites too: `kernelize.question_suites`.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .completion import COMPLETIONS, exact
from .errors import InputError
from .recall import DEPTHLESS, TASKS, Prompt, Writer
from .rows import Row, bootstrap, share_row
from .runtime.cache import state_bytes
from .subject import Subject, greedy, likeliest, stream, trained_length
from .texts import choose_input, cut_pieces, read_text

Record = dict[str, Any]  # JSON


class Unit(NamedTuple):
    """One piece of work: input ids [B][T], what else decides its outcome, and its cost in tokens a model."""

    ids: list[list[int]]
    settings: dict[str, Any]
    cost: int


Work = list[tuple[Subject, Unit]]
Tick = Callable[[int], None]  # tokens that one model has just read or written


@dataclass(frozen=True)
class Suite:
    """A measurement. A new one subclasses this, sets `quick`, implements the three methods, and is added to SUITES."""

    lengths: tuple[int, ...] = (8192,)
    chunk: int = 512
    seed: int = 0

    kind: ClassVar[str]  # the suite's name in rows
    quick: ClassVar[dict[str, Any]] = {}  # settings that fit 135M parameters on two cores into two minutes
    compares: ClassVar[bool] = False  # whether the teacher must run beside the other models

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and field.name != "seed" and value < 1:
                raise InputError(f"{field.name}={value} is below 1")
        if not self.lengths:
            raise InputError("lengths is empty; give at least one, such as 4k")

    @property
    def reach(self) -> int:
        """Positions that the longest unit needs."""
        return max(self.lengths)

    def label(self, unit: Unit) -> str:
        """What progress calls a unit."""
        return f"{self.kind} {len(unit.ids[0])}"

    def units(self, tokenizer) -> list[Unit]:
        raise NotImplementedError

    def measure(self, work: Work, reference: tuple[Subject, Unit] | None, tick: Tick) -> list[Record]:
        """One record for each (subject, unit) of `work`; `reference` is the teacher's, if it is to be compared."""
        raise NotImplementedError

    def rows(self, name: str, records: list[Record]) -> list[Row]:
        raise NotImplementedError


def _tensor(subject: Subject, unit: Unit) -> Tensor:
    return torch.tensor(unit.ids, device=subject.model.device)


@dataclass(frozen=True)
class Perplexity(Suite):
    """Perplexity by position on pieces of a long text, KL to the teacher, and the bytes of the decoding state.

    Positions are counted from the start of a piece, in buckets that double: … 1024–2048, 2048–4096 …
    """

    text: str = "novel"
    pieces: int | None = 6  # evenly spread over the text; None: all

    kind = "ppl"
    quick = {"lengths": (2048,), "pieces": 2}
    compares = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.lengths) < 2:
            raise InputError(f"{self.kind}: length={min(self.lengths)} is too short, nothing is predicted; at least 2")

    def source(self) -> str:
        """What `read_text` reads."""
        return self.text

    @property
    def edges(self) -> tuple[int, ...]:
        top = max(self.lengths)
        doubling = {128 * 2**i for i in range(top.bit_length()) if 128 * 2**i < top}
        return tuple(sorted(doubling | set(self.lengths)))

    def units(self, tokenizer) -> list[Unit]:
        all_pieces = cut_pieces(tokenizer, self.source(), max(self.lengths))
        count = min(self.pieces or len(all_pieces), len(all_pieces))
        chosen = [all_pieces[i * len(all_pieces) // count] for i in range(count)]
        settings = {"edges": self.edges, "chunk": self.chunk}
        return [Unit([ids], settings, len(ids)) for ids in chosen]

    def measure(self, work: Work, reference: tuple[Subject, Unit] | None, tick: Tick) -> list[Record]:
        tallies = {s.name: _Tally(self.edges, s, unit, reference) for s, unit in work}
        running = {s.name: (s, unit) for s, unit in ([reference] if reference else []) + work}  # the teacher first
        streams = {name: stream(s.model, _tensor(s, unit), self.chunk) for name, (s, unit) in running.items()}
        theirs = None
        for done in range(0, max(self.lengths), self.chunk):
            for name, logits_of in streams.items():
                logits, cache = next(logits_of)
                if reference and name == reference[0].name:
                    theirs = logits[0]
                if name in tallies:
                    tallies[name].add(done, logits, cache, theirs)
                    tick(logits.shape[1])
        return [tallies[s.name].record() for s, _ in work]

    def rows(self, name: str, records: list[Record]) -> list[Row]:
        measures = (("nll", "ppl", math.exp), ("excess", "ppl_ratio", math.exp), ("kl", "kl", float))
        rows = [row for measure in measures for row in self._rows(name, records, *measure)]
        return rows + list(self._drift(name, records)) + list(self._state(name, records))

    def _rows(self, name: str, records: list[Record], key: str, metric: str, of) -> Iterator[Row]:
        """Whole pieces up to each length, then single buckets."""
        records = [record for record in records if record[key] is not None]
        if not records:
            return
        spans = [(metric, 0, i + 1) for i, edge in enumerate(self.edges) if edge in self.lengths]
        spans += [(f"{metric}_at", i, i + 1) for i in range(len(self.edges))]
        for label, first, last in spans:
            sums = [sum(record[key][first:last]) for record in records]
            counts = [sum(record["count"][first:last]) for record in records]
            low, high = bootstrap(sums, counts, self.seed, of)
            value = of(sum(sums) / sum(counts))
            yield Row(name, self.kind, label, self.edges[last - 1], None, value, low, high, len(records))

    def _drift(self, name: str, records: list[Record]) -> Iterator[Row]:
        """Each bucket beyond the trained length beside the last one within, on the same pieces."""
        within = [i for i, edge in enumerate(self.edges) if edge <= (records[0]["trained"] or 0)]
        for i in range(len(within), len(self.edges)) if within else ():
            logs = [record["nll"][i] / record["count"][i] - record["nll"][within[-1]] / record["count"][within[-1]]
                    for record in records]  # fmt: skip
            low, high = bootstrap(logs, [1.0] * len(logs), self.seed, math.exp)
            value = math.exp(sum(logs) / len(logs))
            yield Row(name, self.kind, "drift_at", self.edges[i], None, value, low, high, len(logs))

    def _state(self, name: str, records: list[Record]) -> Iterator[Row]:
        for length, size in records[0]["bytes"]:
            yield Row(name, "memory", "cache_bytes", length, None, float(size), None, None, 1)


def _comparable(subject: Subject, unit: Unit, reference: tuple[Subject, Unit] | None) -> bool:
    """Whether a teacher other than the model itself reads the same tokens of the same vocabulary."""
    if reference is None or reference[0].name == subject.name or reference[1].ids != unit.ids:
        return False
    sizes = [s.model.config.get_text_config().vocab_size for s in (subject, reference[0])]
    return sizes[0] == sizes[1]


class _Tally:
    """Sums of one model on one piece, by the bucket of the predicted token's position."""

    def __init__(self, edges: Sequence[int], subject: Subject, unit: Unit, reference) -> None:
        device = subject.model.device
        self.edges, self.ids = torch.tensor(edges, device=device), _tensor(subject, unit)[0]  # [E], [T]
        self.sums = torch.zeros(4, len(edges), dtype=torch.float64, device=device)  # nll, KL, count
        self.compare = _comparable(subject, unit, reference)
        self.bytes: list[tuple[int, int]] = []
        self.trained = trained_length(subject)

    def add(self, done: int, logits: Tensor, cache, theirs: Tensor | None) -> None:
        """logits [1, C, V] of positions done … done + C; theirs [C, V] the teacher's at the same positions."""
        seen = done + logits.shape[1]
        position = torch.arange(done + 1, min(seen + 1, len(self.ids)), device=logits.device)  # of the targets
        target, mine = self.ids[position], logits[0, : len(position)]
        nll, theirs_nll, kl = torch.zeros(3, len(position), dtype=torch.float64, device=logits.device)
        for rows in torch.arange(len(position), device=logits.device).split(128):  # float32 copies stay small
            scores = mine[rows].float().log_softmax(-1)  # [R, V]
            nll[rows] = -scores.gather(1, target[rows, None])[:, 0].double()
            if self.compare and theirs is not None:
                truth = theirs[rows].float().log_softmax(-1).to(scores.device)
                theirs_nll[rows] = -truth.gather(1, target[rows, None])[:, 0].double()
                kl[rows] = F.kl_div(scores, truth, reduction="none", log_target=True).sum(-1).clamp(min=0).double()
        bucket = torch.bucketize(position, self.edges, right=True)
        self.sums.index_add_(1, bucket, torch.stack([nll, nll - theirs_nll, kl, torch.ones_like(nll)]))
        if seen in self.edges:
            self.bytes.append((seen, state_bytes(cache)))

    def record(self) -> Record:
        nll, excess, kl, count = self.sums.tolist()
        beside = {"excess": excess, "kl": kl} if self.compare else {"excess": None, "kl": None}
        return {"nll": nll, "count": count, "bytes": self.bytes, "trained": self.trained} | beside


@dataclass(frozen=True)
class Code(Perplexity):
    """The same on source code, by default kernelize's own, which no model of the time has read."""

    code: str = "code"

    kind = "code"

    def source(self) -> str:
        return self.code

    def _state(self, name: str, records: list[Record]) -> Iterator[Row]:
        return iter(())  # the bytes are those of any other text


@contextmanager
def _saying(what: str) -> Iterator[None]:
    """Says `what` before an InputError of a writer: one writer serves several suites and tasks."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def _writer(tokenizer, text: str, what: str) -> Writer:
    novel = read_text(text)
    with _saying(what):
        return Writer(tokenizer, novel)


@dataclass(frozen=True)
class Recall(Suite):
    """What a model finds again in a long prompt, by depth and length; the tasks are in `kernelize.recall`."""

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    haystack: str = "novel"  # the text in which things are hidden
    tasks: tuple[str, ...] = tuple(TASKS)
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    trials: int = 8  # prompts a depth

    kind = "recall"
    quick = {"lengths": (512,), "depths": (0.5,), "trials": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        for task in self.tasks:
            choose_input("task", task, TASKS)
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise InputError(f"depths={self.depths} must lie between 0 (start) and 1 (end)")

    @property
    def reach(self) -> int:
        return max(self.lengths) + 64  # the answer's tokens

    def units(self, tokenizer) -> list[Unit]:
        writer = _writer(tokenizer, self.haystack, f"{self.kind}: haystack={self.haystack!r}")
        return [unit for task in self.tasks for length in self.lengths for unit in self._cells(writer, task, length)]

    def _cells(self, writer: Writer, task: str, length: int) -> Iterator[Unit]:
        for depth in self.depths:
            rng = random.Random(f"{self.seed} {task} {length} {depth}")
            with _saying(f"{self.kind}: task {task!r}"):
                prompts = [TASKS[task](writer, length, depth, rng) for _ in range(self.trials)]
            settings = {"task": task, "length": length, "depth": depth, "chunk": self.chunk}
            settings["asked"] = [prompt._replace(ids=[]) for prompt in prompts]
            yield Unit([prompt.ids for prompt in prompts], settings, length * self.trials)

    def measure(self, work: Work, reference: tuple[Subject, Unit] | None, tick: Tick) -> list[Record]:
        records = []
        for subject, unit in work:
            keys = ("task", "length", "depth")
            records.append({key: unit.settings[key] for key in keys} | {"scores": self._scores(subject, unit)})
            tick(unit.cost)
        return records

    def _scores(self, subject: Subject, unit: Unit) -> list[float]:
        asked: list[Prompt] = unit.settings["asked"]
        ids = _tensor(subject, unit)
        if asked[0].targets:
            best = likeliest(subject.model, ids, self.chunk).tolist()
            return [_forced(prompt, row) for prompt, row in zip(asked, best, strict=True)]
        written = greedy(subject.model, ids, max(p.new_tokens for p in asked), self.chunk)
        texts = subject.tokenizer.batch_decode([row[: p.new_tokens] for p, row in zip(asked, written, strict=True)])
        return [_share(answer in text for answer in p.answers) for p, text in zip(asked, texts, strict=True)]

    def rows(self, name: str, records: list[Record]) -> list[Row]:
        cells: dict[tuple[str, int, float | None], list[float]] = defaultdict(list)
        for record in records:
            for depth in (None,) if record["task"] in DEPTHLESS else (None, record["depth"]):
                cells[record["task"], record["length"], depth] += record["scores"]
        return [share_row(name, self.kind, cell, scores) for cell, scores in cells.items()]


@dataclass(frozen=True)
class Passkey(Recall):
    """Only the passkey: the shortest honest look at recall."""

    tasks: tuple[str, ...] = ("passkey",)

    quick = {"lengths": (512, 1024), "depths": (0.1, 0.5, 0.9), "trials": 3}


@dataclass(frozen=True)
class Generation(Suite):
    """Greedy text after prompts of a novel: how long it agrees with the teacher's, how it repeats itself, and how many
    of the continuations of `kernelize.completion` it writes out without a mistake."""

    lengths: tuple[int, ...] = (256,)
    text: str = "novel"
    prompts: int = 8
    new_tokens: int = 128
    completions: tuple[str, ...] = tuple(COMPLETIONS)
    trials: int = 8  # prompts a completion task

    kind = "generation"
    quick = {"prompts": 2, "new_tokens": 32, "trials": 4}
    compares = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for task in self.completions:
            choose_input("completion", task, COMPLETIONS)

    @property
    def reach(self) -> int:
        return max(self.lengths) + self.new_tokens

    def units(self, tokenizer) -> list[Unit]:
        writer = _writer(tokenizer, self.text, f"{self.kind}: text={self.text!r}")
        return [self._unit(cut_pieces(tokenizer, self.text, length), length) for length in self.lengths] + [
            self._completions(writer, task, length) for task in self.completions for length in self.lengths
        ]

    def _completions(self, writer: Writer, task: str, length: int) -> Unit:
        rng = random.Random(f"{self.seed} {task} {length}")
        with _saying(f"{self.kind}: completion {task!r}"):
            prompts = [COMPLETIONS[task](writer, length, rng) for _ in range(self.trials)]
        asked = [prompt._replace(ids=[]) for prompt in prompts]
        new_tokens = max(prompt.new_tokens for prompt in prompts)
        settings = {"completion": task, "length": length, "new_tokens": new_tokens, "asked": asked}
        ids = [prompt.ids for prompt in prompts]
        return Unit(ids, settings | {"chunk": self.chunk}, len(ids) * (length + new_tokens))

    def _unit(self, pieces: list[list[int]], length: int) -> Unit:
        count = min(self.prompts, len(pieces))
        ids = [pieces[i * len(pieces) // count] for i in range(count)]
        settings = {"length": length, "new_tokens": self.new_tokens, "chunk": self.chunk}
        return Unit(ids, settings, count * (length + self.new_tokens))

    def measure(self, work: Work, reference: tuple[Subject, Unit] | None, tick: Tick) -> list[Record]:
        if "completion" in work[0][1].settings:
            return [self._completed(subject, unit, tick) for subject, unit in work]
        theirs = self._write(*reference) if reference else None
        records = []
        for subject, unit in work:
            same = reference is not None and reference[0].name == subject.name
            written = theirs if theirs and same else self._write(subject, unit)
            record: Record = {"length": unit.settings["length"], "texts": [_diversity(row) for row in written]}
            if theirs and _comparable(subject, unit, reference):
                record["agreement"] = [_agreement(*rows) for rows in zip(written, theirs, strict=True)]
            records.append(record)
            tick(unit.cost)
        return records

    def _write(self, subject: Subject, unit: Unit) -> list[list[int]]:
        return greedy(subject.model, _tensor(subject, unit), unit.settings["new_tokens"], self.chunk).tolist()

    def _completed(self, subject: Subject, unit: Unit, tick: Tick) -> Record:
        texts = subject.tokenizer.batch_decode(self._write(subject, unit))
        tick(unit.cost)
        scores = [float(exact(text, p.answers[0])) for text, p in zip(texts, unit.settings["asked"], strict=True)]
        return {key: unit.settings[key] for key in ("completion", "length")} | {"scores": scores}

    def rows(self, name: str, records: list[Record]) -> list[Row]:
        rows = []
        for record in records:
            if "completion" in record:
                rows.append(share_row(name, self.kind, (record["completion"], record["length"], None),
                                       record["scores"]))  # fmt: skip
                continue
            values = {key: [text[key] for text in record["texts"]] for key in record["texts"][0]}
            values |= {"agreement": record["agreement"]} if "agreement" in record else {}
            for metric, xs in values.items():
                low, high = bootstrap(xs, [1.0] * len(xs), self.seed)
                mean = sum(xs) / len(xs)
                rows.append(Row(name, self.kind, metric, record["length"], None, mean, low, high, len(xs)))
        return rows


def _forced(prompt: Prompt, best: list[int]) -> float:
    """best [T]: the likeliest token after each position."""
    return _share(all(best[i - 1] == token for i, token in answer) for answer in prompt.targets)


def _share(hits: Iterable[bool]) -> float:
    found = list(hits)
    return sum(found) / len(found)


def _agreement(mine: list[int], theirs: list[int]) -> float:
    same = [a == b for a, b in zip(mine, theirs, strict=True)]
    return float(same.index(False) if False in same else len(same))


def _diversity(ids: list[int]) -> dict[str, float]:
    def distinct(n: int) -> float:
        grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        return len(set(grams)) / len(grams)

    return {"repetition": 1 - distinct(4), "distinct_1": distinct(1), "distinct_2": distinct(2)}
