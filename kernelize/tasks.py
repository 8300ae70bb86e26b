"""Question sets as JSON lines: what is asked of a model, and the log probabilities that decide.

A file NAME.jsonl is one set; the fields of its rows tell which of `KINDS` it is:

- cloze: {context, target}; right when the greedy continuation of `context` is `target`.
- choice: {context, choices, gold}; the likeliest choice after the context, as it is or a byte of its length.
- schema: {contexts, continuation, gold}; the context after which the continuation is likeliest.

The texts are joined and cut into tokens as lm-eval (github.com/EleutherAI/lm-evaluation-harness) does, so that both
give the same scores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import InputError
from .recall import encode, start_ids
from .texts import unbroken

Line = Mapping[str, Any]


class Question(NamedTuple):
    """(context, continuation) pairs of which the likeliest should be number `gold`; a single pair is a cloze.

    `sizes`: bytes of the continuations without the space that joins them; empty where all are the same.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int
    sizes: tuple[int, ...] = ()


class Request(NamedTuple):
    """log p(ids[start:] | ids[:start]) is wanted."""

    ids: list[int]
    start: int


def _cloze(row: Line) -> Question:
    return Question(((row["context"], row["target"]),), 0)


def _choice(row: Line) -> Question:
    pairs = tuple((row["context"], f" {choice}") for choice in row["choices"])
    return Question(pairs, row["gold"], tuple(len(choice.encode()) for choice in row["choices"]))


def _schema(row: Line) -> Question:
    return Question(tuple((context, f" {row['continuation']}") for context in row["contexts"]), row["gold"])


@dataclass(frozen=True)
class Kind:
    """A schema of rows: its fields, the question that a row asks, and the same as a task of lm-eval."""

    fields: frozenset[str]
    question: Callable[[Line], Question]
    config: Mapping[str, Any]


def _metrics(*accuracies: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in accuracies]


_PERPLEXITY = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}


KINDS = {
    "cloze": Kind(
        frozenset({"context", "target"}),
        _cloze,
        {
            "output_type": "loglikelihood",
            "doc_to_text": "context",
            "doc_to_target": "target",
            "target_delimiter": "",
            "metric_list": [*_metrics("acc"), _PERPLEXITY],
        },
    ),
    "choice": Kind(
        frozenset({"context", "choices", "gold"}),
        _choice,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": _metrics("acc", "acc_bytes"),
        },
    ),
    "schema": Kind(
        frozenset({"contexts", "continuation", "gold"}),
        _schema,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "gold",
            "doc_to_choice": "contexts",
            "doc_to_target": "continuation",
            "metric_list": _metrics("acc"),
        },
    ),
}


@dataclass(frozen=True)
class QuestionSet:
    """The rows of one file; `digest` changes with its content."""

    name: str
    path: Path
    kind: Kind
    questions: tuple[Question, ...]
    digest: str


def sets_in(folder: str | Path, names: Sequence[str] = ()) -> list[QuestionSet]:
    """The question sets of a folder, or those of them that `names` lists, by name.

    Files of another schema are passed over unless they are named. Raises InputError for a folder without a set, a
    name without a file, and rows that cannot be asked.
    """
    files = {path.stem: path for path in sorted(Path(folder).glob("*.jsonl"))}
    for name in names:
        if name not in files:
            raise InputError(f"task {name!r} is not in {folder}; there are: {', '.join(files) or 'none'}")
    found = [read_set(path) for name, path in files.items() if name in names or (not names and _kind_of(path))]
    if not found:
        raise InputError(f"{folder} holds no question set; NAME.jsonl with rows of {_schemas()} is one")
    return found


def read_set(path: Path) -> QuestionSet:
    """Reads one file. Raises InputError for rows that cannot be asked."""
    kind = _kind_of(path)
    if kind is None:
        raise InputError(f"{path} is no question set; its rows need {_schemas()}")
    raw = path.read_bytes()
    questions = tuple(_question(path, n, row, kind) for n, row in enumerate(_rows(path, raw), 1))
    return QuestionSet(path.stem, path, kind, questions, hashlib.blake2b(raw, digest_size=16).hexdigest())


