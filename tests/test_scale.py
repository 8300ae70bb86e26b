"""Many processes: the losses are those of one, under every engine, and so is what a checkpoint holds."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys

import pytest
from launching import launch
from test_train import ALL, LORA, TEXT, TRANSFER, losses_of, metric_of, recipe, run, student

from kernelize.errors import InputError
from kernelize.objectives import Transfer
from kernelize.sharding import make_accelerator

SCRIPT = """
import json, sys
from test_scale import SMALL, stages
from test_train import losses_of, metric_of, recipe, run

text, output, found, processes, resume = sys.argv[1:]
_, _, events = run(recipe(text, *stages(int(processes)), checkpoint_steps=1), output, resume=resume == "resume")
if events:
    held = [event["held_parameters"] for event in events if event["event"] == "stage"]
    json.dump([losses_of(events), metric_of(events, "gradient_norm"), held], open(found, "w"))
"""


def stages(processes):
    """The same global batches of four sequences: one process or two get two micro-batches a step each, four get one."""
    size = max(1, 2 // processes)
    return [stage | {"steps": 3, "micro_batch": size} for stage in (TRANSFER, LORA, ALL)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    pieces = [TEXT[start : start + 150] for start in range(0, len(TEXT), 150)]
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    return str(path)


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """The events of one process."""
    return run(recipe(text, *stages(1), checkpoint_steps=1), tmp_path_factory.mktemp("alone"))[2]


# one step that both of two processes have a part in
SMALL = TRANSFER | {"steps": 1, "packing": "joined", "batch_tokens": 64, "micro_batch": 1}
LONG = pytest.mark.timeout(1800)  # DeepSpeed compiles its exchange of memory once
ENGINES = [
    "fsdp2",
    pytest.param(
        "zero3",
        marks=pytest.mark.skipif("KERNELIZE_DEEPSPEED" not in os.environ, reason="needs DeepSpeed: make test-scale"),
    ),
]
CASES = [
    ("ddp", 2),
    ("fsdp2", 2),
    *(pytest.param(*case, marks=[pytest.mark.slow, LONG, *marks]) for *case, marks in (
        ("ddp", 4, []), ("fsdp2", 4, []), ("zero3", 2, ENGINES[1].marks), ("zero3", 4, ENGINES[1].marks)
    )),
]  # fmt: skip


@pytest.mark.parametrize(("engine", "processes"), CASES)
def test_many_processes_give_the_losses_of_one(text, alone, tmp_path, engine, processes):
    """And the checkpoint that they leave is one that a single process goes on from."""
    script, found, output = tmp_path / "script.py", tmp_path / "found.json", tmp_path / "out"
    script.write_text(SCRIPT)
    launch(script, text, str(output), str(found), str(processes), "anew", engine=engine, processes=processes)
    losses, norms, held = json.loads(found.read_text())
    events = alone
    assert losses == pytest.approx(losses_of(events), rel=1e-4)
    assert norms == pytest.approx(metric_of(events, "gradient_norm"), rel=1e-3)
    start = json.loads((output / "train.jsonl").read_text().splitlines()[0])
    assert start["processes"] == processes
    assert start["engine"] == {"ddp": "multi_cpu", "fsdp2": "fsdp", "zero3": "deepspeed"}[engine]
    whole = sum(p.numel() for p in student().parameters())
    if engine != "ddp":  # a distillation's teacher keeps embeddings and LM head gathered, half of this one
        around = sum(p.numel() for p in (student().lm_head.weight, student().model.embed_tokens.weight))
        assert whole / processes <= held[0] < 1.2 * whole / processes
        assert 1.8 * whole / processes < held[2] < 2.2 * whole / processes + around
    else:
        assert held == [whole, held[1], whole]
    shutil.rmtree(output / "checkpoints/2-all-3")
    _, _, resumed = run(recipe(text, *stages(processes), checkpoint_steps=1), output, resume=True)
    assert losses_of(resumed) == pytest.approx(losses_of(events)[-1:], rel=1e-4)


BETWEEN = """
import json, sys
from test_scale import stages
from test_train import recipe, run

