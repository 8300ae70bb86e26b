"""Predictions: what must hold of them whatever the constants. benchmarks/scale.py compares them with measurements."""

from __future__ import annotations

import dataclasses
import json

import pytest
from test_cli import run
from tiny import byte_tokenizer, tiny_llama

from kernelize.plan import ConversionPlan
from kernelize.predict import MACHINES, predict
from kernelize.recipe import Stage
from kernelize.runtime.modeling import kernelize_model
from kernelize.runtime.spec import KernelSpec

SPEC = KernelSpec(feature_dim=16, window=9, sinks=1, slots=4, block=4)
H200 = MACHINES["h200"]


def stage(**fields):
    given = {"name": "s", "kind": "distil", "steps": 10, "packing": "joined", "sequence_length": 64}
    return Stage.model_validate(given | {"batch_tokens": 512, "micro_batch": 2, "data": ["sample"]} | fields)


def said(processes=1, sharded=False, layers=4, **fields):
    config = tiny_llama(num_hidden_layers=layers).config
    plan = ConversionPlan.uniform(SPEC, layers)
    return predict(config, plan, stage(**fields), H200, processes=processes, sharded=sharded)


def test_bytes_of_parameters_are_counted_not_guessed():
    model = kernelize_model(tiny_llama(num_hidden_layers=4).bfloat16(), [SPEC] * 4)
    total = sum(p.numel() for p in model.parameters())
    new = sum(p.numel() for name, p in model.named_parameters() if ".kernelize." in name)
    found = said(trainable="all")
    assert found.gradients == 4 * total
    assert found.optimizer == 8 * total
    assert found.weights == 4 * total + 4 * (total - new), "itself in float32, its float32 teacher"
    assert said(kind="transfer").gradients == 4 * new


def test_shards_divide_what_a_process_holds_and_processes_the_time():
    one, four = said(trainable="all"), said(trainable="all", processes=4, sharded=True)
    assert four.weights == one.weights / 4
    assert four.optimizer == one.optimizer / 4
    alone = said(trainable="all", sharded=True)
    assert four.step_seconds == pytest.approx(alone.step_seconds / 4)
    replicated = said(trainable="all", processes=4)
    assert replicated.weights == one.weights


def test_the_host_asks_for_every_micro_batch():
    """So small steps do not get faster by a faster device, but by larger micro-batches and by more processes."""
    small, larger = said(sharded=True), said(sharded=True, micro_batch=4)
    chunked = said(chunk_tokens=16)
    assert small.step_seconds == pytest.approx(2 * larger.step_seconds)
    assert chunked.step_seconds == pytest.approx(4 * small.step_seconds)
    assert said(gradient_checkpointing=True).step_seconds > 1.5 * small.step_seconds
    assert said(sharded=True, layers=8).step_seconds == pytest.approx(2 * small.step_seconds)
    slow = dataclasses.replace(H200, flops=1e6)
    config, plan = tiny_llama(num_hidden_layers=4).config, ConversionPlan.uniform(SPEC, 4)
    assert predict(config, plan, stage(), slow).step_seconds == pytest.approx(small.step_flops / (1e6 * 0.35))


def test_a_graph_asks_once():
    """Of one process, with rows of one length: what takes time then is the device."""
    graph = said()
    assert graph.step_seconds == pytest.approx(graph.step_flops / (H200.flops * H200.efficiency))
    assert said(packing="documents").step_seconds > graph.step_seconds


def test_what_saves_memory_is_predicted_to():
    plain = said(trainable="all", layers=8)
    again = said(trainable="all", layers=8, gradient_checkpointing=True)
    assert again.activations < plain.activations
    assert again.step_flops > plain.step_flops
    chunked = said(trainable="all", layers=8, chunk_tokens=16)
    cache = 2 * 64 * 8 * 2 * 2 * 8 * 4  # of the teacher: rows, tokens, layers, keys and values, heads, size, bytes
    assert chunked.activations == plain.activations / 4 + cache
    far = {"chunk_tokens": 16, "batch_tokens": 2048}
    beyond = (said(sequence_length=length, **far).memory for length in (256, 1024))
    assert len(set(beyond)) == 1, "the teacher's positions end at 256"
    whole, groups = said(kind="transfer", layers=8), said(kind="transfer", layers=8, layers_at_a_time=2)
    assert groups.weights < whole.weights / 2
    assert groups.stored_bytes == 2 * 10 * 512 * 32 * 4


def test_plan_shows_what_training_takes(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    out = tmp_path / "plan.json"
    made = ["plan", tmp_path / "model", "--config", "default", "--json", out]
    assert run(*made, "--machine", "h200", "--processes", 2) == 0
    assert "predicted for 2 x h200, ddp" in capsys.readouterr().out
    (found,) = json.loads(out.read_text())["predictions"]
    assert found["stage"] == "distil"
    assert found["memory"] > 0 < found["seconds"]
    assert run(*made, "--machine", "h300") == 2
    assert "h200" in capsys.readouterr().err
