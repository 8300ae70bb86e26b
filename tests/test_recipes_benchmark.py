"""The table of recipes: one command trains, stops in time, goes on, measures, and says what came out."""

from __future__ import annotations

import json
import lzma
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tiny import byte_tokenizer, tiny_llama

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import recipes as benchmark
import second_family

from kernelize.evaluate import Row, load_rows
from kernelize.recipe import load_recipe

LINES = [f"line {n}: {n * n} is the square of {n}, and {n % 7} is left of it by seven.\n" for n in range(3000)]


@pytest.fixture(scope="module")
def args(tmp_path_factory) -> Namespace:
    """A tiny teacher, and text in the layout that the command expects."""
    root = tmp_path_factory.mktemp("recipes")
    for folder in ("data/train", "data/eval", "data/longdocs"):
        (root / folder).mkdir(parents=True)
    for i, name in enumerate(benchmark.TEXT):
        texts = ["".join(LINES[100 * i + 5 * j :][:40]) for j in range(20)]
        columns = {"prompt": texts, "response": texts} if name == "instruct" else {"text": texts}
        pyarrow.parquet.write_table(pyarrow.table(columns), root / f"data/train/{name}.parquet")
    letters = "abcdefghij"  # of which the text for recall makes its words
    spelt = ["".join(letters[int(digit)] for digit in str(1000 + n)) for n in range(900)]
    unseen = "".join(
        f"Of {word} sheep, {n // 3} were black; the shepherd counted them. " for n, word in enumerate(spelt)
    )
    (root / "data" / benchmark.WIKI).write_text(json.dumps({"text": unseen[:9000]}) + "\n")
    with lzma.open(root / "data" / benchmark.BOOK, "wt") as file:
        file.write(unseen[9000:])
    with lzma.open(root / "data" / second_family.HAYSTACK, "wt") as file:
        file.write("".join(reversed(LINES)))
    question = {"context": "Two and two are", "choices": ["four", "five"], "gold": 0}
    (root / "data/eval/sums.jsonl").write_text("".join(json.dumps({"id": i} | question) + "\n" for i in range(2)))
    tiny_llama(max_position_embeddings=2048).save_pretrained(root / "teacher")
    byte_tokenizer().save_pretrained(root / "teacher")
    return Namespace(
        data=root / "data", output=root / "out", source=str(root / "teacher"), device="cpu", dtype="float32", jobs=1,
        pieces=2, book_pieces=2, tokens=None, trial=True, untrained=["default"], suites=list(benchmark.SUITES),
        recipes=["default"], reaches=[300], chunk=2048, batch=16, model=None, minutes=None,
    )  # fmt: skip


def test_what_another_call_has_measured_stays(tmp_path):
    """Of other models: rows of the same ones are replaced."""
    path = tmp_path / "rows/passkey.json"
    path.parent.mkdir()

    def row(model: str, value: float) -> Row:
        return Row(model, "recall", "passkey", 512, None, value, None, None, 40)

    benchmark.keep_rows([row("teacher", 0.1), row("a.0", 0.2)], path)
    benchmark.keep_rows([row("teacher", 0.3), row("a.1", 0.4)], path)
    assert {(x.model, x.value) for x in load_rows(path)} == {("a.0", 0.2), ("teacher", 0.3), ("a.1", 0.4)}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/sums.jsonl").touch()
    benchmark.write_table(Namespace(output=tmp_path, data=tmp_path), ["teacher"])
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[0] == "| measure | teacher | a (2 seeds) | must reach |"
    assert any(line.startswith("| passkey at 512 | 0.30 | 0.30 [0.20, 0.40] |") for line in table)