from kernelize import train

text, output, found = sys.argv[1:]
plain, seen = train._Run._micro, []

def micro(self, training, part, counts, last):
    losses = plain(self, training, part, counts, last)
    if not last:
        held = [p for p in training.objective.model.parameters() if p.requires_grad]
        gradients = [0 if p.grad is None else p.grad.to_local().numel() for p in held]
        seen.append([[p.to_local().numel() for p in held], gradients, sum(p.numel() for p in held)])
    return losses

train._Run._micro = micro
_, _, events = run(recipe(text, *stages(2)), output)
if events:
    json.dump(seen, open(found, "w"))
"""


def test_gradients_are_sharded_between_micro_steps(text, tmp_path):
    """Each process holds those of its own part alone, also where the global batch is not complete yet."""
    script, found = tmp_path / "script.py", tmp_path / "found.json"
    script.write_text(BETWEEN)
    launch(script, text, str(tmp_path / "out"), str(found), engine="fsdp2")
    seen = json.loads(found.read_text())
    assert len(seen) == 9  # one in each of three steps of three stages
    for held, gradients, trained in seen:
        assert gradients == held
        assert sum(held) < 0.6 * trained


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=[pytest.mark.slow, LONG, *ENGINES[1].marks])])
def test_fused_kernels_find_weights_that_are_gathered(text, tmp_path, monkeypatch, engine):
    """They read them again in the backward pass, through pointers: freed memory would be no error there."""
    pytest.importorskip("triton", reason="Triton is made for Linux")
    script, found, output = tmp_path / "script.py", tmp_path / "found.json", tmp_path / "out"
    script.write_text("import interpreted\n" + SCRIPT.replace("*stages(int(processes))", "SMALL"))
    with monkeypatch.context() as there:
        there.setenv("TRITON_INTERPRET", "1")
        there.setenv("KERNELIZE_IMPLEMENTATION", "fused")
        launch(script, text, str(output), str(found), "2", "anew", engine=engine)
    losses, norms, _ = json.loads(found.read_text())
    _, _, events = run(recipe(text, SMALL), tmp_path / "one")
    assert losses == pytest.approx(losses_of(events), rel=1e-3)
    assert norms == pytest.approx(metric_of(events, "gradient_norm"), rel=1e-3)


@pytest.mark.slow
@LONG
@pytest.mark.parametrize("engine", ENGINES)
def test_shards_go_on_from_what_one_process_has_left(text, alone, tmp_path, engine):
    script, found, output = tmp_path / "script.py", tmp_path / "found.json", tmp_path / "out"
    script.write_text(SCRIPT)
    run(recipe(text, *stages(2), checkpoint_steps=1), output)
    shutil.rmtree(output / "checkpoints/2-all-3")
    launch(script, text, str(output), str(found), "2", "resume", engine=engine)
    assert json.loads(found.read_text())[0] == pytest.approx(losses_of(alone)[-1:], rel=1e-4)


CHUNKS = """
import json, sys
from test_scale import chunked_stages
from test_train import losses_of, recipe, run

output, found = sys.argv[1:]
_, _, events = run(recipe("", *chunked_stages()), output)
if events:
    json.dump(losses_of(events), open(found, "w"))
"""


def chunked_stages():
    far = {"name": "truncate", "kind": "distil", "trainable": "all", "steps": 2, "packing": "joined"}
    far |= {"sequence_length": 128, "batch_tokens": 512, "micro_batch": 1, "chunk_tokens": 64, "data": ["sample"]}
    again = far | {"name": "again", "chunk_tokens": None, "gradient_checkpointing": True}
    return far, far | {"name": "recompute", "across": "recompute"}, again


@pytest.mark.slow
@LONG
@pytest.mark.parametrize("engine", ENGINES)
def test_shards_and_chunks_and_checkpointing_go_together(tmp_path, engine):
    script, found = tmp_path / "script.py", tmp_path / "found.json"
    script.write_text(CHUNKS)
    launch(script, str(tmp_path / "two"), str(found), engine=engine)
    _, _, alone = run(recipe("", *chunked_stages()), tmp_path / "one")
    assert json.loads(found.read_text()) == pytest.approx(losses_of(alone), rel=1e-4)


SPOILT = """
import json, sys
from test_scale import spoilt_run
from test_train import losses_of

