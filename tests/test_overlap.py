"""Overlap: what is in both files is found wherever it stands, and nothing else."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from kernelize.cli import main
from kernelize.errors import InputError
from kernelize.overlap import overlaps

LONG = [f"word{i}" for i in range(40)]


@pytest.fixture
def evaluation(tmp_path):
    rows = [{"context": " ".join(LONG), "id": 7}, {"choices": ["one two three four five", "Six, seven; EIGHT nine?"]}]
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train_on(tmp_path, *documents):
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "train.parquet")
    return str(tmp_path / "train.parquet")


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        ("x " * 50 + "  Word5, ".join(["", *LONG[6:20]]), 0),  # every second word is another
        ("before it " + ",\n".join(LONG[20:33]).upper() + " and after", 1),
        (" ".join(LONG[20:32]) + " something else", 0),
        (" ".join(LONG), 40 - 13 + 1),
        ("they count one two three four five six seven eight nine ten", 1),
        ("one two three four five six seven eight ten", 0),
    ],
)
def test_shared_runs_are_found(tmp_path, evaluation, text, runs):
    (line,) = overlaps([train_on(tmp_path, "nothing here", text)], [evaluation])
    assert (line.runs, line.documents, line.of) == (runs, int(runs > 0), 2)
    assert bool(line.example) == (runs > 0)


def test_the_command_fails_on_overlap(tmp_path, evaluation, capsys):
    clean, dirty = tmp_path / "clean.txt", tmp_path / "dirty.txt"
    clean.write_text("nothing that anybody has seen before in this place or another, ever again, we hope\n")
    dirty.write_text(" ".join(LONG) + "\n")
    assert main(["overlap", str(clean), "--against", evaluation, "--json", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["overlap"][0]["documents"] == 0
    assert main(["overlap", str(clean), str(dirty), "--against", evaluation]) == 1
    assert "1 training documents" in capsys.readouterr().err


def test_evaluation_text_without_words_is_bad_input(tmp_path, evaluation):
    (tmp_path / "few.txt").write_text("too short")
    with pytest.raises(InputError, match="no text of 8 words"):
        overlaps([evaluation], [str(tmp_path / "few.txt")])
