"""Retrieval text: what is asked stands in the text before; nothing of it is evaluation's; rows mark the answers."""

from __future__ import annotations

import itertools
import json
import random
import re
from functools import lru_cache

import pytest
import torch
from tiny import byte_tokenizer

from kernelize.data import Documents, Rows, batches, prefetched
from kernelize.errors import InputError
from kernelize.evaluate import sample_text
from kernelize.recall import TASKS, Writer
from kernelize.recipe import DataSource
from kernelize.retrieval import COPIES, KINDS, PAIRS, QUOTES, SEVERAL, TABLES, write

HAYSTACK = sample_text("train")
TOKENIZER = byte_tokenizer()
SOURCE = (DataSource(builtin="retrieval"),)


def rows_of(length=2048, joined=False, sources=SOURCE):
    return Rows(Documents(sources, 3, haystack=6 * length), TOKENIZER, length, joined)


def documents(kind: str, count: int = 40):
    return [write(HAYSTACK, 3000, random.Random(seed), kind) for seed in range(count)]


# --- the text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_stands_in_the_text_before_it(kind):
    for text, answers in documents(kind):
        assert answers
        for first, last in answers:
            assert text[first:last].strip()
            assert text[first:last] in text[:first], text[first:last]


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_has_its_length_and_is_mostly_haystack(kind):
    for text, answers in documents(kind):
        assert 0.8 * 3000 <= len(text) <= 3000 + 100
        assert answers[0][0] > len(text) // 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_document(kind):
    assert documents(kind, 5) == documents(kind, 5)
    assert len({document.text for document in documents(kind, 20)}) == 20


def test_what_is_too_short_for_a_task_is_haystack_alone():
    for seed in range(50):
        text, answers = write(HAYSTACK, 40, random.Random(seed))
        assert answers or text in HAYSTACK
    with pytest.raises(InputError, match="kind='nothing' is not one of pairs"):
        write(HAYSTACK, 100, random.Random(0), "nothing")


# --- training and evaluation share nothing ----------------------------------------------------------------------------

WORDINGS = {"pairs": PAIRS, "several": SEVERAL, "copying": COPIES, "table": TABLES, "quotes": QUOTES}


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def grams(words: list[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


@lru_cache
def evaluation_prompts() -> list[str]:
    writer = Writer(TOKENIZER, sample_text("novel"))
    made = [make(writer, 1600, 0.5, random.Random(seed)) for make in TASKS.values() for seed in range(4)]
    return [TOKENIZER.decode(prompt.ids) for prompt in made]


def test_every_kind_has_many_wordings_and_no_two_are_alike():
    assert set(WORDINGS) == set(KINDS)
    for wordings in WORDINGS.values():
        assert len(set(wordings)) == len(wordings) >= 8


@pytest.mark.parametrize("kind", KINDS)
def test_no_13_gram_of_evaluation_is_in_training(kind):
    evaluated = set().union(*(grams(words_of(prompt), 13) for prompt in evaluation_prompts()))
    trained = set().union(*(grams(words_of(document.text), 13) for document in documents(kind)))
    assert len(trained) > 1000
    assert not trained & evaluated


def test_no_three_words_of_a_wording_are_those_of_an_evaluation_prompt():
    """Wordings are shorter than 13 words, so the law above does not reach them."""
    novel = grams(words_of(sample_text("novel")), 3)
    evaluated = set().union(*(grams(words_of(prompt), 3) for prompt in evaluation_prompts())) - novel
    assert ("the", "pass", "key") in evaluated
    for wordings in WORDINGS.values():
        for parts in wordings:
            text = parts if isinstance(parts, str) else " ".join(parts)
            assert not grams(words_of(re.sub(r"\{\w+\}", "", text)), 3) & evaluated, text


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joined", [False, True])
def test_rows_mark_the_answers_and_never_cut_a_task(joined):
    marked = 0
    for row, _ in itertools.islice(rows_of(joined=joined)(), 8):
        assert row.input_ids.shape == row.answers.shape == (2048,)
        starts = [0, *(i + 1 for i, token in enumerate(row.input_ids.tolist()) if token == TOKENIZER.eos_token_id)]
        for first, last in itertools.pairwise([*starts, 2048]):
            marked += check_document(row.input_ids[first:last], row.answers[first:last])
    assert marked > 20


def check_document(ids: torch.Tensor, answers: torch.Tensor) -> int:
    """How many answers a document has; each must stand in its own text before."""
    places = answers.nonzero()[:, 0].tolist()
    spans = [(i, next(j for j in range(i, len(ids) + 1) if j == len(ids) or not answers[j]))
             for i in places if i == 0 or not answers[i - 1]]  # fmt: skip
    for first, last in spans:
        answer = TOKENIZER.decode(ids[first:last])
        assert answer.strip()
        assert answer in TOKENIZER.decode(ids[:first])
    return len(spans)


@pytest.mark.parametrize("cut", [1, 4])
def test_resuming_continues_exactly(cut, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"number {i} " * 40}) + "\n" for i in range(30)))
    sources = (DataSource(path=str(tmp_path / "a.jsonl")), *SOURCE)
    undisturbed = list(itertools.islice(rows_of(700, sources=sources)(), cut + 8))
    assert any(row.answers.any() for row, _ in undisturbed)
    position = json.loads(json.dumps(undisturbed[cut - 1][1]))
    resumed = itertools.islice(rows_of(700, sources=sources)(position), 8)
    for (row, at), (expected, expected_at) in zip(resumed, undisturbed[cut:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(row, expected, strict=True))
        assert at == expected_at


def test_the_haystack_may_be_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"grey ducks {i} swim slowly\n" for i in range(3000)))
    source = DataSource(builtin="retrieval", path=str(tmp_path / "a.txt"))
    assert source.name == f"retrieval in {tmp_path / 'a.txt'}"
    row, _ = next(rows_of(sources=(source,))())
    assert "swim slowly" in TOKENIZER.decode(row.input_ids)


def test_rows_that_are_too_short_hold_haystack():
    for row, _ in itertools.islice(rows_of(17)(), 50):
        assert row.input_ids.shape == (17,)


# --- ahead of time ----------------------------------------------------------------------------------------------------


def test_prefetching_changes_nothing():
    ahead = prefetched(batches(rows_of(600)(), 2, 1))
    for expected, expected_at in itertools.islice(batches(rows_of(600)(), 2, 1), 6):
        micro, at = next(ahead)
        assert at == expected_at
        assert all(torch.equal(x, y) for a, b in zip(micro, expected, strict=True) for x, y in zip(a, b, strict=True))
    ahead.close()


def test_an_error_in_the_thread_reaches_the_loop():
    def failing():
        yield 1
        raise InputError("line 2")

    items = prefetched(failing())
    assert next(items) == 1
    with pytest.raises(InputError, match="line 2"):
        next(items)
