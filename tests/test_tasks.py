"""Question sets: scores are those of one plain forward a text, and lm-eval, asked the same, says the same."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama

from kernelize import harness
from kernelize.convert import convert
from kernelize.errors import InputError, KernelizeError
from kernelize.evaluate import LmEval, Tasks, evaluate, metric_of
from kernelize.plan import ConversionPlan
from kernelize.runtime.spec import KernelSpec
from kernelize.tasks import loglikelihoods, requests, sets_in

TOKENIZER = byte_tokenizer()
COUNT = 30
SPEC = KernelSpec(feature_map="hedgehog", feature_dim=16, window=8, sinks=2, slots=8, block=4)


def words(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choices("abcdeéf", k=rng.randrange(1, 5))) for _ in range(count))


def made_up(rng: random.Random) -> dict[str, dict]:
    """A row of every schema; contexts end in a space now and then, which belongs to the continuation."""
    choices = [words(rng, rng.randrange(1, 4)) for _ in range(rng.randrange(2, 5))]
    context = words(rng, rng.randrange(2, 12)) + rng.choice(["", " "])
    return {
        "gaps": {"context": words(rng, 5), "target": f" {rng.choice('abc')}"},
        "quiz": {"context": context, "choices": choices, "gold": rng.randrange(len(choices))},
        "twins": {"contexts": [words(rng, 4), words(rng, 6)], "continuation": words(rng, 3), "gold": rng.randrange(2)},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("sets"), random.Random(0)
    rows = [made_up(rng) for _ in range(COUNT)]
    for name in rows[0]:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"id": 0} | row[name]) + "\n" for row in rows))
    (folder / "text.jsonl").write_text('{"text": "no question"}\n')
    return folder


@pytest.fixture(scope="module")
def models():
    model = tiny_llama(3)
    return {
        "plain": (model, TOKENIZER),
        "converted": (convert(tiny_llama(3), ConversionPlan.uniform(SPEC, 2)), TOKENIZER),
    }


@pytest.fixture(scope="module")
def rows(folder, models):
    return evaluate(models, [Tasks(folder=str(folder), batch=7)])


def values(rows, model: str) -> dict[str, float]:
    return {row.metric: row.value for row in rows if row.model == model and "/" in row.metric}


def test_log_probabilities_are_those_of_one_plain_forward(folder, models):
    model, _ = models["converted"]
    flat = [r for found in sets_in(folder) for question in found.questions for r in requests(TOKENIZER, question)]
    for request, (logp, greedy) in zip(flat, loglikelihoods(model, flat, 5), strict=True):
        with torch.inference_mode():
            scores = model(torch.tensor([request.ids])).logits[0].log_softmax(-1)
        chosen = [scores[i - 1, request.ids[i]].item() for i in range(request.start, len(request.ids))]
        assert logp == pytest.approx(sum(chosen), abs=1e-3)
        assert greedy == all(scores[i - 1].argmax() == request.ids[i] for i in range(request.start, len(request.ids)))


@pytest.mark.parametrize("model", ["plain", "converted"])
def test_lm_eval_and_the_scorer_agree(folder, models, rows, model):
    pytest.importorskip("lm_eval")
    found = evaluate({model: models[model]}, [LmEval(folder=str(folder))])
    theirs = values(found, model)
    ours = values(rows, model)
    for row in found:
        aggregate = row.metric == "gaps/perplexity"  # not a mean over rows, so it has no interval there
        assert "/" not in row.metric or (row.low is None if aggregate else row.low <= row.value <= row.high)
    assert set(theirs) == set(ours) >= {"quiz/acc", "quiz/acc_bytes", "twins/acc", "gaps/acc", "mean/corrected"}
    for metric, value in theirs.items():
        assert value == pytest.approx(ours[metric], rel=1e-3 if "perplexity" in metric else 0, abs=1e-3), metric


def test_a_model_that_knows_nothing_stands_at_zero_above_chance_and_one_that_knows_all_at_one(folder, models):
    suite = Tasks(folder=str(folder), names=("quiz", "twins"))
    units = suite.units(TOKENIZER)

    def corrected(choose) -> float:
        records = []
        for unit in units:
            chance = [1 / n for n, _, _ in unit.settings["asked"]]
            right = [choose(n) for n, _, _ in unit.settings["asked"]]
            records.append({"task": unit.settings["task"], "values": {"acc": right}, "chance": chance})
        return {row.metric: row.value for row in suite.rows("m", records)}["mean/corrected"]

    assert corrected(lambda n: 1 / n) == pytest.approx(0.0, abs=1e-12)
    assert corrected(lambda n: 1.0) == pytest.approx(1.0)


def test_intervals_and_counts(rows):
    for row in (row for row in rows if row.suite == "tasks"):
        assert row.low <= row.value <= row.high
        assert row.n == (3 * COUNT if row.metric == "mean/corrected" else COUNT)
        assert metric_of(row.metric).better


def test_the_limit_takes_the_first_rows_for_both(folder, models):
    pytest.importorskip("lm_eval")
    (model, *_) = models
    settings = {"folder": str(folder), "names": ("quiz",), "limit": 9}
    found = evaluate({model: models[model]}, ["tasks", "lm-eval"], settings=settings)
    accuracies = {row.suite: (row.value, row.n) for row in found if row.metric == "quiz/acc"}
    assert accuracies["tasks"] == pytest.approx(accuracies["lm-eval"])
    assert accuracies["tasks"][1] == 9


def test_a_set_is_measured_once(folder, models, tmp_path):
    cache = tmp_path / "cache.jsonl"
    first = evaluate(models, [Tasks(folder=str(folder))], cache=cache)
    size = cache.stat().st_size
    assert evaluate(models, [Tasks(folder=str(folder))], cache=cache) == first
    assert cache.stat().st_size == size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs folder"),
        ({"folder": "."}, "holds no question set"),
        ({"folder": ".", "names": ("quizz",)}, "task 'quizz' is not in"),
        ({"folder": ".", "names": ("text",)}, "text.jsonl is no question set"),
        ({"folder": ".", "names": ("gold",)}, "gold.jsonl, row 1: .* gold=2"),
        ({"folder": ".", "names": ("empty",)}, "empty.jsonl, row 1: a text is empty"),
        ({"folder": ".", "names": ("typed",)}, "typed.jsonl, row 2: KeyError"),
        ({"folder": ".", "names": ("torn",)}, "torn.jsonl is not JSON lines"),
    ],
)
def test_bad_sets_are_named(settings, message, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = {
        "gold": ['{"context": "a", "choices": ["b", "c"], "gold": 2}'],
        "empty": ['{"context": " ", "target": "b"}'],
        "typed": ['{"context": "a", "target": "b"}', '{"context": "a"}'],
        "torn": ['{"context": "a", "target"'],
        "text": ['{"text": "a"}'],
    }
    for name in set(lines) & {"text", *settings.get("names", ())}:
        Path(f"{name}.jsonl").write_text("\n".join(lines[name]))
    with pytest.raises(InputError, match=message):
        evaluate(models, ["tasks"], settings=settings)


def test_lm_eval_refuses_what_it_does_not_know(models):
    pytest.importorskip("lm_eval")
    with pytest.raises(InputError, match="task 'hellaswagg' is none of lm-eval's"):
        harness.measure(*models["plain"], "hellaswagg")
    with pytest.raises(InputError, match="needs names"):
        evaluate(models, ["lm-eval"])


def test_without_lm_eval_it_is_said_how_to_get_it(models, monkeypatch):
    def missing(name):
        raise harness.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(harness.metadata, "version", missing)
    with pytest.raises(InputError, match=r"pip install 'kernelize\[eval\]'"):
        evaluate(models, [LmEval(names=("hellaswag",))])


def test_a_task_whose_data_is_out_of_reach_is_an_error(folder, models):
    pytest.importorskip("lm_eval")
    (quiz,) = sets_in(folder, ["quiz"])
    with pytest.raises(KernelizeError, match="lm-eval cannot run task 'quiz'"):
        harness.measure(*models["plain"], dataclasses.replace(quiz, path=folder / "gone.jsonl"))
