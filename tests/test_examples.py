"""Every example runs on a tiny model, as a script is run, and leaves what it promises."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from tiny import byte_tokenizer, tiny_llama

from kernelize.convert import convert, save
from kernelize.plan import ConversionPlan
from kernelize.runtime.spec import KernelSpec

EXAMPLES = Path(__file__).parent.parent / "examples"
RECIPE = "name: {0}\ndescription: {0}\nkernel: {{window: 16, block: 8, sinks: 2, slots: {1}, feature_dim: 16}}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`plain` and `converted`, tiny checkpoints."""
    folder = tmp_path_factory.mktemp("examples")
    tokenizer, model = byte_tokenizer(), tiny_llama(max_position_embeddings=4096)
    tokenizer.save_pretrained(folder / "plain")
    model.save_pretrained(folder / "plain")
    spec = KernelSpec(feature_map="hedgehog", feature_dim=16, window=16, sinks=2, slots=8, block=8)
    save(convert(model, ConversionPlan.uniform(spec, 2)), tokenizer, folder / "converted")
    return folder


@pytest.fixture
def example(monkeypatch, capsys):
    """Runs an example with arguments; gives what it prints."""

    def run(name: str, *arguments: object) -> str:
        path = str(EXAMPLES / name)
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return run


def test_a_model_that_kernelize_did_not_make_is_evaluated(example, folder, tmp_path):
    assert "passkey" in example("evaluate_any_model.py", folder / "plain", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "rows.json").read_text())["rows"]


def test_recipes_are_compared(example, folder, tmp_path):
    files = []
    for name, slots in (("few", 8), ("many", 64)):
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(RECIPE.format(name, slots))
    shown = example("compare_recipes.py", folder / "plain", tmp_path / "out", "window-only", *files)
    models = {row["model"] for row in json.loads((tmp_path / "out" / "rows.json").read_text())["rows"]}
    assert models == {"teacher", "window-only", "few", "many"}
    assert "ppl" in shown


def test_a_book_is_read_once_and_questioned_from_its_state(example, folder, tmp_path):
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 200)
    arguments = (folder / "converted", tmp_path / "book.txt", tmp_path / "state.safetensors", "What was it?")
    first, again = example("read_a_book.py", *arguments), example("read_a_book.py", *arguments)
    assert re.search(r"reading 6,400 tokens", first)
    assert "reading" not in again
    assert first.split("What was it?")[1] == again.split("What was it?")[1]
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 100)
    shorter = tmp_path / "shorter.safetensors"
    example("read_a_book.py", *arguments[:2], shorter, "What was it?")
    assert shorter.stat().st_size == (tmp_path / "state.safetensors").stat().st_size


def test_every_example_is_tested():
    source = Path(__file__).read_text("utf-8")
    assert all(f'"{path.name}"' in source for path in EXAMPLES.glob("[a-z]*.py"))
