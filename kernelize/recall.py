"""Recall tasks: prompts of an exact length in tokens, written from the descriptions in RULER (arXiv 2404.06654)
and Zoology (arXiv 2312.04927), for any tokenizer and any haystack text. Data only: no model is needed here.

A task is one function `(writer, length, depth, rng) -> Prompt`, registered in `TASKS`. Segments are tokenised one by
one and joined as tokens, so that a prompt has exactly `length` tokens and its needle stands exactly at its depth.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .errors import InputError


class Prompt(NamedTuple):
    """`ids` (exactly the length asked for) and what has to come back.

    With `answers`, a model writes `new_tokens` tokens greedily and scores the share of answers that its text
    contains. With `targets`, one ((index, token), …) an answer, the answers stand in the prompt already, and the score
    is the share of answers whose every token is the likeliest at its index, given what stands before.
    """

    ids: list[int]
    answers: tuple[str, ...] = ()
    new_tokens: int = 0
    targets: tuple[tuple[tuple[int, int], ...], ...] = ()


Task = Callable[["Writer", int, float, random.Random], Prompt]
TASKS: dict[str, Task] = {}
DEPTHLESS: set[str] = set()


def task(*, depthless: bool = False) -> Callable[[Task], Task]:
    """Registers a task under its function's name; `depthless`: the depth has no meaning for it."""

    def register(make: Task) -> Task:
        if make.__name__ in TASKS:
            raise ValueError(f"a recall task named {make.__name__!r} is registered already")
        TASKS[make.__name__] = make
        if depthless:
            DEPTHLESS.add(make.__name__)
        return make

    return register


@dataclass
class Writer:
    """Turns text into tokens for one tokenizer, with filler cut from `text`, a novel."""

    tokenizer: Any
    text: str
    start: list[int] = field(init=False)
    filler_ids: list[int] = field(init=False)
    words: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.start = start_ids(self.tokenizer)
        self.filler_ids = self.encode(self.text)
        self.words = sorted(set(re.findall(r"\b[a-z]{4,8}\b", self.text)))
        if not self.filler_ids or len(self.words) < 100:
            raise InputError(
                f"the text is too short: it has {len(self.words)} different words of 4 to 8 small letters; at least 100"
            )

    def encode(self, text: str) -> list[int]:
        return encode(self.tokenizer, text)

    def filler(self, count: int, rng: random.Random) -> list[int]:
        """`count` contiguous tokens from a random place; wraps around when the novel is shorter."""
        first = rng.randrange(len(self.filler_ids))
        rest = self.filler_ids[first : first + count]
        while len(rest) < count:
            rest = rest + self.filler_ids[: count - len(rest)]
        return rest

    def room(self, length: int, *parts: Sequence[int]) -> int:
        left = length - len(self.start) - sum(map(len, parts))
        if left < 0:
            raise InputError(f"length={length} is too short; it needs {length - left} tokens")
        return left

    def hide(self, facts: list[tuple[float, str]], question: str, length: int, rng: random.Random) -> list[int]:
        """Filler with each fact at its depth (0: first, 1: last), then the question; exactly `length` tokens."""
        needles = [(depth, self.encode(fact)) for depth, fact in sorted(facts)]
        tail = self.encode(question)
        filler = self.filler(self.room(length, tail, *(ids for _, ids in needles)), rng)
        ids, done = list(self.start), 0
        for depth, needle in needles:
            place = round(depth * len(filler))
            ids += filler[done:place] + needle
            done = place
        return ids + filler[done:] + tail

    def fill(self, items: list[str], question: str, length: int, rng: random.Random) -> list[int]:
        """The items after as much filler as is missing, then the question; exactly `length` tokens."""
        body, tail = self.encode("".join(items)), self.encode(question)
        return self.start + self.filler(self.room(length, body, tail), rng) + body + tail

    def budget(self, answers: Sequence[str]) -> int:
        """Tokens that a model may write: the answers with separators, and two more."""
        return len(self.encode(" " + ", and ".join(answers))) + 2

    def asked(self, ids: list[int], answers: Sequence[str]) -> Prompt:
        return Prompt(ids, tuple(answers), self.budget(answers))


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def start_ids(tokenizer) -> list[int]:
    """What the tokenizer itself puts before a text: [bos] for most, nothing for GPT-2, Qwen, SmolLM2."""
    if tokenizer.bos_token_id in tokenizer("", verbose=False)["input_ids"]:
        return [tokenizer.bos_token_id]
    return []