def _schemas() -> str:
    return " or ".join(f"{{{', '.join(sorted(kind.fields))}}}" for kind in KINDS.values())


def _rows(path: Path, raw: bytes) -> list[Line]:
    try:
        rows = [json.loads(line) for line in raw.decode("utf-8-sig").split("\n") if line.strip()]
    except ValueError as error:
        raise InputError(f"{path} is not JSON lines: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} has no rows, or rows that are no JSON objects")
    return rows


def _kind_of(path: Path) -> Kind | None:
    """By the fields of the first row; a set has all of a kind's fields."""
    try:
        with path.open("rb") as file:
            first = _rows(path, file.readline())[0]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    return next((kind for kind in KINDS.values() if kind.fields <= first.keys()), None)


def _question(path: Path, number: int, row: Line, kind: Kind) -> Question:
    try:
        asked = kind.question(row)
        sound = 0 <= asked.gold < len(asked.pairs) and all(a.strip() and b.strip() for a, b in asked.pairs)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}, row {number}: {type(error).__name__}: {error}") from error
    unbroken("".join(map("".join, asked.pairs)), f"{path}, row {number}")
    if not sound:
        raise InputError(f"{path}, row {number}: a text is empty, or gold={asked.gold} is none of the choices")
    return asked


# --- log probabilities ----------------------------------------------------------------------------------------


def requests(tokenizer, question: Question) -> list[Request]:
    """A question's pairs as tokens. Spaces at the end of a context go over to the continuation: tokens begin with
    them."""
    start = start_ids(tokenizer)
    found = []
    for context, continuation in question.pairs:
        head = context.rstrip()
        whole = start + encode(tokenizer, context + continuation)
        found.append(Request(whole, len(start) + len(encode(tokenizer, head))))
    return found


@torch.inference_mode()
def loglikelihoods(model, asked: Sequence[Request], batch: int) -> list[tuple[float, bool]]:
    """(Σ log p of the continuation, whether each of its tokens is the likeliest) of every request, `batch` at a time.

    Rows are padded at their end, which nothing before it can see; logits exist from the first continuation on.
    """
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].ids))
    scores: dict[int, tuple[float, bool]] = {}
    for first in range(0, len(order), batch):
        part = order[first : first + batch]
        scores |= dict(zip(part, _scored(model, [asked[i] for i in part]), strict=True))
    return [scores[i] for i in range(len(asked))]


def _scored(model, asked: Sequence[Request]) -> list[tuple[float, bool]]:
    longest, begin = max(len(r.ids) for r in asked), min(r.start for r in asked) - 1
    padded = [r.ids + r.ids[-1:] * (longest - len(r.ids)) for r in asked]  # any token would do
    ids = torch.tensor(padded, device=model.device)  # [B, T]
    logits = model(ids, use_cache=False, logits_to_keep=longest - begin).logits  # [B, T - begin, V]
    return [_score(logits[row, r.start - 1 - begin : len(r.ids) - 1 - begin], r) for row, r in enumerate(asked)]


def _score(logits: Tensor, request: Request) -> tuple[float, bool]:
    """logits [N, V] of the N continuation tokens."""
    target = torch.tensor(request.ids[request.start :], device=logits.device)  # [N]
    chosen = logits.float().log_softmax(-1).gather(1, target[:, None])  # [N, 1]
    return chosen.sum().item(), bool((logits.argmax(-1) == target).all())


def judge(gold: int, sizes: Sequence[int], scores: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """The measures of one question (its `gold` and `sizes`) from the scores of its requests.

    acc: right or not; acc_bytes: the same with log p divided by the bytes of the choice; nll, of a cloze: −log p.
    """
    if len(scores) == 1:
        ((logp, greedy),) = scores
        return {"acc": float(greedy), "nll": -logp}
    logps = [logp for logp, _ in scores]
    found = {"acc": float(_argmax(logps) == gold)}
    if sizes:
        found["acc_bytes"] = float(_argmax([logp / size for logp, size in zip(logps, sizes, strict=True)]) == gold)
    return found


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
