"""Many processes: the losses are those of one, under every engine, and so is what a checkpoint holds."""

from __future__ import annotations

import json
import shutil

import pytest
from launching import launch
from test_train import ALL, LORA, TEXT, TRANSFER, losses_of, metric_of, recipe, run, student

from kernelize.errors import InputError
from kernelize.sharding import make_accelerator

SCRIPT = """
import json, sys
from test_scale import stages
from test_train import losses_of, metric_of, recipe, run, student

text, output, found, processes = sys.argv[1:]
_, _, events = run(recipe(text, *stages(int(processes)), checkpoint_steps=1), output)
if events:
    held = [event["held_parameters"] for event in events if event["event"] == "stage"]
    json.dump([losses_of(events), metric_of(events, "gradient_norm"), held], open(found, "w"))
"""


def stages(processes):
    """The same global batches, in micro-batches that each of `processes` gets some of."""
    size = 4 // processes
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


CASES = [
    ("ddp", 2),
    ("fsdp2", 2),
    pytest.param("ddp", 4, marks=pytest.mark.slow),
    pytest.param("fsdp2", 4, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("engine", "processes"), CASES)
def test_many_processes_give_the_losses_of_one(text, alone, tmp_path, engine, processes):
    """And the checkpoint that they leave is one that a single process goes on from."""
    script, found, output = tmp_path / "script.py", tmp_path / "found.json", tmp_path / "out"
    script.write_text(SCRIPT)
    launch(script, text, str(output), str(found), str(processes), engine=engine, processes=processes)
    losses, norms, held = json.loads(found.read_text())
    events = alone
    assert losses == pytest.approx(losses_of(events), rel=1e-4)
    assert norms == pytest.approx(metric_of(events, "gradient_norm"), rel=1e-3)
    start = json.loads((output / "train.jsonl").read_text().splitlines()[0])
    assert start["processes"] == processes
    assert start["engine"] == {"ddp": "multi_cpu", "fsdp2": "fsdp"}[engine]
    whole = sum(p.numel() for p in student().parameters())
    if engine == "fsdp2":  # a distillation's teacher keeps embeddings and LM head gathered, half of this one
        around = sum(p.numel() for p in (student().lm_head.weight, student().model.embed_tokens.weight))
        assert whole / processes <= held[0] < 1.2 * whole / processes
        assert 1.8 * whole / processes < held[2] < 2.2 * whole / processes + around
    else:
        assert held == [whole, held[1], whole]
    shutil.rmtree(output / "checkpoints/2-all-3")
    _, _, resumed = run(recipe(text, *stages(processes), checkpoint_steps=1), output, resume=True)
    assert losses_of(resumed) == pytest.approx(losses_of(events)[-1:], rel=1e-4)


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
    return far, far | {"name": "recompute", "across": "recompute"}


@pytest.mark.slow
def test_shards_and_chunks_go_together(tmp_path):
    script, found = tmp_path / "script.py", tmp_path / "found.json"
    script.write_text(CHUNKS)
    launch(script, str(tmp_path / "two"), str(found), engine="fsdp2")
    _, _, alone = run(recipe("", *chunked_stages()), tmp_path / "one")
    assert json.loads(found.read_text()) == pytest.approx(losses_of(alone), rel=1e-4)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version=1 is not supported"),
    ],
)
def test_an_engine_that_is_not_supported_is_refused(monkeypatch, environment, message):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match=message):
        make_accelerator()
