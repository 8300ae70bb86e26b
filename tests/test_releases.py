"""A checkpoint saved under one release of Transformers answers the same under another one, by its remote code.

`make test-oldest` names the other interpreter; without one there is nothing to compare.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kernelize import reload

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(
        "KERNELIZE_OTHER_PYTHON" not in os.environ, reason="KERNELIZE_OTHER_PYTHON names no interpreter"
    ),
]
SAVE = """\
import sys
sys.path.insert(0, sys.argv[1])
import families
families.tiny_student(sys.argv[2]).save_pretrained(sys.argv[3])
"""
FAMILIES = ["llama", "gemma2", "gptj", "qwen3_moe"]  # plain; eager; another adapter by release; stored otherwise


def other() -> str:
    return os.environ["KERNELIZE_OTHER_PYTHON"]


def run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout


def saved(python: str, family: str, folder: Path) -> Path:
    run(python, "-c", SAVE, Path(__file__).parent, family, folder)
    return folder


def answered(python: str, folder: Path, target: Path) -> dict:
    """What the remote code of `folder` answers under `python`, where kernelize cannot be imported."""
    run(python, "-I", reload.__file__, folder, target, json.dumps({"trust_remote_code": True, "threads": 1}))
    return load_file(target)


def test_the_other_interpreter_has_another_release():
    show = "import transformers; print(transformers.__version__)"
    assert run(other(), "-c", show) != run(sys.executable, "-c", show)


@pytest.mark.parametrize("family", FAMILIES)
def test_remote_code_answers_the_same_under_both(family, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    answers = []
    for saver in (sys.executable, other()):
        folder = saved(saver, family, tmp_path / f"by{len(answers)}")
        answers += [
            answered(python, folder, tmp_path / f"{len(answers)}.answer") for python in (sys.executable, other())
        ]
    for each in answers[1:]:
        torch.testing.assert_close(each["logits"], answers[0]["logits"], rtol=0, atol=1e-4)
        assert torch.equal(each["tokens"], answers[0]["tokens"])
