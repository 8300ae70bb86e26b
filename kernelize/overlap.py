"""Whether training text holds evaluation text: runs of 13 words that both have (arXiv 2005.14165), lower-cased.

Evaluation items of 8 to 12 words count as one run; shorter ones say nothing and are left out. White space and
punctuation do not count.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .data import read_documents
from .errors import InputError

WORDS, SHORTEST = 13, 8  # of a run; of an item that counts whole

Run = tuple[str, ...]


@dataclass(frozen=True)
class Overlap:
    """What a training file shares with an evaluation file: `documents` of its `of`, `runs` different ones."""

    training: str
    evaluation: str
    documents: int
    of: int
    runs: int
    example: str


def overlaps(training: Sequence[str], evaluation: Sequence[str]) -> list[Overlap]:
    """One line for each training file and evaluation file (.txt, .txt.xz, .jsonl, .parquet; all columns of text count).

    The runs of the evaluation files are held in memory, about 100 bytes a word.
    """
    index = _index(evaluation)
    return [line for path in training for line in _of_file(path, evaluation, index)]


def _of_file(path: str, evaluation: Sequence[str], index: dict[Run, set[str]]) -> list[Overlap]:
    sizes = sorted({len(run) for run in index})
    found, documents, count = defaultdict[str, set[Run]](set), defaultdict[str, int](int), 0
    for document in read_documents(path, text_field=None):
        count += 1
        for name, shared in _shared(words(document["text"]), index, sizes).items():
            found[name] |= shared
            documents[name] += 1
    return [
        Overlap(path, name, documents[name], count, len(found[name]), " ".join(min(found[name], default=())))
        for name in evaluation
    ]


def _index(evaluation: Sequence[str]) -> dict[Run, set[str]]:
    """Every run of the evaluation files, and the files it is from."""
    index = defaultdict[Run, set[str]](set)
    for path in evaluation:
        for document in read_documents(path, text_field=None):
            for run in runs(words(document["text"])):
                index[run].add(path)
    if not index:
        raise InputError(f"no text of {SHORTEST} words or more is in {', '.join(evaluation)}")
    return dict(index)


def _shared(found: list[str], index: dict[Run, set[str]], sizes: Sequence[int]) -> dict[str, set[Run]]:
    shared = defaultdict[str, set[Run]](set)
    for size in sizes:
        for run in zip(*(found[i:] for i in range(size)), strict=False):
            for name in index.get(run, ()):
                shared[name].add(run)
    return shared


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def runs(found: list[str]) -> Iterator[Run]:
    """All runs of 13 words; of a shorter text, itself."""
    if SHORTEST <= len(found) < WORDS:
        yield tuple(found)
    yield from zip(*(found[i:] for i in range(WORDS)), strict=False)
