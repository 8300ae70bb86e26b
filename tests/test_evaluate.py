"""Laws of the evaluation: the streamed numbers are the plain ones, prompts are exact, a killed run resumes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from kernelize.completion import COMPLETIONS, exact
from kernelize.convert import convert
from kernelize.errors import InputError, KernelizeError
from kernelize.evaluate import (
    METRICS,
    SUITES,
    Code,
    Generation,
    Passkey,
    Perplexity,
    Recall,
    _named,
    bootstrap,
    evaluate,
    greedy,
    lengths_by_suite,
    load_rows,
    make_suite,
    parse_length,
    parse_lengths,
    read_text,
    sample_text,
    save_rows,
    wilson,
)
from kernelize.plan import ConversionPlan
from kernelize.recall import TASKS, Writer
from kernelize.runtime.cache import CACHE
from kernelize.runtime.spec import KernelSpec

TOKENIZER = byte_tokenizer()
WORDS = [f"{a}{b}{c}e" for a in "bcdfghjk" for b in "aeiou" for c in "lmnrst"]


@pytest.fixture(scope="module")
def novel(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=2000)))
    return str(path)


@pytest.fixture(scope="module")
def writer(novel) -> Writer:
    return Writer(TOKENIZER, read_text(novel))


def pair(seed: int = 0):
    return tiny_llama(seed), TOKENIZER


def value(rows, model, metric, length=None, depth=None):
    (row,) = [r for r in rows if (r.model, r.metric, r.length, r.depth) == (model, metric, length, depth)]
    return row.value


def logits_of(model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


# --- perplexity


def test_perplexity_is_that_of_one_plain_forward(novel):
    suite = Perplexity(lengths=(100, 200), text=novel, pieces=3, chunk=33)
    model, _ = pair()
    rows = evaluate({"a": (model, TOKENIZER)}, [suite])
    nll = []
    for unit in suite.units(TOKENIZER):
        scores = logits_of(model, unit.ids[0])
        nll.append([-scores[i - 1, token].item() for i, token in enumerate(unit.ids[0]) if i])
    for metric, length, first in (("ppl", 200, 1), ("ppl", 100, 1), ("ppl_at", 200, 128), ("ppl_at", 128, 100)):
        expected = torch.tensor([piece[first - 1 : length - 1] for piece in nll]).double().mean().exp().item()
        assert value(rows, "a", metric, length) == pytest.approx(expected, rel=1e-5)


def test_kl_is_that_of_plain_forwards_and_absent_for_the_teacher(novel):
    suite = Perplexity(lengths=(64,), text=novel, pieces=1, chunk=20)
    teacher, student = tiny_llama(0), tiny_llama(1)
    rows = evaluate({"student": (student, TOKENIZER), "t": (teacher, TOKENIZER)}, [suite], teacher="t")
    ids = suite.units(TOKENIZER)[0].ids[0]
    p, q = logits_of(teacher, ids)[:-1], logits_of(student, ids)[:-1]
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert value(rows, "student", "kl", 64) == pytest.approx(expected, rel=1e-4)
    assert not [r for r in rows if r.model == "t" and r.metric.startswith("kl")]


def test_code_is_measured_as_books_are_in_a_suite_of_its_own(novel):
    books, code = (
        Perplexity(lengths=(100, 200), text=novel, pieces=2),
        Code(lengths=(100, 200), text="x", code=novel, pieces=2),
    )
    rows = evaluate({"teacher": pair(), "a": pair(1)}, [books, code])
    mine = [[dataclasses.replace(row, suite="") for row in rows if row.suite == suite] for suite in ("ppl", "code")]
    assert mine[0] == mine[1]
    assert len({(r.model, r.suite, r.metric, r.length, r.depth) for r in rows}) == len(rows)


def test_drift_is_told_beyond_the_trained_length_alone_beside_the_last_bucket_within(novel):
    suite = Perplexity(lengths=(128, 256, 512, 600), text=novel, pieces=2)
    model = tiny_llama()
    assert model.config.max_position_embeddings == 256
    rows = evaluate({"a": (model, TOKENIZER)}, [suite])
    assert [row.length for row in rows if row.metric == "drift_at"] == [512, 600]
    alone = evaluate({"a": (model, TOKENIZER)}, [dataclasses.replace(suite, pieces=1)])
    ratio = value(alone, "a", "ppl_at", 512) / value(alone, "a", "ppl_at", 256)
    assert value(alone, "a", "drift_at", 512) == pytest.approx(ratio, rel=1e-9)


def test_jsonl_is_joined_without_separator_and_cut_into_whole_pieces(tmp_path):
    path = tmp_path / "wiki.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("abcd", "efgh", "ij")))
    units = Perplexity(lengths=(4,), text=str(path), pieces=None).units(TOKENIZER)
    assert [TOKENIZER.decode(unit.ids[0]) for unit in units] == ["abcd", "efgh"]


def test_state_of_a_softmax_model_grows_with_the_length(novel):
    rows = evaluate({"a": pair()}, [Perplexity(lengths=(128, 256), text=novel, pieces=1, chunk=64)])
    assert value(rows, "a", "cache_bytes", 256) == 2 * value(rows, "a", "cache_bytes", 128)
    assert value(rows, "a", "cache_bytes", 128) == 128 * 2 * 2 * 2 * 8 * 4  # tokens, layers, K and V, heads, D, bytes


# --- recall


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [700, 1000])
def test_every_prompt_has_exactly_its_length_and_is_seeded(writer, task, length):
    first, again, other = (TASKS[task](writer, length, 0.3, random.Random(seed)) for seed in (1, 1, 2))
    assert len(first.ids) == length
    assert first == again != other
    assert bool(first.answers) != bool(first.targets)


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"associative_recall"}))
def test_the_answers_stand_in_the_prompt(writer, task):
    prompt = TASKS[task](writer, 900, 0.5, random.Random(3))
    text = TOKENIZER.decode(prompt.ids)
    assert all(answer in text for answer in prompt.answers)
    assert prompt.new_tokens >= len(TOKENIZER(" ".join(prompt.answers)).input_ids)


def test_targets_of_associative_recall_are_told_by_the_pairs_before(writer):
    prompt = TASKS["associative_recall"](writer, 900, 0.5, random.Random(3))
    for answer in prompt.targets:
        end = answer[-1][0] + 1
        line = TOKENIZER.decode(prompt.ids[:end]).rsplit("\n", 1)[1]
        assert [token for _, token in answer] == prompt.ids[answer[0][0] : end]
        assert TOKENIZER.decode(prompt.ids[:end]).count("\n" + line) == 2


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_the_needle_stands_at_its_depth(writer, depth):
    text = TOKENIZER.decode(TASKS["passkey"](writer, 1000, depth, random.Random(0)).ids)
    around = "\n\nThe pass key is 12345. Remember it. 12345 is the pass key.\n\n" + text[text.rindex("\n\nWhat is") :]
    needle, room = text.index("\n\nThe pass key is"), 1000 - len(around)
    assert needle == round(depth * room)


def test_a_model_that_copies_the_key_scores_one_and_a_random_one_zero(novel):
    suite = Passkey(lengths=(200,), haystack=novel, depths=(0.5,), trials=2)
    assert value(evaluate({"a": pair()}, [suite]), "a", "passkey", 200, 0.5) == 0.0
    (unit,) = suite.units(TOKENIZER)
    keys = [TOKENIZER(f" {prompt.answers[0]}").input_ids for prompt in unit.settings["asked"]]
    rows = evaluate({"a": (_Oracle(keys, 200), TOKENIZER)}, [suite])
    assert value(rows, "a", "passkey", 200, 0.5) == 1.0
    assert value(rows, "a", "passkey", 200) == 1.0


class _Oracle(torch.nn.Module):
    """Answers row b with keys[b], whatever it reads."""

    def __init__(self, keys: list[list[int]], length: int) -> None:
        super().__init__()
        self.inner, self.keys, self.length = tiny_llama(), torch.tensor(keys), length
        self.config, self.device = self.inner.config, self.inner.device

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, ids, **options):
        out = self.inner(ids, **options)
        step = options[CACHE].get_seq_length() - self.length
        if 0 <= step < self.keys.shape[1]:
            out.logits[:, -1] = torch.nn.functional.one_hot(self.keys[:, step], out.logits.shape[-1]) * 1e4
        return out


def test_greedy_equals_generate(novel):
    model, ids = tiny_llama(), torch.tensor([TOKENIZER(read_text(novel)[:70]).input_ids])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
                              eos_token_id=None, pad_token_id=0)  # fmt: skip
    assert greedy(model, ids, 8, chunk=32).tolist() == expected[:, 70:].tolist()


# --- generation


def test_generation_agrees_with_itself_and_counts_repetition(novel):
    suite = Generation(lengths=(40,), text=novel, prompts=2, new_tokens=12, completions=())
    rows = evaluate({"teacher": pair(), "same": pair(), "other": pair(5)}, [suite])
    assert value(rows, "same", "agreement", 40) == 12.0
    assert value(rows, "other", "agreement", 40) < 12.0
    assert not [r for r in rows if r.model == "teacher" and r.metric == "agreement"]
    assert 0.0 <= value(rows, "same", "repetition", 40) <= 1.0


@pytest.mark.parametrize("task", COMPLETIONS)
def test_exercises_have_their_length_and_their_answer_follows(writer, task):
    first, again, other = (COMPLETIONS[task](writer, 400, random.Random(seed)) for seed in (1, 1, 2))
    assert len(first.ids) == 400
    assert first == again != other
    text, (answer,) = TOKENIZER.decode(first.ids), first.answers
    assert first.new_tokens >= len(TOKENIZER(f" {answer}").input_ids)
    assert RULES[task](text.rsplit("\n\n", 2), answer)


def _steps(text: str) -> set[int]:
    return {b - a for a, b in itertools.pairwise(map(int, text.split(", ")))}


RULES = {
    "copying": lambda parts, answer: parts[1].startswith(f"{parts[2]} {answer} "),
    "counting": lambda parts, answer: len(_steps(f"{parts[-1]} {answer}")) == 1,
    "addition": lambda parts, answer: sum(map(int, re.findall(r"(\d+) \+ (\d+) =$", parts[-1])[0])) == int(answer),
}


@pytest.mark.parametrize(
    ("text", "right"), [(" 85", True), ("85\n1 + 1", True), (" 853", False), ("8", False), ("is 85", False)]
)
def test_a_completion_is_right_only_if_it_is_the_whole_answer(text, right):
    assert exact(text, "85") is right


def test_a_model_that_writes_the_answer_completes_and_a_random_one_does_not(novel):
    suite = Generation(lengths=(200,), text=novel, prompts=3, new_tokens=4, completions=("addition",), trials=3)
    _, unit = suite.units(TOKENIZER)
    keys = [TOKENIZER(f" {p.answers[0]} ".ljust(unit.settings["new_tokens"])).input_ids for p in unit.settings["asked"]]
    rows = evaluate({"knows": (_Oracle([k[:4] for k in keys], 200), TOKENIZER), "not": pair()}, [suite])
    assert value(rows, "knows", "addition", 200) == 1.0
    assert value(rows, "not", "addition", 200) == 0.0


# --- resuming


class _Counting(torch.nn.Module):
    """A model that counts the tokens it reads."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.inner, self.tokens = tiny_llama(seed), 0
        self.config, self.device = self.inner.config, self.inner.device

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, ids, **options):
        self.tokens += ids.numel()
        return self.inner(ids, **options)