def _number(rng: random.Random, digits: int) -> str:
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _numbers(rng: random.Random, count: int, digits: int = 5) -> list[str]:
    return [str(n) for n in rng.sample(range(10 ** (digits - 1), 10**digits), count)]


def _names(writer: Writer, rng: random.Random, count: int) -> list[str]:
    """Distinct two-word names, such as "silent-harbour"; no word is used twice."""
    words = rng.sample(writer.words, 2 * count)
    return [f"{a}-{b}" for a, b in zip(words[::2], words[1::2], strict=True)]


@task()
def passkey(writer: Writer, length: int, depth: float, rng: random.Random) -> Prompt:
    """A five-digit key hidden in a novel (Landmark Attention, arXiv 2305.16300)."""
    key = _number(rng, 5)
    fact = f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
    return writer.asked(writer.hide([(depth, fact)], "\n\nWhat is the pass key? The pass key is", length, rng), [key])


def _fact(name: str, number: str) -> str:
    return f"\n\nThe secret number of {name} is {number}.\n\n"


@task()
def needle_single(writer: Writer, length: int, depth: float, rng: random.Random) -> Prompt:
    """One name with one number."""
    (name,), (number,) = _names(writer, rng, 1), _numbers(rng, 1)
    question = f"\n\nThe secret number of {name} is"
    return writer.asked(writer.hide([(depth, _fact(name, number))], question, length, rng), [number])


@task()
def needle_multikey(writer: Writer, length: int, depth: float, rng: random.Random) -> Prompt:
    """Four names with a number each; one is asked for, the other three stand anywhere."""
    names, numbers = _names(writer, rng, 4), _numbers(rng, 4)
    depths = [depth, *(rng.random() for _ in names[1:])]
    facts = [(d, _fact(*pair)) for d, *pair in zip(depths, names, numbers, strict=True)]
    question = f"\n\nThe secret number of {names[0]} is"
    return writer.asked(writer.hide(facts, question, length, rng), numbers[:1])


@task(depthless=True)
def needle_multivalue(writer: Writer, length: int, depth: float, rng: random.Random) -> Prompt:
    """One name with four numbers in four places; all are asked for."""
    (name,), numbers = _names(writer, rng, 1), _numbers(rng, 4)
    facts = [(rng.random(), _fact(name, number)) for number in numbers]
    question = f"\n\nThe four secret numbers of {name}, separated by commas, are:"
    return writer.asked(writer.hide(facts, question, length, rng), numbers)


@task(depthless=True)
def needle_multiquery(writer: Writer, length: int, depth: float, rng: random.Random) -> Prompt:
    """Four names with a number each; all are asked for."""
    names, numbers = _names(writer, rng, 4), _numbers(rng, 4)
    facts = [(rng.random(), _fact(*pair)) for pair in zip(names, numbers, strict=True)]
    listed = ", ".join(names[:-1]) + " and " + names[-1]
    question = f"\n\nThe secret numbers of {listed}, separated by commas, are:"
    return writer.asked(writer.hide(facts, question, length, rng), numbers)


