"""Evaluation: models × suites → tidy rows, streamed through the state, resumable, every number with its interval.

A suite cuts its work into units (one piece of text, one batch of prompts). A unit is measured for all models side by
side and leaves one JSON record a model; rows are computed from records alone, so that an evaluation that was killed
and resumed gives the same table.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import lzma
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from . import __version__, harness
from .completion import COMPLETIONS, exact
from .errors import InputError, KernelizeError
from .recall import DEPTHLESS, TASKS, Prompt, Writer, encode, start_ids
from .runtime.cache import CACHE, state_bytes
from .runtime.spec import SpecError, choose
from .tasks import QuestionSet, Request, judge, loglikelihoods, requests, sets_in

log = logging.getLogger("kernelize")

VERSION = 2  # of the records: raise it when a suite changes what it measures
SAMPLES = ("novel", "train")
OnProgress = Callable[[int, int, str], None]  # (tokens done, tokens in all, what is running)
Record = dict[str, Any]


# --- what comes out -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One number. `length` in tokens and `depth` (0: start of the prompt, 1: end) are None where they mean nothing;
    `low`, `high` are its 95 % interval, None where there is none; `n` counts what it was computed from."""

    model: str
    suite: str
    metric: str
    length: int | None
    depth: float | None
    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Metric:
    """How a metric is read: `better` is "lower", "higher" or "" (a fact); `show` formats a value."""

    title: str
    better: str
    show: Callable[[float], str]


def data_size(value: float) -> str:
    """8985600 → "8.57 MiB"."""
    for unit, factor in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"


METRICS: dict[str, Metric] = {
    "ppl": Metric("perplexity of the whole piece", "lower", "{:.2f}".format),
    "ppl_at": Metric(
        "perplexity at the positions below `length`, down to the next smaller length", "lower", "{:.2f}".format
    ),
    "ppl_ratio": Metric("perplexity / the teacher's on the same pieces", "lower", "{:.3f}".format),
    "ppl_ratio_at": Metric("perplexity / the teacher's on the same pieces, by position", "lower", "{:.3f}".format),
    "kl": Metric("KL divergence from the teacher, nats a token", "lower", "{:.4f}".format),
    "kl_at": Metric("KL divergence from the teacher by position, nats a token", "lower", "{:.4f}".format),
    "cache_bytes": Metric("size of the decoding state after `length` tokens", "lower", data_size),
    "agreement": Metric("tokens of greedy text that agree with the teacher's", "higher", "{:.1f}".format),
    "repetition": Metric("share of 4-grams that the text repeats", "lower", "{:.3f}".format),
    "distinct_1": Metric("different tokens / tokens", "higher", "{:.3f}".format),
    "distinct_2": Metric("different 2-grams / 2-grams", "higher", "{:.3f}".format),
    **{
        f"mass_{source}": Metric(f"share of the normaliser that is {source}, mean over layers", "", "{:.3f}".format)
        for source in ("window", "sinks", "slots", "memory")
    },
    **{
        f"mass_{source}_at": Metric(f"the part of it fewer than `length` tokens away ({source})", "", "{:.3f}".format)
        for source in ("window", "sinks", "slots")
    },
    "prefill_ms": Metric("milliseconds to read `length` tokens", "lower", "{:,.1f}".format),
    "decode_ms": Metric("milliseconds a token (of all rows) after `length` tokens", "lower", "{:,.2f}".format),
    "peak_bytes": Metric("memory of the device at most while reading, weights included", "lower", data_size),
    "state_bytes": Metric("size of the decoding state of a sequence after `length` tokens", "lower", data_size),
    "train_tokens_per_s": Metric("tokens a second, forward and backward", "higher", "{:,.0f}".format),
    "fits": Metric("fits into the memory", "higher", lambda value: "yes" if value else "out of memory"),
    "fits_training": Metric(
        "training fits into the memory", "higher", lambda value: "yes" if value else "out of memory"
    ),
    "parameters": Metric("parameters", "", "{:,.0f}".format),
    "trained_length": Metric("positions that the configuration allows", "", "{:,.0f}".format),
    **{name: Metric(f"completed without a mistake: {name}", "higher", "{:.2f}".format) for name in COMPLETIONS},
    **{name: Metric(f"recall: {name.replace('_', ' ')}", "higher", "{:.2f}".format) for name in TASKS},
}