@pytest.mark.slow
def test_from_the_search_for_overlap_to_the_table(args, monkeypatch):
    args.output.mkdir()
    benchmark.check_overlap(args)
    runs = [benchmark.Run("window-only", 0), benchmark.Run("default", 0), benchmark.Run("default", 1)]
    for run in runs:
        benchmark.train(run, args)
    assert all(benchmark.is_trained(run, args) for run in runs)
    first, second = (benchmark.load(str(args.output / run.name))[0].state_dict() for run in runs[1:])
    assert any(not torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(benchmark.TimeUpError):
        benchmark.measure(runs, args, benchmark.Clock.of(0))
    options = {"--data": args.data, "--output": args.output, "--source": args.source, "--device": "cpu"}
    words = [str(word) for pair in options.items() for word in pair]
    words += ["--trial", "--recipes", "default", "window-only", "--seeds", "0", "1", "--reaches", "300"]
    monkeypatch.setattr(sys, "argv", [benchmark.__file__, *words])
    benchmark.measure_apart(runs, Namespace(**{**vars(args), "suites": ["passkey"]}), benchmark.Clock.of(None))
    assert len((args.output / "measured-passkey.jsonl").read_text().splitlines()) == 7  # each model's, and at a reach
    benchmark.measure(runs, args, benchmark.Clock.of(None))
    assert len((args.output / "measured-passkey.jsonl").read_text().splitlines()) == 7
    lines = (args.output / "table.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    columns = ["teacher", "default untrained", "window-only", "default (2 seeds)", "default reach 300 (2 seeds)"]
    assert table[0] == ["measure", *columns, "must reach"]
    found = {line[0]: line[1:] for line in table}
    assert float(found["KL without slots and memory, times"][1]) >= 0
    assert "[" in found["KL without slots and memory, times"][3]
    assert found["training tokens"][1:4] == ["0", "0", "0.00M"]
    assert found["mean of 1 tasks, accuracy"][0] != "–"
    assert json.loads((args.output / "default.0/kernelize.json").read_text())["audit"]["layers"]


def test_evaluation_text_in_training_text_ends_it(args, tmp_path):
    given = Namespace(**{**vars(args), "output": tmp_path, "data": tmp_path / "data"})
    (tmp_path / "data").symlink_to(args.data)
    (tmp_path / "overlap.json").write_text(json.dumps([{"training": "a", "evaluation": "b", "documents": 1}]))
    with pytest.raises(SystemExit, match="training text holds evaluation text"):
        benchmark.check_overlap(given)


@pytest.mark.parametrize("name", benchmark.RECIPES)
def test_every_recipe_on_the_text_with_equal_tokens(args, name):
    recipe = load_recipe(name)
    made = benchmark.on_text(recipe, args.data, tokens=1_000_000, seed=3)
    assert made.seed == 3
    total = sum(stage.total_steps * stage.batch_tokens for stage in made.stages)
    assert not recipe.stages or 1_000_000 <= total <= 1_000_000 + sum(stage.batch_tokens for stage in made.stages)
    trial = benchmark.on_text(recipe, args.data, trial=True)
    assert all(stage.total_steps == 1 and stage.sequence_length <= 512 for stage in trial.stages)


def test_no_training_begins_when_the_time_is_up(args):
    with pytest.raises(benchmark.TimeUpError):
        benchmark.train_all([benchmark.Run("liger", 5)], args, benchmark.Clock.of(0))
    assert not (args.output / "liger.5").exists()


def distances(metric: str, **found: tuple[float, float, float]) -> list[Row]:
    names = {"control": second_family.CONTROL, "mine": second_family.MINE, "rounded": second_family.ROUNDED}
    return [Row(names[name], "ppl", metric, 8192, None, *numbers, 9) for name, numbers in found.items()]


def test_a_share_is_that_of_a_gap_beyond_its_noise():
    of = {"control": (0.10, 0.08, 0.12), "mine": (0.02, 0.01, 0.03), "rounded": (0.001, 0.0, 0.002)}
    found = second_family.gap(distances("kl", **of), "kl", 8192)
    assert found.share() == pytest.approx((0.8, 0.7, 0.9))
    assert second_family.share_of(found) == "0.80 [0.70, 0.90] recovered of a gap of 0.1000 [0.0800, 0.1200]"
    ratios = {name: tuple(map(math.exp, numbers)) for name, numbers in of.items()}
    assert second_family.gap(distances("ppl_ratio", **ratios), "ppl_ratio", 8192).share() == pytest.approx(
        found.share()
    )
    assert second_family.gap(distances("kl", mine=of["mine"]), "kl", 8192) is None


@pytest.mark.parametrize("change", [{"control": (0.02, -0.01, 0.05)}, {"control": (0.0007, 0.0006, 0.0008)},
                                    {"rounded": (-0.09, -0.1, -0.08)}])  # fmt: skip
def test_no_share_of_a_gap_within_its_noise(change):
    of = {"control": (0.10, 0.08, 0.12), "mine": (0.02, 0.01, 0.03), "rounded": (0.0, 0.0, 0.0)} | change
    said = second_family.share_of(second_family.gap(distances("kl", **of), "kl", 8192))
    assert said.startswith("no gap to recover: the control is 0.")
    assert "the recipe 0.0200 [0.0100, 0.0300]" in said


@pytest.mark.slow
def test_a_second_family_from_its_first_step_to_the_last_line(args, tmp_path):
    options = {"--data": args.data, "--output": tmp_path, "--source": args.source, "--device": "cpu"}
    command = [sys.executable, second_family.__file__, *(str(word) for pair in options.items() for word in pair)]
    command += ["--trial", "--beside", str(tmp_path)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    wanted = ["wikitext 512, loss", "wikitext 512, KL", "book 1024, loss", "book 1024, KL", "answers 1024, loss",
              "answers 1024, KL"]  # fmt: skip
    assert [line.partition(":")[0] for line in said[-6:]] == wanted
    for line in said[-6:]:
        mine, _, first = line.partition("; the first family: ")
        assert mine.endswith(first)  # the folder beside is its own
    rows = [row for row in load_rows(tmp_path / "rows/answers.json") if row.metric == "kl"]
    assert [row.model for row in rows] == [second_family.CONTROL, second_family.MINE, second_family.ROUNDED]
    assert all(row.value >= 0 and row.n > 1 for row in rows)
