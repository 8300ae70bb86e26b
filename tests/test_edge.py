"""Exported graphs compute what the checkpoint does, whatever the split; and nothing of their runner needs torch."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from filelock import FileLock
from tiny import byte_tokenizer, tiny_llama
from tolerances import assert_same

from kernelize.convert import convert
from kernelize.edge import EdgeModel, Sampler, Sampling, main
from kernelize.errors import InputError
from kernelize.export import Graphs, export_model, write_graphs
from kernelize.plan import ConversionPlan
from kernelize.runtime.spec import KernelSpec

SPEC = KernelSpec(feature_dim=16, window=16, sinks=2, slots=8, block=8, reach=144)
LENGTH = 190  # past window, slots and reach
TORCHLESS = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "onnx", "typer", "safetensors"):
            raise ImportError(name + " is not there")
sys.meta_path.insert(0, Block())
from kernelize.edge import main
sys.exit(main(sys.argv[1:]))
"""


def tiny():
    """Two layers of different budgets, tied embeddings."""
    model = tiny_llama(max_position_embeddings=4096, tie_word_embeddings=True)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, 257, (2, 64), generator=generator)
    return convert(model, ConversionPlan((SPEC, SPEC.replace(slots=13))), calibration=[text])


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """The exported model, in `fp32`, `int8` and `int4`; traced once for all test processes, which takes a while."""
    own = tmp_path_factory.getbasetemp()
    base = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "edge"
    with FileLock(f"{base}.lock"):
        if not (base / "done").exists():
            shutil.rmtree(base, ignore_errors=True)
            tokenizer = byte_tokenizer(chat=True)
            export_model(model, tokenizer, base / "fp32", name="tiny")
            facts = json.loads((base / "fp32" / "kernelize-edge.json").read_text("utf-8"))
            for precision in ("int8-float", "int8", "int4"):
                parts = (ir.load(base / "fp32" / f"{name}.onnx") for name in ("model", "leave"))
                write_graphs(Graphs(*parts, facts), model, tokenizer, base / precision, precision)
            (base / "done").touch()
    return base


@pytest.fixture(scope="module")
def edge(folder) -> EdgeModel:
    return EdgeModel(folder / "fp32", threads=1)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(1, 257, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def wanted(model, ids) -> torch.Tensor:
    """The checkpoint's logits [2, T, V]."""
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("pieces", [(LENGTH,), (1,) * LENGTH, (37, 1, 64, 3, 85)], ids=["whole", "steps", "odd"])
def test_every_split_gives_the_logits_of_the_checkpoint(edge, ids, wanted, pieces):
    state, at = edge.start(rows=2), 0
    for piece in pieces:
        got = edge.read(state, ids[:, at : at + piece].tolist())
        at += piece
        assert_same(torch.from_numpy(got), wanted[:, at - 1], f"logits after {at} tokens")
    assert at == LENGTH == state.seen[0]


def test_rows_of_different_lengths_do_not_touch_each_other(edge, ids, wanted):
    state = edge.start(rows=2)
    edge.read(state, [ids[0, :61], ids[1, :18]])
    got = edge.read(state, [[], ids[1, 18:51]])
    for row, length in enumerate((61, 51)):
        assert_same(torch.from_numpy(got[row]), wanted[row, length - 1], f"row {row}")
    got = edge.read(state, [ids[0, 61:], ids[1, 51:]])
    assert_same(torch.from_numpy(got), wanted[:, -1], "both rows at the end")


def test_the_state_has_one_size_and_goes_on_from_a_file(edge, ids, wanted, tmp_path):
    sizes, state = set(), edge.start()
    for at in (7, 70):
        edge.read(state, [ids[0, int(state.seen[0]) : at]])
        sizes.add((state.nbytes, state.save(tmp_path / f"{at}.state").stat().st_size))
    assert len(sizes) == 1
    assert state.nbytes == edge.facts["state_bytes"]
    loaded = edge.load_state(tmp_path / "70.state")
    forked = loaded.copy([0, 0])
    for again in (loaded, forked):
        got = edge.read(again, [ids[0, 70:90]] * again.rows)
        assert_same(torch.from_numpy(got), wanted[:1, 89].expand(again.rows, -1), "after the state of a file")


@pytest.mark.parametrize(("precision", "bits"), [("int8-float", 8), ("int8", 8), ("int4", 4)])
def test_quantised_weights_are_near_and_smaller(folder, edge, ids, wanted, precision, bits):
    """Divergence from the model, over all tokens past the window: rounding may give a slot to another token."""
    small, apart = EdgeModel(folder / precision, threads=1), []
    state = small.start(2)
    small.read(state, ids[:, : SPEC.ring].tolist())
    for n in range(SPEC.ring, LENGTH):
        got, right = small.step(state, ids[:, n].tolist()), wanted[:, n].log_softmax(-1)
        apart.append((right.exp() * (right - torch.from_numpy(got).log_softmax(-1))).sum(-1))
    mean = float(torch.stack(apart).mean())
    assert 0 < mean < {8: 0.005, 4: 0.2}[bits]
    sizes = [facts["files"]["weights.bin"] for facts in (small.facts, edge.facts)]
    assert sizes[0] < sizes[1] * 0.65


def test_tied_weights_are_there_once(folder):
    graph = ir.load(folder / "int8" / "model.onnx").graph
    embedding = [value for value in graph.initializers.values() if list(value.shape) == [257, 1, 64]]
    assert len(embedding) == 1
    assert {node.op_type for node, _ in embedding[0].uses()} == {"Gather", "MatMulNBits"}


def test_sampling_keeps_to_its_limits_and_its_seed():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32)).repeat(2000, 0)
    drawn = Sampler(Sampling(temperature=1.0, seed=3)).pick(logits)
    assert np.abs(np.bincount(drawn) / 2000 - [0.5, 0.3, 0.15, 0.05]).max() < 0.05
    assert set(Sampler(Sampling(temperature=1.0, top_k=2)).pick(logits)) == {0, 1}
    assert set(Sampler(Sampling(temperature=1.0, top_p=0.9)).pick(logits)) == {0, 1, 2}
    assert set(Sampler(Sampling(temperature=1.0, top_k=3, top_p=0.55)).pick(logits)) == {0, 1}
    assert set(Sampler(Sampling()).pick(logits)) == {0}
    again = Sampler(Sampling(temperature=1.0, seed=3)).pick(logits)
    assert (drawn == again).all()


