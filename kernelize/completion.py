"""Completion tasks: prompts whose one right continuation a model has to write out, token after token.

Likelihood hides what generation loses: a model that is nearly right at every token still leaves the path at the first
wrong one. A task is one function `(writer, length, rng) -> Prompt`, registered in `COMPLETIONS`; prompts have exactly
`length` tokens, the novel before the exercise. Data only: no model is needed here.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from .recall import Prompt, Writer

Completion = Callable[[Writer, int, random.Random], Prompt]
COMPLETIONS: dict[str, Completion] = {}


def completion(make: Completion) -> Completion:
    """Registers a task under its function's name."""
    if make.__name__ in COMPLETIONS:
        raise ValueError(f"a completion task named {make.__name__!r} is registered already")
    COMPLETIONS[make.__name__] = make
    return make


def exact(text: str, answer: str) -> bool:
    """Whether `text` begins with `answer`, and the answer ends there: 85 is not in 853."""
    written = text.lstrip()
    return written.startswith(answer) and not written[len(answer) : len(answer) + 1].isalnum()


def _prompt(writer: Writer, items: list[str], length: int, rng: random.Random, answer: str) -> Prompt:
    return writer.asked(writer.fill(items, "", length, rng), [answer])


@completion
def copying(writer: Writer, length: int, rng: random.Random) -> Prompt:
    """A list of words that takes up half of the prompt, and its first four again: the next six are wanted."""
    words = rng.sample(writer.words, 10)
    while len(writer.encode(" ".join(words))) < length // 2 - 16:
        words.append(rng.choice(writer.words))
    return _prompt(writer, [f"\n\n{' '.join(words)}\n\n{' '.join(words[:4])}"], length, rng, " ".join(words[4:10]))


@completion
def counting(writer: Writer, length: int, rng: random.Random) -> Prompt:
    """Twelve numbers in equal steps: the next four are wanted."""
    first, step = rng.randrange(1, 50), rng.randrange(2, 10)
    terms = [str(first + step * i) for i in range(16)]
    return _prompt(writer, [f"\n\n{', '.join(terms[:12])},"], length, rng, ", ".join(terms[12:]))


@completion
def addition(writer: Writer, length: int, rng: random.Random) -> Prompt:
    """Sums of two numbers below fifty; the last one is to be worked out."""
    pairs = [(rng.randrange(1, 50), rng.randrange(1, 50)) for _ in range(9)]
    sums = [f"{a} + {b} = {a + b}\n" for a, b in pairs[:-1]]
    a, b = pairs[-1]
    return _prompt(writer, [f"\n\n{''.join(sums)}{a} + {b} ="], length, rng, str(a + b))
