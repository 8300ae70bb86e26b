"""Training text in which something has to be found again: facts hidden in a haystack and asked for at its end.

A kind of task is one function `(haystack, rng, count) -> Scene`, registered in `KINDS`, with its wordings in a table.
None of the wordings is one of `kernelize.recall`, which evaluation uses (tests/test_retrieval.py). Text only: no
tokenizer is needed here. A document is a function of haystack, length and seed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .errors import InputError

OPEN, CLOSE = "\ue000", "\ue001"  # stand around an answer until the text is put together
FACT_CHARACTERS = 400  # of a document for each thing that is hidden in it
MOST_FACTS = 24
TRIES = 4


class Marked(NamedTuple):
    """A document and the spans [first, last) of its characters that are answers."""

    text: str
    answers: tuple[tuple[int, int], ...] = ()


class Scene(NamedTuple):
    """What is hidden in the haystack, each at a place of its own, and what is asked at the end, answers marked."""

    facts: list[str]
    questions: list[str]


Kind = Callable[[str, random.Random, int], Scene]
KINDS: dict[str, Kind] = {}


def kind(make: Kind) -> Kind:
    """Registers a kind of task under its function's name."""
    if make.__name__ in KINDS:
        raise ValueError(f"a kind of retrieval named {make.__name__!r} is registered already")
    KINDS[make.__name__] = make
    return make