def test_every_model_reads_everything_once_the_teacher_too(novel):
    models = {"teacher": (_Counting(), TOKENIZER), "student": (_Counting(1), TOKENIZER)}
    suites = [
        Perplexity(lengths=(64,), text=novel, pieces=2),
        Generation(lengths=(16,), text=novel, prompts=2, new_tokens=8, completions=()),
    ]
    evaluate(models, suites)
    assert [model.tokens for model, _ in models.values()] == [2 * 64 + 2 * (16 + 8 - 1)] * 2


def everything(novel):
    return [
        Perplexity(lengths=(64, 128), text=novel, pieces=3),
        Recall(lengths=(256,), haystack=novel, depths=(0.2, 0.8), trials=1, tasks=("passkey", "associative_recall")),
        Generation(lengths=(16,), text=novel, prompts=2, new_tokens=8, completions=()),
    ]


def test_a_killed_evaluation_resumes_with_the_same_table(novel, tmp_path):
    cache, models = tmp_path / "cache.jsonl", {"teacher": pair(), "student": pair(1)}
    whole = evaluate(models, everything(novel))
    evaluate(models, everything(novel), cache=cache)
    lines = cache.read_text().splitlines(keepends=True)
    cache.write_text("".join(lines[:3]) + lines[3][:20])  # killed while it wrote the fourth record
    done: list[int] = []
    assert evaluate(models, everything(novel), cache=cache, on_progress=lambda d, total, _: done.append(d)) == whole
    assert done
    assert evaluate(models, everything(novel), cache=cache, on_progress=_refuse) == whole