text, output, found = sys.argv[1:]
events = spoilt_run(text, output)
if events:
    json.dump([losses_of(events), [e["problem"] for e in events if e["event"] == "skipped"]], open(found, "w"))
"""


def spoilt_run(text, output):
    """Events of a run in whose first step the gradients are no numbers, though the losses are."""
    plain, calls = Transfer.forward, []

    def forward(self, *arguments):
        losses = plain(self, *arguments)
        if len(calls) == 1:
            losses.loss.register_hook(lambda gradient: gradient * math.nan)
        return losses

    def begin(self, step):
        calls[:] = [step] if step == 1 else []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transfer, "forward", forward)
        patch.setattr(Transfer, "begin", begin)
        return run(
            recipe(text, TRANSFER | {"steps": 4, "micro_batch": 2, "on_nonfinite": "skip"}, checkpoint_steps=1), output
        )[2]


@pytest.mark.slow
@LONG
@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_that_cannot_be_used_is_skipped_by_all_processes(text, tmp_path, engine):
    script, found = tmp_path / "script.py", tmp_path / "found.json"
    script.write_text(SPOILT)
    launch(script, text, str(tmp_path / "two"), str(found), engine=engine)
    losses, problems = json.loads(found.read_text())
    assert losses == pytest.approx(losses_of(spoilt_run(text, tmp_path / "one")), rel=1e-4)
    assert len(losses) == 3
    assert len(problems) == 1
    assert re.match("stage 'transfer', step 1: the gradient of .*kernelize.* is not finite", problems[0])


TOLD = """
import json, os, signal, sys
from test_scale import stages
from test_train import recipe, run

text, output, found = sys.argv[1:]

def tell(event):
    if event["event"] == "step" and event["step"] == 1:
        os.kill(os.getpid(), signal.SIGTERM)

_, result, events = run(recipe(text, *stages(2)), output, on_event=tell)
assert not result.completed
if events:
    json.dump([event["step"] for event in events if event["event"] == "step"], open(found, "w"))
"""


def test_a_process_that_is_told_to_stop_waits_for_the_others(text, tmp_path):
    """A moment after a step's losses are exchanged: the other processes can hear of it in the next one only."""
    script, found = tmp_path / "script.py", tmp_path / "found.json"
    script.write_text(TOLD)
    launch(script, text, str(tmp_path / "out"), str(found), timeout=300)
    assert json.loads(found.read_text()) == [1, 2]
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["0-transfer-2"]


LOST = """
import os, signal, sys
from test_scale import stages
from test_train import recipe, run

from kernelize import train

text, output = sys.argv[1:]
plain = train._Run._step

def step(self, index, step, *rest):
    if os.environ["RANK"] == "1" and (index, step) == (1, 2):
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, index, step, *rest)

train._Run._step = step
run(recipe(text, *stages(2), checkpoint_steps=1), output)
"""


def test_a_process_that_is_lost_ends_the_others_and_the_run_goes_on_from_the_last_checkpoint(text, alone, tmp_path):
    script, output = tmp_path / "script.py", tmp_path / "out"
    script.write_text(LOST)
    with pytest.raises(AssertionError, match="Signal 9"):
        launch(script, text, str(output), timeout=300)
    assert not (output / "config.json").exists()
    _, result, resumed = run(recipe(text, *stages(2), checkpoint_steps=1), output, resume=True)
    assert result.completed
    at = [(event["stage"], event["step"]) for event in resumed if event["event"] == "step"]
    assert at == [("lora", 2), ("lora", 3), ("all", 1), ("all", 2), ("all", 3)]
    assert losses_of(resumed) == pytest.approx(losses_of(alone)[-5:], rel=1e-4)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not installed"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version=1 is not supported"),
    ],
)
def test_an_engine_that_is_not_supported_is_refused(monkeypatch, environment, message):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match=message):
        make_accelerator()
