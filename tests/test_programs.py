"""An exported ExecuTorch program computes what the checkpoint does, whatever the split; what it lacks is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tiny import byte_tokenizer, tiny_llama
from tolerances import assert_same

from kernelize.convert import convert
from kernelize.edge import EdgeModel, main, open_model
from kernelize.edge_program import ProgramModel
from kernelize.errors import InputError
from kernelize.export import check_request, export_model
from kernelize.plan import ConversionPlan
from kernelize.programs import argsort, sort
from kernelize.runtime.spec import KernelSpec

SPEC = KernelSpec(feature_dim=16, window=16, sinks=2, slots=8, block=8, reach=144)
PROMPT, STEPS = 1024, 200


@pytest.fixture(scope="module")
def model():
    """One layer: lowering takes seconds a layer."""
    text = torch.randint(1, 257, (2, 64), generator=torch.Generator().manual_seed(0))
    tiny = tiny_llama(num_hidden_layers=1, max_position_embeddings=4096, tie_word_embeddings=True)
    return convert(tiny, ConversionPlan((SPEC,)), calibration=[text])


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """The exported model; lowered once for all test processes."""
    own = tmp_path_factory.getbasetemp()
    output = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "program"
    with FileLock(f"{output}.lock"):
        if not output.exists():
            export_model(model, byte_tokenizer(chat=True), output, to="executorch", name="tiny")
    return output


@pytest.fixture(scope="module")
def program(folder) -> ProgramModel:
    return open_model(folder)


def test_steps_after_a_prompt_give_the_logits_of_the_checkpoint(program, model):
    ids = torch.randint(1, 257, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(ids).logits[:, PROMPT - 1 :]
    state = program.start()
    program.read(state, ids[:, :PROMPT].tolist())
    size = state.nbytes
    for n in range(STEPS):
        assert_same(torch.from_numpy(state.logits), wanted[:, n], f"logits after {n} steps")
        program.step(state, ids[:, PROMPT + n].tolist())
    assert_same(torch.from_numpy(state.logits), wanted[:, STEPS], f"logits after {STEPS} steps")
    assert state.nbytes == size == program.facts["state_bytes"]
    assert state.seen[0] == PROMPT + STEPS


def test_every_split_gives_the_logits_of_the_checkpoint(program, model):
    ids = torch.randint(1, 257, (1, 190), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = model(ids).logits
    state = program.start()
    for end in (37, 38, 102, 105, 190):
        got = program.read(state, ids[:, int(state.seen[0]) : end].tolist())
        assert_same(torch.from_numpy(got), wanted[:, end - 1], f"logits after {end} tokens")


def test_a_state_goes_on_from_a_file(program, tmp_path):
    state = program.start()
    program.read(state, [range(1, 60)])
    loaded = program.load_state(state.save(tmp_path / "state"))
    assert_same(*(torch.from_numpy(program.step(s, [7])) for s in (loaded, state)), "after a file")


def test_it_writes_text_in_the_shell(folder, program, capsys):
    wanted = "".join(program.write(program.start(), "abc", max_new_tokens=4))
    assert main([str(folder), "--prompt", "abc", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out == wanted + "\n"


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("kind", [torch.int64, torch.float32])
def test_its_sort_is_stable(descending, kind):
    x = torch.randint(-4, 4, (3, 5, 400), generator=torch.Generator().manual_seed(0)).to(kind)
    x[0, 0, 3::50] = torch.iinfo(x.dtype).max if kind is torch.int64 else torch.inf
    values, at = x.sort(dim=-1, stable=True, descending=descending)
    got, order = sort(x, descending=descending)
    assert torch.equal(got, values)
    assert torch.equal(order, at)
    assert torch.equal(argsort(x, dim=2, descending=descending), at)


# --- refused ------------------------------------------------------------------------------------------------


def test_what_a_program_has_not_is_refused_by_name(program):
    with pytest.raises(InputError, match="rows=2: an ExecuTorch program has one row"):
        program.start(rows=2)
    with pytest.raises(InputError, match=r"precision='int8' is not one of fp32 \(to='executorch'\)"):
        check_request("executorch", "int8")
    with pytest.raises(InputError, match="not of the format 'kernelize-edge 1'"):
        EdgeModel(program.folder)


def cut(target: Path) -> None:
    (target / "model.pte").write_bytes((target / "model.pte").read_bytes()[:5000])


def garbage(target: Path) -> None:
    size = (target / "model.pte").stat().st_size
    (target / "model.pte").write_bytes((b"garbage!" * size)[:size])


def other(target: Path) -> None:
    """A description with an output more than the program has."""
    facts = json.loads((target / "kernelize-edge.json").read_text("utf-8"))
    facts["graphs"]["step"]["outputs"].append("new.seen")
    (target / "kernelize-edge.json").write_text(json.dumps(facts), "utf-8")


@pytest.mark.parametrize(
    ("change", "said"),
    [(cut, "model.pte' is damaged: 5000 bytes"), (garbage, "no program that ExecuTorch loads"),
     (other, "not the program that kernelize-edge.json describes: step differs")],
)  # fmt: skip
def test_a_spoilt_program_gives_one_clear_line(folder, tmp_path, capsys, change, said):
    change(shutil.copytree(folder, tmp_path / "spoilt"))
    assert main([str(tmp_path / "spoilt"), "--prompt", "x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[-1]
    assert lines[-1].startswith("error: ")
    assert not any(line.startswith(("error: ", "Traceback")) for line in lines[:-1])  # ExecuTorch's own log comes first