# The measures of question sets; a row's metric is TASK/MEASURE.
MEASURES: dict[str, Metric] = {
    **{
        name: Metric(f"share of right answers{how}", "higher", "{:.1%}".format)
        for name, how in (
            ("acc", ""),
            ("acc_bytes", ", log p a byte of the choice"),
            ("acc_norm", ", log p a character of the choice"),
            ("exact_match", ", written out"),
        )
    },
    "perplexity": Metric("perplexity of the right answer, a whole answer at a time", "lower", "{:.2f}".format),
    "corrected": Metric("share of right answers above guessing: (acc − chance) / (1 − chance)", "higher",
                        "{:.1%}".format),
}  # fmt: skip


def metric_of(name: str) -> Metric:
    """How the metric of a row is read. One that is not in METRICS or, as TASK/MEASURE, in MEASURES is a plain fact."""
    task, _, measure = name.rpartition("/")
    found = MEASURES.get(measure) if task else METRICS.get(name)
    return found or Metric(name, "", "{:.4g}".format)


def save_rows(rows: Sequence[Row], path: str | Path) -> None:
    """Writes {"rows": [...]} as JSON."""
    Path(path).write_text(json.dumps({"rows": [dataclasses.asdict(row) for row in rows]}, indent=1) + "\n")


def load_rows(path: str | Path) -> list[Row]:
    """Reads what `save_rows` wrote. Raises InputError for a file that holds no rows."""
    try:
        return [Row(**row) for row in json.loads(Path(path).read_text())["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no evaluation rows ({type(error).__name__}: {error})") from error


# --- what goes in ---------------------------------------------------------------------------------------------


def sample_text(name: str) -> str:
    """A text that ships with kernelize: "novel" (unseen, for evaluation) or "train"."""
    _choose("sample text", name, SAMPLES)
    return (files("kernelize.sample") / f"{name}.txt").read_text(encoding="utf-8")


def read_text(source: str) -> str:
    """A sample's name, or a .txt, .txt.xz or .jsonl file; the `text` fields of JSON lines are joined with ""."""
    if source in SAMPLES:
        return sample_text(source)
    path = Path(source)
    try:
        raw = (lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()).decode("utf-8")
        text = "".join(json.loads(line)["text"] for line in raw.splitlines()) if path.suffix == ".jsonl" else raw
    except (OSError, ValueError, KeyError, TypeError, lzma.LZMAError) as error:
        raise InputError(f"text={source!r} cannot be read: {error}; a sample ({', '.join(SAMPLES)}), .txt, .txt.xz "
                         "or .jsonl with `text` is allowed") from error  # fmt: skip
    if not text.strip():
        raise InputError(f"text={source!r} is empty")
    return text


def parse_length(text: str) -> int:
    """ "512" → 512, "4k" → 4096, "1m" → 1048576."""
    digits = text.strip().lower()
    factor = {"k": 1024, "m": 1024**2}.get(digits[-1:], 1)
    number = digits[:-1] if factor > 1 else digits
    if not number.isascii() or not number.isdigit() or int(number) == 0:
        raise InputError(f"length {text!r} is not a positive number of tokens such as 512, 4k or 1m")
    return int(number) * factor


def parse_lengths(text: str) -> tuple[int, ...]:
    """ "1k,4k,128k" → (1024, 4096, 131072), sorted, each once."""
    return tuple(sorted({parse_length(part) for part in text.split(",")}))


def _choose(field: str, value: object, allowed: Iterable) -> None:
    try:
        choose(field, value, list(allowed))
    except SpecError as error:
        raise InputError(str(error)) from None


@dataclass(frozen=True)
class Subject:
    """A model under test. `fingerprint` changes with its weights and its configuration."""

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str

    @classmethod
    def of(cls, name: str, model, tokenizer) -> Subject:
        model.eval()
        return cls(name, model, tokenizer, fingerprint(model))


def fingerprint(model) -> str:
    """A hash of configuration and weights; of a large tensor, 65536 evenly spaced entries and its shape."""
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        part = flat[:: max(1, flat.numel() // 65536)].contiguous().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(part.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- running a model with its state ---------------------------------------------------------------------------


@torch.inference_mode()
def stream(model, ids: Tensor, chunk: int) -> Iterator[tuple[Tensor, Any]]:
    """Feeds ids [B, T] chunk by chunk with the state carried on; yields (logits [B, C, V], the cache) a chunk.

    Never more than one chunk of logits exists; for a model of constant state, memory does not depend on T.
    """
    cache = DynamicCache(config=model.config)
    for part in ids.split(chunk, dim=1):
        yield model(part, use_cache=True, **{CACHE: cache}).logits, cache


@torch.inference_mode()
def greedy(model, ids: Tensor, count: int, chunk: int) -> Tensor:
    """The `count` likeliest tokens after ids [B, T], one after the other: [B, count]. Ends at no special token."""
    cache = DynamicCache(config=model.config)
    for part in ids.split(chunk, dim=1):
        logits = model(part, use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits
    tokens = [logits[:, -1:].argmax(-1)]
    while len(tokens) < count:
        logits = model(tokens[-1], use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits
        tokens.append(logits[:, -1:].argmax(-1))
    return torch.cat(tokens, dim=1)


def likeliest(model, ids: Tensor, chunk: int) -> Tensor:
    """The likeliest next token at every position of ids [B, T]: [B, T]."""
    return torch.cat([logits.argmax(-1) for logits, _ in stream(model, ids, chunk)], dim=1)


# --- intervals ------------------------------------------------------------------------------------------------


def bootstrap(sums: Sequence[float], counts: Sequence[float], seed: int, of=lambda mean: mean):
    """95 % interval of of(Σ sums / Σ counts) over resampled pieces; (None, None) for fewer than two pieces."""
    if len(sums) < 2:
        return None, None
    chosen = np.random.default_rng(seed).integers(len(sums), size=(2000, len(sums)))
    means = np.asarray(sums)[chosen].sum(1) / np.asarray(counts)[chosen].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return of(float(low)), of(float(high))


def wilson(mean: float, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): stays in [0, 1] and is honest for 0 and 1, unlike the bootstrap."""
    z2 = 1.96**2
    centre, spread = mean + z2 / (2 * n), math.sqrt(z2 * mean * (1 - mean) / n + z2**2 / (4 * n**2))
    return max(0.0, (centre - spread) / (1 + z2 / n)), min(1.0, (centre + spread) / (1 + z2 / n))


# --- suites ---------------------------------------------------------------------------------------------------


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


@functools.lru_cache(maxsize=8)
def _pieces(tokenizer, source: str, length: int) -> list[list[int]]:
    """The text cut into consecutive pieces of exactly `length` tokens, the rest dropped."""
    start, ids = start_ids(tokenizer), encode(tokenizer, read_text(source))
    body = length - len(start)
    if len(ids) < body:
        raise InputError(f"text={source!r} has {len(ids)} tokens, too few for one piece of length={length}")
    return [start + ids[i : i + body] for i in range(0, len(ids) - body + 1, body)]


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

    @property
    def edges(self) -> tuple[int, ...]:
        top = max(self.lengths)
        doubling = {128 * 2**i for i in range(top.bit_length()) if 128 * 2**i < top}
        return tuple(sorted(doubling | set(self.lengths)))

    def units(self, tokenizer) -> list[Unit]:
        all_pieces = _pieces(tokenizer, self.text, max(self.lengths))
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
        return rows + list(self._state(name, records))

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
        return {"nll": nll, "count": count, "bytes": self.bytes} | beside


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
            _choose("task", task, TASKS)
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise InputError(f"depths={self.depths} must lie between 0 (start) and 1 (end)")

    @property
    def reach(self) -> int:
        return max(self.lengths) + 64  # the answer's tokens

    def units(self, tokenizer) -> list[Unit]:
        writer = Writer(tokenizer, read_text(self.haystack))
        return [unit for task in self.tasks for length in self.lengths for unit in self._cells(writer, task, length)]

    def _cells(self, writer: Writer, task: str, length: int) -> Iterator[Unit]:
        for depth in self.depths:
            rng = random.Random(f"{self.seed} {task} {length} {depth}")
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
        return [_share_row(name, self.kind, cell, scores) for cell, scores in cells.items()]


def _share_row(name: str, kind: str, cell: tuple[str, int | None, float | None], scores: list[float]) -> Row:
    """The row of a share, such as of prompts answered; `cell`: metric, length, depth."""
    mean, n = sum(scores) / len(scores), len(scores)
    return Row(name, kind, *cell, mean, *wilson(mean, n), n)


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
            _choose("completion", task, COMPLETIONS)

    @property
    def reach(self) -> int:
        return max(self.lengths) + self.new_tokens

    def units(self, tokenizer) -> list[Unit]:
        writer = Writer(tokenizer, read_text(self.text))
        return [self._unit(_pieces(tokenizer, self.text, length), length) for length in self.lengths] + [
            self._completions(writer, task, length) for task in self.completions for length in self.lengths
        ]

    def _completions(self, writer: Writer, task: str, length: int) -> Unit:
        rng = random.Random(f"{self.seed} {task} {length}")
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
                rows.append(_share_row(name, self.kind, (record["completion"], record["length"], None),
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


@dataclass(frozen=True)
class Tasks(Suite):
    """Question sets in a folder of JSON lines (see `kernelize.tasks`), scored here; `lengths` mean nothing to it."""

    folder: str | None = None
    names: tuple[str, ...] = ()  # all sets in the folder, if none is named
    limit: int | None = None  # the first rows of a set only
    batch: int = 16  # texts at a time

    kind = "tasks"
    quick = {"limit": 16}

    STEP: ClassVar[int] = 32  # questions a record

    @property
    def reach(self) -> int:
        return 1

    def label(self, unit: Unit) -> str:
        return f"{self.kind} {unit.settings['task']}"

    def units(self, tokenizer) -> list[Unit]:
        if self.folder is None:
            raise InputError(f"suite={self.kind!r} needs folder, where the question sets are (--tasks-data)")
        return [unit for found in sets_in(self.folder, self.names) for unit in self._units(tokenizer, found)]

    def _units(self, tokenizer, found: QuestionSet) -> Iterator[Unit]:
        questions = found.questions[: self.limit]
        for first in range(0, len(questions), self.STEP):
            part = questions[first : first + self.STEP]
            asked = [(question, requests(tokenizer, question)) for question in part]
            flat = [request for _, those in asked for request in those]
            settings = {"task": found.name, "first": first, "starts": [request.start for request in flat]}
            settings["asked"] = [(len(question.pairs), question.gold, question.sizes) for question in part]
            yield Unit([request.ids for request in flat], settings, sum(len(request.ids) for request in flat))

    def measure(self, work: Work, reference: tuple[Subject, Unit] | None, tick: Tick) -> list[Record]:
        return [self._judged(subject, unit, tick) for subject, unit in work]

    def _judged(self, subject: Subject, unit: Unit, tick: Tick) -> Record:
        asked = [Request(*pair) for pair in zip(unit.ids, unit.settings["starts"], strict=True)]
        scores = iter(loglikelihoods(subject.model, asked, self.batch))
        tick(unit.cost)
        right = [judge(gold, sizes, [next(scores) for _ in range(n)]) for n, gold, sizes in unit.settings["asked"]]
        chance = [1 / n if n > 1 else 0.0 for n, _, _ in unit.settings["asked"]]
        values = {measure: [one[measure] for one in right] for measure in right[0]}
        return {"task": unit.settings["task"], "values": values, "chance": chance}

    def rows(self, name: str, records: list[Record]) -> list[Row]:
        rows, parts = [], []
        for task in dict.fromkeys(record["task"] for record in records):
            mine = [record for record in records if record["task"] == task]
            values = {m: [x for record in mine for x in record["values"][m]] for m in mine[0]["values"]}
            rows += [self._row(name, task, measure, xs) for measure, xs in values.items()]
            best, chance = values.get("acc_bytes", values["acc"]), [x for record in mine for x in record["chance"]]
            parts.append(_Part(task, sum(best) / len(best), _error(best), sum(chance) / len(chance), len(best)))
        return rows + _corrected(name, self.kind, parts)

    def _row(self, name: str, task: str, measure: str, values: list[float]) -> Row:
        if measure != "nll":
            return _share_row(name, self.kind, (f"{task}/{measure}", None, None), values)
        low, high = bootstrap(values, [1.0] * len(values), self.seed, math.exp)
        mean = math.exp(sum(values) / len(values))
        return Row(name, self.kind, f"{task}/perplexity", None, None, mean, low, high, len(values))


class _Part(NamedTuple):
    """The accuracy of one task, its standard error, and what guessing reaches."""

    task: str
    accuracy: float
    error: float | None
    chance: float
    n: int


def _error(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def _corrected(name: str, kind: str, parts: Sequence[_Part]) -> list[Row]:
    """Accuracies above guessing: 0 is chance, 1 is perfect, whatever the number of choices; and their mean."""
    scaled = [_above_chance(part) for part in parts]
    if len(scaled) > 1:
        errors = [part.error for part in scaled if part.error is not None]
        joint = math.hypot(*errors) / len(scaled) if len(errors) == len(scaled) else None
        mean = sum(part.accuracy for part in scaled) / len(scaled)
        scaled.append(_Part("mean", mean, joint, 0.0, sum(part.n for part in scaled)))
    return [_with_error(name, kind, f"{part.task}/corrected", part.accuracy, part.error, part.n) for part in scaled]


def _above_chance(part: _Part) -> _Part:
    rest = 1 - part.chance
    error = None if part.error is None else part.error / rest
    return part._replace(accuracy=(part.accuracy - part.chance) / rest, error=error, chance=0.0)


def _with_error(name: str, kind: str, metric: str, value: float, error: float | None, n: int) -> Row:
    """A row with the interval of a normal distribution."""
    low, high = (None, None) if error is None else (value - 1.96 * error, value + 1.96 * error)
    return Row(name, kind, metric, None, None, value, low, high, n)


@dataclass(frozen=True)
class LmEval(Tasks):
    """The same sets, or any of lm-eval's own tasks by name, measured by lm-eval; one record a task."""

    kind = "lm-eval"

    def units(self, tokenizer) -> list[Unit]:
        if self.folder is None and not self.names:
            raise InputError("suite='lm-eval' needs names of its tasks (--task), or folder, where question sets are")
        local = {found.name: found for found in sets_in(self.folder, self.names)} if self.folder else {}
        return [self._unit(tokenizer, name, local.get(name)) for name in self.names or local]

    def _unit(self, tokenizer, name: str, found: QuestionSet | None) -> Unit:
        settings = {"task": name, "limit": self.limit, "seed": self.seed, "lm_eval": harness.version()}
        settings |= {"digest": found.digest} if found else {}
        cost = sum(unit.cost for unit in self._units(tokenizer, found)) if found else 1  # what a Hub has is not known
        return Unit([[]], settings, cost)

    def _judged(self, subject: Subject, unit: Unit, tick: Tick) -> Record:
        task: str | QuestionSet = unit.settings["task"]
        if self.folder and isinstance(task, str):
            (task,) = sets_in(self.folder, [task])
        scores = harness.measure(
            subject.model, subject.tokenizer, task, limit=self.limit, batch=self.batch, seed=self.seed
        )
        tick(unit.cost)
        return {"scores": [score._asdict() for score in scores]}

    def rows(self, name: str, records: list[Record]) -> list[Row]:
        scores = [harness.Score(**score) for record in records for score in record["scores"]]
        rows = [_with_error(name, self.kind, f"{s.task}/{s.metric}", s.value, s.error, s.n) for s in scores]
        best: dict[str, harness.Score] = {}
        for metric in ("acc", "acc_bytes", "acc_norm"):  # the last one that a task has is its headline
            best |= {score.task: score for score in scores if score.metric == metric}
        parts = [_Part(s.task, s.value, s.error, s.chance or 0.0, s.n) for s in best.values()]
        return rows + _corrected(name, self.kind, parts)


SUITES: dict[str, type[Suite]] = {
    "ppl": Perplexity,
    "passkey": Passkey,
    "recall": Recall,
    "generation": Generation,
    "tasks": Tasks,
    "lm-eval": LmEval,
}


def make_suite(name: str, *, quick: bool = False, **settings: Any) -> Suite:
    """The suite `name` with `settings` over its quick or usual ones. Raises InputError for an unknown setting."""
    _choose("suite", name, SUITES)
    suite = SUITES[name]
    for key in settings:
        _choose("setting", key, [field.name for field in dataclasses.fields(suite)])
    return suite(**((suite.quick if quick else {}) | settings))


# --- the run --------------------------------------------------------------------------------------------------


class Store:
    """Records on disk, one JSON line each, appended as they are measured; or in memory if `path` is None."""

    def __init__(self, path: str | Path | None) -> None:
        self.path, self.records = Path(path) if path else None, dict[str, Record]()
        if self.path and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        whole, _, half = path.read_text("utf-8").rpartition("\n")
        if half:  # a killed run can leave half a line
            path.write_text(whole + "\n" if whole else "", "utf-8")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self.records[entry["key"]] = entry["record"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}, line {number} is no evaluation record; is it another file?") from error

    def add(self, key: str, record: Record) -> None:
        self.records[key] = json.loads(json.dumps(record))
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "record": record}) + "\n")


def _key(suite: Suite, subject: Subject, unit: Unit, teacher: Subject | None) -> str:
    beside = teacher.fingerprint if teacher and suite.compares and teacher.name != subject.name else None
    what = [__version__, VERSION, suite.kind, subject.fingerprint, beside, unit.ids, unit.settings]
    return hashlib.blake2b(json.dumps(what).encode(), digest_size=16).hexdigest()


class Job(NamedTuple):
    """A unit for the models that have no record of it yet."""

    suite: Suite
    work: list[tuple[Subject, Unit, str]]
    reference: tuple[Subject, Unit] | None


def evaluate(
    models: Mapping[str, Any] | Sequence[str | Path],
    suites: Sequence[str | Suite] = ("ppl", "passkey"),
    *,
    lengths: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    teacher: str | None = None,
    quick: bool = False,
    settings: Mapping[str, Any] | None = None,
    cache: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    on_progress: OnProgress | None = None,
) -> list[Row]:
    """Measures every model with every suite and returns tidy rows.

    models: name → (model, tokenizer), or name → source, or sources (Hub id, folder, .gguf) that name themselves;
    `device` and `dtype` are for those that are loaded here. Any causal LM of Transformers will do.
    suites: names from `SUITES` or `Suite` objects. `lengths` (tokens; or suite → lengths), `quick` and `settings`
    (fields of the suites, such as text, pieces, trials, seed) apply to the named ones.
    teacher: the name of the model that the others are compared with; by default "teacher" if there is one.
    cache: a JSON-lines file of what was measured already; a killed evaluation continues from it.

    Raises InputError for what cannot be evaluated, a length beyond learned positions among it.
    """
    chosen = [s if isinstance(s, Suite) else _named(s, lengths, quick, settings or {}) for s in suites]
    _check_settings(chosen, settings or {})
    subjects = _subjects(models, device, dtype)
    reference = _teacher(subjects, teacher)
    units = [_units(suite, subjects) for suite in chosen]
    for subject in subjects:
        longest = max((len(ids) for plan in units for unit in plan[subject.name] for ids in unit.ids), default=0)
        check_positions(subject, max(longest, *(suite.reach for suite in chosen)))
    store = Store(cache)
    jobs = [j for s, u in zip(chosen, units, strict=True) for j in _jobs(s, subjects, u, reference, store)]
    _run(jobs, store, on_progress)
    rows = [row for subject in subjects for row in _facts(subject)]
    for suite, plan in zip(chosen, units, strict=True):
        for subject in subjects:
            records = [store.records[_key(suite, subject, unit, reference)] for unit in plan[subject.name]]
            rows += suite.rows(subject.name, records)
    return rows


def lengths_by_suite(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """["512,1k", "ppl=2k"] → (2048,) for ppl, (512, 1024) for every other suite."""
    plain = [text for text in texts if "=" not in text]
    found = dict.fromkeys(SUITES, parse_lengths(",".join(plain))) if plain else {}
    for text in texts:
        suite, named, lengths = text.partition("=")
        if named:
            _choose("suite", suite, SUITES)
            found[suite] = parse_lengths(lengths)
    return found


def _named(
    name: str, lengths: Sequence[int] | Mapping[str, Sequence[int]] | None, quick: bool, settings: Mapping[str, Any]
) -> Suite:
    _choose("suite", name, SUITES)
    lengths = lengths.get(name) if isinstance(lengths, Mapping) else lengths
    known = {field.name for field in dataclasses.fields(SUITES[name])}
    mine = {key: value for key, value in settings.items() if key in known}
    if lengths:
        mine["lengths"] = tuple(sorted(set(lengths)))
    return make_suite(name, quick=quick, **mine)


def _check_settings(suites: Sequence[Suite], settings: Mapping[str, Any]) -> None:
    known = {field.name for suite in suites for field in dataclasses.fields(suite)}
    for key in settings:
        _choose("setting", key, sorted(known))


def _subjects(models: Mapping[str, Any] | Sequence[str | Path], device: str, dtype: str) -> list[Subject]:
    if not models:
        raise InputError("no model to evaluate")
    named = dict(models) if isinstance(models, Mapping) else {str(source): source for source in models}
    return [Subject.of(name, *_loaded(source, device, dtype)) for name, source in named.items()]


def _loaded(source: Any, device: str, dtype: str) -> tuple[Any, Any]:
    if isinstance(source, tuple):
        return source
    from .convert import load

    return load(source, device=device, dtype=dtype)


def _teacher(subjects: Sequence[Subject], name: str | None) -> Subject | None:
    names = {subject.name: subject for subject in subjects}
    if name is not None:
        _choose("teacher", name, names)
    return names.get(name or "teacher")


def check_positions(subject: Subject, reach: int) -> None:
    """Learned positions end; rotary ones only leave what was trained, which is said and allowed."""
    limit = _trained_length(subject)
    if limit is None or reach <= limit:
        return
    if has_position_table(subject.model, limit):
        raise InputError(f"length={reach} (answers included) is beyond the {limit} learned positions of {subject.name}")
    log.warning("%s: length %d is beyond the %d positions that it was trained for", subject.name, reach, limit)


def has_position_table(model, limit: int) -> bool:
    """Whether the `limit` positions of a model are learned ones, so that there is nothing beyond."""
    inputs = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not inputs]
    return any(limit <= table.num_embeddings <= limit + 2 for table in tables)  # OPT's table has two more


def _trained_length(subject: Subject) -> int | None:
    config = subject.model.config.get_text_config()
    name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    return config.to_dict().get(name)


def _facts(subject: Subject) -> Iterator[Row]:
    count = sum(p.numel() for p in subject.model.parameters())
    yield Row(subject.name, "model", "parameters", None, None, float(count), None, None, 1)
    limit = _trained_length(subject)
    if limit is not None:
        yield Row(subject.name, "model", "trained_length", None, None, float(limit), None, None, 1)


def _units(suite: Suite, subjects: Sequence[Subject]) -> dict[str, list[Unit]]:
    """A suite's units by model; models that share a tokenizer object share the work of cutting."""
    cut: dict[int, list[Unit]] = {}
    for subject in subjects:
        if id(subject.tokenizer) not in cut:
            cut[id(subject.tokenizer)] = suite.units(subject.tokenizer)
    return {subject.name: cut[id(subject.tokenizer)] for subject in subjects}


def _jobs(suite: Suite, subjects, units: dict[str, list[Unit]], teacher: Subject | None, store: Store) -> Iterator[Job]:
    for i in range(max(map(len, units.values()))):
        work = [(s, units[s.name][i], _key(suite, s, units[s.name][i], teacher)) for s in subjects
                if i < len(units[s.name])]  # fmt: skip
        missing = [entry for entry in work if entry[2] not in store.records]
        beside = suite.compares and teacher is not None and i < len(units[teacher.name])
        if missing:
            yield Job(suite, missing, (teacher, units[teacher.name][i]) if teacher and beside else None)


def _run(jobs: Sequence[Job], store: Store, on_progress: OnProgress | None) -> None:
    total, done = sum(unit.cost for job in jobs for _, unit, _ in job.work), 0
    for job in jobs:
        label = job.suite.label(job.work[0][1])

        def tick(tokens: int, label: str = label) -> None:
            nonlocal done
            done += tokens
            if on_progress:
                on_progress(done, total, label)

        records = job.suite.measure([(s, unit) for s, unit, _ in job.work], job.reference, tick)
        for (subject, _, key), record in zip(job.work, records, strict=True):
            if not all(map(math.isfinite, _numbers(record))):
                raise KernelizeError(f"{subject.name} gives numbers that are not finite in {label}")
            store.add(key, record)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, (int, float)):
        yield value