def test_text_comes_in_pieces_and_goes_on(edge):
    state = edge.start()
    pieces = list(edge.write(state, "Once upon a time", max_new_tokens=12))
    assert len(pieces) > 1
    assert "".join(pieces) == edge.tokenizer.decode(list(edge.tokens(edge.start(), edge.encode("Once upon a time"), 12,
                                                                      Sampling())))  # fmt: skip
    assert state.seen[0] == len("Once upon a time") + 11


def test_a_chat_template_is_rendered_as_transformers_renders_it(edge):
    messages = [{"role": "user", "content": "How are you?"}]
    wanted = byte_tokenizer(chat=True).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert edge.chat_prompt(messages) == wanted


def test_the_runner_works_where_torch_is_not_installed(folder, edge):
    wanted = "".join(edge.write(edge.start(), "abc", max_new_tokens=5))
    command = [sys.executable, "-W", "error", "-c", TORCHLESS, folder / "fp32", "--prompt", "abc"]
    done = subprocess.run([*command, "--max-new-tokens", "5", "--threads", "1"], capture_output=True, check=False)
    assert (done.returncode, done.stderr.decode()) == (0, "")
    assert done.stdout.decode() == wanted + "\n"


# --- what is no export --------------------------------------------------------------------------------------


def broken(folder: Path, target: Path, change) -> Path:
    """A copy of the fp32 export that `change` has spoilt."""
    shutil.copytree(folder / "fp32", target)
    change(target)
    return target


def resized(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def foreign(target: Path) -> None:
    """Another graph, whose size is what the description says."""
    shutil.copy(target / "leave.onnx", target / "model.onnx")
    facts = json.loads((target / "kernelize-edge.json").read_text("utf-8"))
    facts["files"]["model.onnx"] = facts["files"]["leave.onnx"]
    (target / "kernelize-edge.json").write_text(json.dumps(facts), "utf-8")


def garbage(target: Path) -> None:
    size = (target / "model.onnx").stat().st_size
    (target / "model.onnx").write_bytes(b"\x00garbage" * size)
    resized(target / "model.onnx", size)


SPOILT = {
    "truncated graph": (lambda target: resized(target / "model.onnx", 5000), "model.onnx' is damaged: 5000 bytes"),
    "truncated weights": (lambda target: resized(target / "weights.bin", 70), "weights.bin' is damaged: 70 bytes"),
    "missing weights": (lambda target: (target / "weights.bin").unlink(), "weights.bin is missing"),
    "no ONNX": (garbage, "no graph that ONNX Runtime loads"),
    "foreign graph": (foreign, "not the graph that kernelize-edge.json describes"),
    "no description": (lambda target: (target / "kernelize-edge.json").unlink(), "no exported model"),
    "damaged description": (lambda target: resized(target / "kernelize-edge.json", 99), "is damaged"),
    "no tokenizer": (lambda target: (target / "tokenizer.json").write_text("{}" + " " * 5381), "cannot read"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_folder_gives_one_clear_line(folder, tmp_path, capsys, name):
    change, said = SPOILT[name]
    spoilt = broken(folder, tmp_path / "spoilt", change)
    assert main([str(spoilt), "--prompt", "x"]) == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.startswith("error: ")
    assert line.count("\n") == 1


def test_states_that_are_none_or_foreign_are_refused(folder, edge, tmp_path):
    (tmp_path / "text").write_text("no state")
    with pytest.raises(InputError, match="no saved state"):
        edge.load_state(tmp_path / "text")
    other = EdgeModel(folder / "int8", threads=1)
    with pytest.raises(InputError, match="state of another model"):
        edge.load_state(other.start().save(tmp_path / "other"))


def test_numbers_out_of_range_are_refused(edge):
    for bad in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}):
        with pytest.raises(InputError, match=next(iter(bad))):
            Sampling(**bad)
    with pytest.raises(InputError, match="token ids"):
        edge.read(edge.start(), [[257]])
    with pytest.raises(InputError, match="2 rows of tokens"):
        edge.read(edge.start(), [[1], [2]])
    with pytest.raises(InputError, match="prompt is empty"):
        list(edge.write(edge.start(), ""))


def test_the_example_reads_a_document_in_a_state_of_one_size(folder, tmp_path, monkeypatch, capsys):
    script = Path(__file__).parents[1] / "examples" / "edge" / "long_document.py"
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 40)
    arguments = [script, folder / "int8", tmp_path / "book.txt", "--tokens", "1100", "--beside", folder / "fp32"]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    runpy.run_path(str(script), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows if row[0][0].isdigit()] == ["512", "1,024", "1,100"] * 2
    assert len({row[3] for row in rows if row[0][0].isdigit()}) == 1