@task(depthless=True)
def variable_tracking(writer: Writer, length: int, depth: float, rng: random.Random) -> Prompt:
    """A value passed on through four variables, hidden in order beside a second chain; name all that hold it."""
    names = ["".join(rng.sample(string.ascii_uppercase, 3)) for _ in range(8)]
    while len(set(names)) < len(names):
        names = ["".join(rng.sample(string.ascii_uppercase, 3)) for _ in range(8)]
    values, chains = _numbers(rng, 2), (names[:4], names[4:])
    facts = []
    for value, chain in zip(values, chains, strict=True):
        sources = [value, *(f"VAR {name}" for name in chain[:-1])]
        depths = sorted(rng.random() for _ in chain)
        facts += [(d, f"\n\nVAR {n} = {s}\n\n") for d, n, s in zip(depths, chain, sources, strict=True)]
    question = f"\n\nThe four variables that hold the value {values[0]}, separated by commas, are: VAR"
    return writer.asked(writer.hide(facts, question, length, rng), chains[0])


def _most_frequent(
    writer: Writer, question: str, length: int, rng: random.Random, draw: Callable[[int], list[str]], top: list[str]
) -> Prompt:
    """As many items of `draw(count)` as fit, in random order; `top` is asked for."""
    tail, count = writer.encode(question), 16

    def fits(items: list[str]) -> bool:
        return len(writer.start) + len(writer.encode("".join(items))) + len(tail) <= length

    while fits(draw(count + count // 4)):
        count += count // 4
    items = draw(count)
    writer.room(length, writer.encode("".join(items)), tail)
    rng.shuffle(items)
    while not fits(items):  # the order changes how words join into tokens, by a few
        items.pop()
    return writer.asked(writer.fill(items, question, length, rng), top)


@task(depthless=True)
def common_words(writer: Writer, length: int, depth: float, rng: random.Random) -> Prompt:
    """A list of words; five of them make up half of it, the others stand there once."""
    pool = rng.sample(writer.words, len(writer.words))
    question = "\n\nThe five words that stand most often in the list above, separated by commas, are:"

    def draw(count: int) -> list[str]:
        rare = [pool[5 + i % (len(pool) - 5)] for i in range(count // 2)]
        return [f" {word}" for word in (pool[:5] * (count // 10 + 1))[: count - count // 2] + rare]

    return _most_frequent(writer, question, length, rng, draw, pool[:5])


@task(depthless=True)
def frequent_words(writer: Writer, length: int, depth: float, rng: random.Random) -> Prompt:
    """Invented words whose frequencies fall with the square of their rank; the three most frequent are asked for."""
    coded = ["".join(rng.choices(string.ascii_lowercase, k=5)) for _ in range(64)]
    question = "\n\nThe three words that stand most often in the coded text above, separated by commas, are:"
    total = sum(1 / rank**2 for rank in range(1, len(coded) + 1))

    def draw(count: int) -> list[str]:
        shares = [max(1, round(count / total / rank**2)) for rank in range(1, len(coded) + 1)]
        return [f" {word}" for word, share in zip(coded, shares, strict=True) for _ in range(share)][:count]

    return _most_frequent(writer, question, length, rng, draw, coded[:3])


@task(depthless=True)
def associative_recall(writer: Writer, length: int, depth: float, rng: random.Random) -> Prompt:
    """Multi-query associative recall: pairs of word and digit, then every second word again, to be completed."""
    words = rng.sample(writer.words, min(len(writer.words), max(4, length // 16)))
    pairs = {word: str(rng.randrange(10)) for word in words}
    asked = rng.sample(words, len(words) // 2)
    text = writer.encode("\n\n" + "".join(f"{word}: {digit}\n" for word, digit in pairs.items()) + "\n")
    queries = [(writer.encode(f"{word}:"), writer.encode(f" {pairs[word]}"), writer.encode("\n")) for word in asked]
    room = writer.room(length, text, *(part for query in queries for part in query))
    ids, targets = writer.start + writer.filler(room, rng) + text, []
    for query, answer, end in queries:
        first = len(ids) + len(query)
        targets.append(tuple(enumerate(answer, first)))
        ids += query + answer + end
    return Prompt(ids, targets=tuple(targets))
