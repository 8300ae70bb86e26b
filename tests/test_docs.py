"""What the documents tell people to type is understood, and the Python of the README runs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
from tiny import byte_tokenizer, tiny_llama

from kernelize.cli.app import app
from kernelize.runtime.modeling import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
SOURCE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    return [line.split(" # ")[0].strip() for line in lines if line.startswith("kernelize ")]


def test_the_readme_names_every_step_of_the_main_job():
    named = {line.split()[1] for line in commands()}
    assert {"plan", "convert", "check", "finetune", "evaluate", "generate", "push"} <= named


@pytest.mark.parametrize("line", commands())
def test_documented_command_is_understood(line):
    _, name, *arguments = shlex.split(line)
    group = typer.main.get_command(app)
    context = group.make_context("kernelize", [name, *arguments], resilient_parsing=False)
    command = group.get_command(context, name)
    assert command is not None, f"{name!r} is no command"
    parsed = command.make_context(name, list(arguments), parent=context)
    assert parsed.params


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_table_of_families_says_what_the_code_says(name):
    family, page = FAMILIES[name], (ROOT / "docs" / "families.md").read_text("utf-8")
    supported = f"| `{name}` | `{family.layers}.*.{family.attention}` | {family.note} |"
    assert (f"- `{name}`: {family.refused}.\n" if family.refused else supported) in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_what_is_drawn_of_a_layer_is_what_the_page_says(tmp_path, monkeypatch):
    """And `benchmarks/draw.py` draws it."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import draw

    rows = [json.loads(line) for line in draw.RESULTS.read_text("utf-8").splitlines()]
    page = (ROOT / "docs/performance.md").read_text("utf-8").partition("## Fast")[2]
    said = re.findall(r"^\| 128 slots by attention.*", page, re.MULTILINE)
    for measure, line in zip(draw.PANELS, said, strict=False):
        numbers = {float(x) for x in re.findall(r"\d+\.\d+", line)}
        for length, value in draw.series(rows, "kernelize attention 128", measure).items():
            assert min(abs(value - number) for number in numbers) < 0.006, f"{measure}, {length} tokens: {value}"
    draw.draw(rows, tmp_path / "layer.png")
    assert (tmp_path / "layer.png").stat().st_size > 10_000


@pytest.mark.parametrize("example", blocks(ROOT / "README.md", "python"), ids=lambda text: text.split("\n")[0])
def test_python_of_the_readme_runs(example, tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert SOURCE in example
    exec(compile(example.replace(SOURCE, "./tiny"), "README.md", "exec"), {})
    assert (tmp_path / "out" / "config.json").is_file()
