"""A checkpoint that an earlier release pushed still loads and answers as it did: by our code, and by its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tolerances import assert_same

from kernelize import reload
from kernelize.card import model_card, read_facts
from kernelize.convert import load
from kernelize.hub import RUNTIME

FIXTURES = Path(__file__).parent / "fixtures"
RELEASES = sorted(FIXTURES.glob("release-*.tar.xz"))
LIMIT = 200_000  # bytes of a fixture
EVERY = 4  # of so many rows of logits one is kept

pytestmark = pytest.mark.fast


@pytest.fixture(params=RELEASES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def pushed(request, tmp_path) -> Path:
    """The folder as it was pushed."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path / "pushed", filter="data")
    return tmp_path / "pushed"


def assert_answers(folder: Path, answer: dict) -> None:
    then = load_file(folder / "answer.safetensors")
    assert_same(answer["logits"][::EVERY], then["logits"], "logits")
    assert torch.equal(answer["tokens"], then["tokens"])


def test_there_are_fixtures_and_they_are_small():
    assert RELEASES
    assert all(path.stat().st_size <= LIMIT for path in RELEASES)


def test_today_s_code_answers_the_same(pushed):
    assert_answers(pushed, reload.answer(load(pushed)[0]))


def test_its_own_code_answers_the_same_where_kernelize_is_absent(pushed, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    answer, options = tmp_path / "answer.safetensors", json.dumps({"trust_remote_code": True, "threads": 1})
    command = [sys.executable, "-I", reload.__file__, pushed, answer, options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    assert_answers(pushed, load_file(answer))
    loaded = {path.name for path in (tmp_path / "modules").rglob("*.py")}
    assert {"modeling.py", "reference.py", "feature_maps.py"} <= loaded


def test_what_it_says_about_itself_is_read(pushed):
    facts = read_facts(pushed)
    assert facts.source is not None
    assert facts.source.base_model == "org/tiny"
    assert facts.recipe
    assert "| 2 | softmax, unchanged |" in model_card(pushed)
    assert set(facts.code) >= {"modeling.py"} | {path.name for path in RUNTIME.glob("[r-s]*.py")}