def _refuse(*_):
    raise AssertionError("measured again what was cached")


KILLED = """
import os, signal, sys
import test_evaluate as t
done = []
def stop(tokens, total, label):
    done.append(label)
    if len(done) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
t.evaluate({"teacher": t.pair(), "student": t.pair(1)}, t.everything(sys.argv[1]), cache=sys.argv[2], on_progress=stop)
"""


def test_a_process_that_was_killed_leaves_records_from_which_the_table_is_the_same(novel, tmp_path):
    cache, models = tmp_path / "cache.jsonl", {"teacher": pair(), "student": pair(1)}
    killed = subprocess.run([sys.executable, "-c", KILLED, novel, str(cache)], cwd=Path(__file__).parent)
    assert killed.returncode == -signal.SIGKILL
    kept = len(cache.read_text().splitlines())
    assert kept > 0
    assert evaluate(models, everything(novel), cache=cache) == evaluate(models, everything(novel))
    assert len(cache.read_text().splitlines()) > kept


def test_a_changed_weight_is_another_model(novel, tmp_path):
    cache, model = tmp_path / "cache.jsonl", tiny_llama()
    suite = Perplexity(lengths=(64,), text=novel, pieces=1)
    before = value(evaluate({"a": (model, TOKENIZER)}, [suite], cache=cache), "a", "ppl", 64)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert value(evaluate({"a": (model, TOKENIZER)}, [suite], cache=cache), "a", "ppl", 64) != before