def write(haystack: str, characters: int, rng: random.Random, name: str | None = None) -> Marked:
    """About `characters` of the haystack from a random place, with a task of kind `name`, or of any kind.

    At least half of the document is haystack: a shorter one gets fewer facts, and one without room for any is the
    haystack alone, without answers.
    """
    if name is not None and name not in KINDS:
        raise InputError(f"kind={name!r} is not one of {', '.join(KINDS)}")
    make = KINDS[name or rng.choice(list(KINDS))]
    first = rng.randrange(max(1, len(haystack) - characters + 1))
    filler = haystack[first : first + characters].replace(OPEN, "").replace(CLOSE, "")
    count = rng.randint(1, max(1, min(MOST_FACTS, characters // FACT_CHARACTERS)))
    for _ in range(TRIES):
        scene = make(filler[: characters // 2], rng, count)
        extra = sum(len(part) + 2 for part in (*scene.facts, *scene.questions))
        if scene.questions and extra <= characters // 2:
            return _unmarked(_hidden(filler[: characters - extra], scene.facts, rng) + "\n\n", scene.questions)
        count = max(1, count // 2)
    return Marked(filler)


def _hidden(filler: str, facts: Sequence[str], rng: random.Random) -> str:
    """The filler with each fact between two words, half of the time on a line of its own."""
    places = sorted(rng.randrange(len(filler) + 1) for _ in facts)
    parts, done = [], 0
    for place, fact in zip(places, facts, strict=True):
        found = filler.find(" ", place)
        end = max(done, len(filler) if found < 0 else found)
        around = "\n" if "\n" in fact else rng.choice(("\n", "\n\n", " "))
        parts += [filler[done:end], around, fact, around]
        done = end
    return "".join((*parts, filler[done:].lstrip(" ") if parts else filler))


def _unmarked(text: str, questions: Sequence[str]) -> Marked:
    answers = []
    for piece in re.split(f"({OPEN}[^{CLOSE}]*{CLOSE})", "\n".join(questions) + "\n"):
        if piece.startswith(OPEN):
            answers.append((len(text), len(text) + len(piece) - 2))
            piece = piece[1:-1]
        text += piece
    return Marked(text, tuple(answers))


def _answer(text: str) -> str:
    return OPEN + text + CLOSE


# --- keys and values --------------------------------------------------------------------------------------------------

FIRST, LAST, MADE_OF, THINGS = (
    line.split()
    for line in (
        "Ada Bela Carl Dina Emil Frida Gustav Hana Igor Jana Karim Lena Milo Nadia Otis Petra Rosa Sven Tara Ugo Vera",
        "Alder Birk Cole Dorn Ekman Falk Grau Holt Imre Jonas Kern Lund Moss Nagy Orr Pohl Reyes Stark Toth Ward Zorn",
        "amber brass clay copper cotton crystal felt glass granite iron ivory lace linen oak paper silk steel tin wax",
        "anchor barrel basket bell bottle cabinet chest clock crate drum kettle ladder lamp mirror piano rope wheel",
    )
)


def _words(haystack: str) -> list[str]:
    """Words of the haystack that facts are made of; so they fit its language."""
    return sorted(set(re.findall(r"\b[^\W\d_]{4,9}\b", haystack))) or [*MADE_OF, *THINGS]


def _key(rng: random.Random, words: Sequence[str]) -> str:
    return rng.choice((
        lambda: f"{rng.choice(FIRST)} {rng.choice(LAST)}",
        lambda: f"{rng.choice(MADE_OF)} {rng.choice(THINGS)}",
        lambda: f"{rng.choice(words)} {rng.choice(words)}".lower(),
        lambda: rng.choice(words).lower() + str(rng.randrange(100)),
        lambda: f"{rng.choice('BCDFGHJKLMNPRSTVWXZ')}{rng.randrange(10, 1000)}",
    ))()  # fmt: skip


def _value(rng: random.Random, words: Sequence[str]) -> str:
    digits = rng.randint(3, 8)
    return rng.choice((
        lambda: str(rng.randrange(10 ** (digits - 1), 10**digits)),
        lambda: f"{rng.randrange(16**digits):0{digits}x}",
        lambda: rng.choice(words).lower(),
        lambda: f"{rng.choice(words)}-{rng.choice(words)}".lower(),
        lambda: f"{rng.randrange(24):02}:{rng.randrange(60):02}",
        lambda: "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=3)) + str(rng.randrange(10, 100)),
    ))()  # fmt: skip


def _pairs(rng: random.Random, haystack: str, count: int) -> list[tuple[str, str]]:
    """Different keys with a value each."""
    words, pairs = _words(haystack), dict[str, str]()
    while len(pairs) < count:
        pairs[_key(rng, words)] = _value(rng, words)
    return list(pairs.items())


# --- kinds ------------------------------------------------------------------------------------------------------------

PAIRS = (  # what is hidden, what is asked
    ("The label on {key} reads {value}.", "What does the label on {key} read? It reads {answer}."),
    ("Entry for {key}: {value}.", "Entry for {key}: {answer}."),
    ("{key} -> {value}", "Complete the mapping.\n{key} -> {answer}"),
    ("Somebody wrote on the wall that {key} answers to {value}.", "As the wall says, {key} answers to {answer}."),
    ('config["{key}"] = "{value}"', 'assert config["{key}"] == "{answer}"'),
    ("(The reference of {key} was changed to {value}.)", "Q: Which reference does {key} have now?\nA: {answer}"),
    ("Dear reader, {key} goes with {value}.", "The reader was told what goes with {key}, namely {answer}."),
    ('<item name="{key}">{value}</item>', "The item named {key} contains {answer}"),
    ("When asked about {key}, always say {value}.", "User: Tell me about {key}.\nAssistant: {answer}"),
    ("* {key} — {value}", "Look up the bullet point of {key} above: {answer}"),
    ("The parcel for {key} carries the mark {value}.", "Mark on the parcel for {key}: {answer}."),
    ("Margin note: {key} = {value}", "A margin note above gives a value for {key}. It says {answer}."),
    ("In this story {key} stands for {value}.", "Decode one expression of the story. {key}: {answer}"),
    ("memo | {key} | {value} | end", "memo | {key} | {answer} | end"),
)


@kind
def pairs(haystack: str, rng: random.Random, count: int) -> Scene:
    """Keys with values, all worded alike; one is asked for, or a few."""
    fact, question = rng.choice(PAIRS)
    found = _pairs(rng, haystack, count)
    asked = rng.sample(found, 1 + count // 8)
    facts = [fact.format(key=k, value=v) for k, v in found]
    return Scene(facts, [question.format(key=k, answer=_answer(v)) for k, v in asked])


SEVERAL = (  # what is hidden, the head of the questions, one question
    ("At the counter, {key} drew ticket {value}.", "Tickets drawn at the counter:", "- {key} drew {answer}"),
    ("{key} keeps the spare part {value} in stock.", "Stock list, compiled from the text:", "{key}: {answer}"),
    ("Observation: sensor {key} shows {value}.", "Sensor readings so far", "{key} = {answer}"),
    ("The guest called {key} got room {value}.", "Fill in everybody's room.", "{key} sleeps in {answer};"),
    ("let {key} be {value};", "// what each of them holds", "show {key}  // {answer}"),
    ("Note to self: {key} likes {value} best.", "Now answer briefly.", "What does {key} like best? {answer}"),
    ("Flight {key} leaves from gate {value}.", "Departures", "{key}  gate {answer}"),
    ("The motto of {key} is “{value}”.", "List of mottos", "{key}: “{answer}”"),
    ("{key} was moved to shelf {value}.", "Shelves that the text mentions:", "{key} / {answer}"),
    ("Score card, {key}: {value} points.", "Final score card", "{key} ended with {answer} points"),
)


@kind
def several(haystack: str, rng: random.Random, count: int) -> Scene:
    """Several facts, and questions about most of them in another order."""
    fact, head, question = rng.choice(SEVERAL)
    found = _pairs(rng, haystack, max(2, count))
    asked = rng.sample(found, rng.randint(2, len(found)))
    facts = [fact.format(key=k, value=v) for k, v in found]
    return Scene(facts, [head, *(question.format(key=k, answer=_answer(v)) for k, v in asked)])


COPIES = (
    ("Line to remember: {passage}", "Repeat the line that begins with “{start}”: {start} {answer}"),
    ("~ {passage} ~", "Between tildes stands a line that starts with “{start}”. In full: ~ {start} {answer} ~"),
    ("# {passage}", "Copy the comment that opens with “{start}”.\n# {start} {answer}"),
    ("Verse: {passage}", "Say the verse again.\nVerse: {start} {answer}"),
    ("He muttered: {passage}.", "What he muttered, word for word: {start} {answer}."),
    ("[{passage}]", "Write out again what stands in square brackets from “{start}” on.\n[{start} {answer}]"),
    ("The card says {passage}.", "The same card once more: {start} {answer}."),
    ("The spell goes {passage} and nothing more.", "Cast the spell a second time: {start} {answer}"),
    ("> {passage}", "Quoted above:\n> {start} {answer}"),
    ("log: {passage}", "grep '^log: {start}'\nlog: {start} {answer}"),
)


@kind
def copying(haystack: str, rng: random.Random, count: int) -> Scene:
    """Lines of random words; those that begin with given words are to be repeated."""
    fact, question = rng.choice(COPIES)
    words = _words(haystack)
    lines = [rng.choices(words, k=rng.randint(6, 20)) for _ in range(max(1, count // 3))]
    asked = rng.sample(lines, rng.randint(1, min(4, len(lines))))
    questions = [question.format(start=" ".join(w[:2]), answer=_answer(" ".join(w[2:]))) for w in asked]
    return Scene([fact.format(passage=" ".join(w)) for w in lines], questions)


TABLES = (  # head, row, foot, question
    ("| name | value |\n|---|---|", "| {key} | {value} |", "", "In the table above, {key} has the value {answer}."),
    ("name,amount", "{key},{value}", "", "select amount where name = '{key}': {answer}"),
    ("Glossary of this report", "{key} means {value}", "", "By the glossary, {key} means {answer}."),
    ("{", '  "{key}": "{value}",', "}", 'data["{key}"] == "{answer}"'),
    ("Timetable", "{key} ..... {value}", "", "Timetable, line of {key}: {answer}"),
    ("codes:", "  {key}: {value}", "", "From the list of codes, that of {key}: {answer}"),
    ("<table>", "<tr><td>{key}</td><td>{value}</td></tr>", "</table>", "The cell beside {key} holds {answer}."),
    ("KEY\tDATA", "{key}\t{value}", "", "{key}\t{answer}"),
    ("Words of an invented language:", "{key} = {value}", "", "How do they say {key} there? {answer}"),
)


@kind
def table(haystack: str, rng: random.Random, count: int) -> Scene:
    """A table in one place, and questions about some of its rows."""
    head, row, foot, question = rng.choice(TABLES)
    found = _pairs(rng, haystack, 3 * count)
    lines = [head, *(row.format(key=k, value=v) for k, v in found), foot]
    asked = rng.sample(found, rng.randint(1, max(1, count)))
    return Scene(["\n".join(lines).strip("\n")], [question.format(key=k, answer=_answer(v)) for k, v in asked])


QUOTES = (
    "Earlier the text said: “{start} {answer}”",
    "Finish the sentence as it stood above: {start} {answer}",
    "Quotation, continued word for word: “{start} {answer}”",
    "As was written before: {start} {answer}",
    "Search for “{start}”: 1 hit\n… {start} {answer} …",
    "Exercise: complete from memory.\n{start} {answer}",
    "The sentence with “{start}” goes on like this: {answer}",
    "Recall the words.\n— {start} {answer}",
    "“{start} {answer}” (see above)",
)


@kind
def quotes(haystack: str, rng: random.Random, count: int) -> Scene:
    """Passages of the haystack itself, of which the beginning is given."""
    words = [match.span() for match in re.finditer(r"\S+", haystack)]
    questions = []
    for _ in range(max(1, count // 3)):
        given, asked = rng.randint(5, 8), rng.randint(4, 16)
        if len(words) < given + asked:
            break
        first = rng.randrange(len(words) - given - asked + 1)
        end, last = words[first + given - 1][1], words[first + given + asked - 1][1]
        start, answer = haystack[words[first][0] : end], haystack[end:last]
        if haystack.count(start) == 1:
            # the quotation keeps the text's own white space, or copying would be another task
            wording = rng.choice(QUOTES).replace("{start} {answer}", "{start}{answer}")
            space = answer[: len(answer) - len(answer.lstrip())]
            joined = space if "{start}{answer}" in wording else ""
            questions.append(wording.format(start=start, answer=joined + _answer(answer.lstrip())))
    return Scene([], questions)