def test_progress_ends_at_its_total(novel):
    seen = []
    evaluate({"a": pair(), "b": pair(1)}, everything(novel), on_progress=lambda *step: seen.append(step[:2]))
    assert seen[-1][0] == seen[-1][1] == max(total for _, total in seen)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_foreign_cache_file_is_refused(novel, tmp_path):
    (tmp_path / "cache.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(InputError, match="line 1 is no evaluation record"):
        evaluate({"a": pair()}, ["ppl"], settings={"text": novel}, lengths=[64], cache=tmp_path / "cache.jsonl")


def test_numbers_that_are_not_finite_stop_the_run(novel):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(KernelizeError, match="not finite"):
        evaluate({"a": (model, TOKENIZER)}, [Perplexity(lengths=(64,), text=novel)])


# --- input


@pytest.mark.parametrize(("text", "length"), [("512", 512), ("4k", 4096), (" 128K ", 131072), ("1m", 1048576)])
def test_lengths_parse(text, length):
    assert parse_length(text) == length


@pytest.mark.parametrize("text", ["", "k", "0", "-1", "4kb", "1.5k", "four", "1k,,2k"])
def test_bad_lengths_are_refused(text):
    with pytest.raises(InputError, match="not a positive number"):
        parse_lengths(text)


def test_lengths_are_sorted_and_distinct():
    assert parse_lengths("4k,512,4096") == (512, 4096)


def test_a_suite_can_have_lengths_of_its_own(novel):
    lengths = lengths_by_suite(["ppl=64", "100,1k"])
    assert lengths["passkey"] == lengths["generation"] == (100, 1024)
    assert lengths["ppl"] == (64,)
    rows = evaluate({"a": pair()}, ["ppl"], lengths=lengths, settings={"text": novel, "pieces": 1})
    assert {row.length for row in rows if row.suite == "ppl"} == {64}
    with pytest.raises(InputError, match="suite='pppl'"):
        lengths_by_suite(["pppl=64"])


def test_a_suite_that_is_named_twice_is_measured_once(novel):
    models, options = {"a": (tiny_llama(), TOKENIZER)}, {"lengths": [64], "settings": {"text": novel, "pieces": 2}}
    assert evaluate(models, ["ppl", "ppl"], **options) == evaluate(models, ["ppl"], **options)


def test_the_haystack_and_the_text_are_two_texts(novel, tmp_path):
    (tmp_path / "code.txt").write_text("def f(x):\n    return x\n" * 60)
    settings = {"haystack": novel, "text": str(tmp_path / "code.txt"), "pieces": 1, "trials": 1, "depths": (0.5,)}
    suites = [_named(name, [200], False, settings) for name in ("ppl", "passkey")]
    code, hidden = (TOKENIZER.decode(suite.units(TOKENIZER)[0].ids[0]) for suite in suites)
    assert "def f(x)" in code
    assert "def f(x)" not in hidden
    assert "pass key" in hidden


@pytest.mark.parametrize("suite", ["ppl", "code"])
def test_a_length_without_a_predicted_token_is_refused(suite):
    with pytest.raises(InputError, match=f"{suite}: length=1 is too short"):
        evaluate({"a": pair()}, [suite], lengths=[1, 256])


def test_learned_positions_end(novel):
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=257, n_positions=64, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    evaluate({"gpt2": (model, TOKENIZER)}, ["ppl"], lengths=[64], settings={"text": novel})
    with pytest.raises(InputError, match=r"length=65 .* beyond the 64 learned positions of gpt2"):
        evaluate({"gpt2": (model, TOKENIZER)}, ["ppl"], lengths=[65], settings={"text": novel})


def test_rotary_positions_go_on_but_it_is_said(novel, caplog):
    rows = evaluate({"a": pair()}, ["ppl"], lengths=[300], settings={"text": novel, "pieces": 1})
    assert "beyond the 256 positions" in caplog.text
    assert value(rows, "a", "trained_length") == 256


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"suites": ["perplexity"]}, "suite='perplexity' is not one of"),
        ({"suites": ["ppl"], "settings": {"piece": 3}}, "did you mean 'pieces'"),
        ({"suites": ["ppl"], "settings": {"pieces": 0}}, "pieces=0 is below 1"),
        ({"suites": ["passkey"], "settings": {"depths": (2.0,)}}, "depths="),
        ({"suites": ["ppl"], "settings": {"text": "nowhere.txt"}}, "nowhere.txt"),
        ({"suites": ["ppl"], "teacher": "nobody"}, "teacher='nobody'"),
        (
            {"suites": ["passkey"], "lengths": [20]},
            r"^recall: task 'passkey': length=20 is too short; it needs \d+ tok",
        ),
    ],
)
def test_bad_input_is_named(novel, call, message):
    where = {"text": novel} if call["suites"] == ["ppl"] else {"haystack": novel}
    call = {"settings": where, **call}
    with pytest.raises(InputError, match=message):
        evaluate({"a": pair()}, **call)


def test_a_completion_without_room_is_named(novel):
    with pytest.raises(
        InputError, match=r"^generation: completion 'copying': length=40 is too short; it needs \d+ tok"
    ):
        Generation(lengths=(40,), text=novel).units(TOKENIZER)


def test_a_text_of_too_few_words_is_named(tmp_path):
    (tmp_path / "few.txt").write_text("one small text " * 40)
    with pytest.raises(InputError, match=r"^recall: haystack='.*few.txt': the text is too short: it has 2 different"):
        Recall(haystack=str(tmp_path / "few.txt")).units(TOKENIZER)


def test_a_text_shorter_than_a_piece_is_named(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(InputError, match="9 tokens, too few"):
        Perplexity(lengths=(64,), text=str(tmp_path / "short.txt")).units(TOKENIZER)


# --- rows, intervals, samples


def test_sizes_are_decimal_in_every_table():
    for metric in ("cache_bytes", "state_bytes", "peak_bytes"):
        shown = [METRICS[metric].show(size) for size in (0.0, 999.0, 45_336.0, 8_985_600.0, 3e12)]
        assert shown == ["0 B", "999 B", "45.3 kB", "9.0 MB", "3,000.0 GB"]


def test_rows_survive_a_file_and_every_metric_is_described(novel, tmp_path):
    rows = evaluate({"teacher": pair(), "b": pair(1)}, everything(novel))
    save_rows(rows, tmp_path / "rows.json")
    assert load_rows(tmp_path / "rows.json") == rows
    assert {row.metric for row in rows} <= set(METRICS)
    (tmp_path / "rows.json").write_text("{}")
    with pytest.raises(InputError, match="no evaluation rows"):
        load_rows(tmp_path / "rows.json")
    (tmp_path / "rows.json").write_text('{"rows": [{"model": "a"}]}')
    with pytest.raises(InputError, match=r"no evaluation rows \(rows\[0\].suite: Field required, not [^\n]*\)$"):
        load_rows(tmp_path / "rows.json")


def test_intervals_hold_the_value_and_are_seeded(novel):
    rows = evaluate({"teacher": pair(), "b": pair(1)}, everything(novel))
    for row in rows:
        assert row.low is None or row.low - 1e-9 <= row.value <= row.high + 1e-9
    assert bootstrap([1.0, 2.0, 9.0], [1, 1, 1], seed=3) == bootstrap([1.0, 2.0, 9.0], [1, 1, 1], seed=3)
    assert bootstrap([1.0], [1], seed=0) == (None, None)
    assert wilson(0.0, 10)[1] == pytest.approx(0.278, abs=1e-3)  # Wilson 1927 for 0 of 10


def test_the_samples_are_shipped_disjoint_and_long():
    novel, train, code = map(sample_text, ("novel", "train", "code"))
    assert sum(len(text.encode()) for text in (novel, train)) <= 1_000_000
    assert 5e4 < len(TOKENIZER(code).input_ids) < 3e5
    assert code.count("# file: kernelize/") > 5
    assert "Dorothea" in novel
    assert "Dorothea" not in train


def test_quick_is_smaller_than_usual():
    for name in SUITES:
        quick, usual = make_suite(name, quick=True), make_suite(name)
        assert dataclasses.asdict(quick) != dataclasses.asdict(usual)
        assert quick.reach <= usual.reach


@pytest.mark.parametrize("names", [("ppl", "passkey"), ("recall",), ("generation",)])
def test_quick_takes_less_than_two_minutes_for_two_models_of_135m_on_two_cores(names):
    """By 700 tokens a second of reading and 10 of writing, a batch at a time, with 20 seconds for loading."""
    units = [unit for name in names for unit in make_suite(name, quick=True).units(TOKENIZER)]
    read = sum(len(ids) for unit in units for ids in unit.ids)
    asked = [[prompt.new_tokens for prompt in unit.settings.get("asked", ())] for unit in units]
    steps = sum(unit.settings.get("new_tokens") or max(n, default=0) for unit, n in zip(units, asked, strict=True))
    assert 20 + 2 * (read / 700 + steps / 10) < 120


MEMORY = """
import resource, sys
import test_evaluate as t
spec = t.KernelSpec(feature_map="hedgehog", feature_dim=16, window=64, sinks=2, slots=16, block=64)
model = t.convert(t.tiny_llama(num_hidden_layers=1, head_dim=128), t.ConversionPlan.uniform(spec, 1))
for length in (8192, 131072):
    suite = t.Perplexity(lengths=(length,), text=sys.argv[1], pieces=1, chunk=1024)
    t.evaluate({"long": (model, t.TOKENIZER)}, [suite])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_depend_on_the_length(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=27_000)))  # 135,000 tokens
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], cwd=Path(__file__).parent, capture_output=True,
                          text=True, check=True)  # fmt: skip
    short, long = map(int, done.stdout.split())  # kilobytes, the peak so far
    assert long <= 1.1 * short
    keys_and_values = 1 * 2 * 2 * 128 * 4 * 131072 // 1024  # one layer, two heads: what softmax would keep
    assert long - short < 0.3 * keys_and_values


def test_the_ratio_to_the_teacher_is_paired_and_one_for_itself(novel):
    suite = Perplexity(lengths=(100,), text=novel, pieces=4)
    rows = evaluate({"teacher": pair(), "same": pair(), "other": pair(1)}, [suite])
    assert value(rows, "same", "ppl_ratio", 100) == pytest.approx(1.0, abs=1e-9)
    ratio = value(rows, "other", "ppl", 100) / value(rows, "teacher", "ppl", 100)
    assert value(rows, "other", "ppl_ratio", 100) == pytest.approx(ratio, rel=1e-9)


def test_a_kernelized_model_is_measured_with_a_state_of_constant_size(novel):
    spec = KernelSpec(feature_map="hedgehog", feature_dim=16, window=8, sinks=2, slots=8, block=4)
    student = convert(tiny_llama(), ConversionPlan.uniform(spec, 2))
    suite = Perplexity(lengths=(128, 256), text=novel, pieces=2, chunk=64)
    rows = evaluate(
        {"student": (student, TOKENIZER), "teacher": pair()}, [suite, Passkey((256,), haystack=novel, trials=1)]
    )
    assert value(rows, "student", "cache_bytes", 256) == value(rows, "student", "cache_bytes", 128)
    assert value(rows, "student", "kl", 256) > 0
    ids = suite.units(TOKENIZER)[0].ids[0]
    nll = -logits_of(student, ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    alone = evaluate({"a": (student, TOKENIZER)}, [dataclasses.replace(suite, pieces=1)])
    assert nll.mean().exp().item() == pytest.approx(value(alone, "a", "ppl", 256), rel=1e-4)
