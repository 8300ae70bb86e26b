"""bench measures what it says, gives every case a row, and says who is faster from where."""

from __future__ import annotations

import json

import pytest
import torch
from families import plan_for, tiny_student, tiny_teacher

from kernelize import bench as module
from kernelize.bench import Contender, Settings, bench, break_even, freeze
from kernelize.cli import main
from kernelize.decode import prefill
from kernelize.errors import InputError, KernelizeError
from kernelize.evaluate import Row, load_rows
from kernelize.runtime.cache import CACHE, kernel_layers, state_bytes
from kernelize.runtime.modeling import kernelize_model
from kernelize.shapes import SHAPES, random_model

SMALL = Settings(lengths=(64, 128), batches=(1, 2), tokens=2, chunk=40, train=True, train_length=32, train_rows=2)
CONTENDERS = [Contender("mine", lambda: tiny_student("llama")), Contender("teacher", lambda: tiny_teacher("llama"))]


@pytest.fixture(scope="module")
def found():
    return bench(CONTENDERS, SMALL)


def values(found, **chosen) -> list[float]:
    return [row.value for row in found.rows if all(getattr(row, k) == v for k, v in chosen.items())]


def test_every_case_has_its_rows(found):
    for model in ("mine", "teacher"):
        for suite in ("bench", "bench ×2"):
            for metric in ("prefill_ms", "decode_ms", "state_bytes"):
                got = values(found, model=model, suite=suite, metric=metric)
                assert len(got) == 2
                assert min(got) > 0
            assert values(found, model=model, suite=suite, metric="fits") == [1.0, 1.0]
        assert values(found, model=model, metric="train_tokens_per_s")[0] > 0
    assert found.ran["mine"].startswith("prefill chunked (no GPU); decoding reference (no GPU) without a graph (")


def test_state_bytes_are_those_of_the_cache(found):
    model = tiny_teacher("llama")
    cache, _, _ = prefill(model, torch.ones(1, 64, dtype=torch.int64))
    assert values(found, model="teacher", metric="state_bytes", suite="bench ×2")[0] == state_bytes(cache)
    assert len(set(values(found, model="mine", metric="state_bytes"))) == 1


def test_frozen_keys_are_what_attention_reads():
    """The softmax step of the bench computes what a step on a cache of one token less does, without growing."""
    model, ids = tiny_teacher("llama"), torch.randint(1, 257, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -1]
        cache, _, _ = prefill(model, ids)
        freeze(cache)
        for _ in range(2):
            position = torch.full((2, 1), 29)
            got = model(ids[:, -1:], position_ids=position, use_cache=True, **{CACHE: cache}).logits[:, -1]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert cache.layers[0].keys.shape[2] == 30


def test_what_does_not_fit_is_a_row(monkeypatch):
    def measure(model, rows, length, settings):
        if rows * length > 100:
            raise torch.OutOfMemoryError("no")
        yield "prefill_ms", 1.0, 1

    monkeypatch.setattr(module, "measure", measure)
    found = bench(CONTENDERS[:1], Settings(lengths=(64, 128, 256), batches=(1, 2)))
    assert values(found, metric="fits", suite="bench") == [1.0, 0.0, 0.0]
    assert values(found, metric="fits", suite="bench ×2") == [0.0, 0.0, 0.0]
    assert values(found, metric="prefill_ms") == [1.0]


def test_break_even_is_where_the_model_stays_faster():
    def row(model, length, value):
        return Row(model, "bench", "prefill_ms", length, None, value, None, None, 1)

    times = {1: (3, 1), 2: (3, 4), 4: (3, 2), 8: (3, 4), 16: (3, 5)}
    rows = [row(name, n, v) for n, pair in times.items() for name, v in zip(("m", "t"), pair, strict=True)]
    assert break_even(rows, "m", "t") == {"bench prefill_ms": 8}
    assert break_even([*rows, row("m", 32, 9)], "m", "t") == {"bench prefill_ms": 8}  # the teacher did not fit
    assert break_even([*rows, row("m", 32, 9), row("t", 32, 8)], "m", "t") == {"bench prefill_ms": None}


def test_a_shared_prompt_is_read_once():
    model, seen = tiny_student("llama"), []
    forward = model.forward
    model.forward = lambda *a, **k: (seen.append(tuple(k["input_ids"].shape)), forward(*a, **k))[1]
    settings = Settings(lengths=(64,), batches=(3,), tokens=2, chunk=40, shared_prompt=True)
    found = bench([Contender("m", lambda: model)], settings)
    assert {(1, 40), (1, 24), (3, 1)} == set(seen)
    assert values(found, metric="fits") == [1.0]


def test_shapes_are_convertible():
    for name, fields in SHAPES.items():
        with torch.device("meta"):
            model = random_model(name, device="meta")
        assert model.config.num_hidden_layers == fields["num_hidden_layers"]
        assert len(plan_for(model.config)) == fields["num_hidden_layers"]
        assert None not in plan_for(model.config)
        kernelize_model(random_model("tiny"), plan_for(random_model("tiny").config))
    with pytest.raises(InputError, match="llama3-8b"):
        random_model("llama3-8")


def test_command_writes_rows_that_report_reads(tmp_path, capsys):
    path = tmp_path / "bench.json"
    kernel = ["--window", "16", "--block", "8", "--slots", "8", "--feature-dim", "16"]
    arguments = ["bench", "--shape", "tiny", "--lengths", "64,96", "--tokens", "2", "--json", str(path), *kernel]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "decoding reference (no GPU)" in shown
    assert "prefill_ms: " in shown
    assert {row.model for row in load_rows(path)} == {"tiny kernelized", "teacher"}
    assert set(json.loads(path.read_text())["break_even"]) == {"bench prefill_ms", "bench decode_ms"}
    assert main([*arguments, "--alone"]) == 0
    assert {row.model for row in load_rows(path)} == {"tiny kernelized"}
    assert main(["report", str(path), "-o", str(tmp_path / "report")]) == 0


@pytest.mark.parametrize(
    "wrong",
    [[], ["x", "--shape", "tiny"], ["--shape", "tiny", "--against", "x"], ["--shape", "huge"],
     ["--shape", "tiny", "--batch", "0"], ["--shape", "tiny", "--lengths", "0"]],
    ids=str,
)  # fmt: skip
def test_command_refuses(wrong):
    assert main(["bench", *wrong]) == 2


def test_kernel_layers_of_a_hybrid_are_timed_too():
    model = tiny_student("gemma2")
    cache, logits, read = prefill(model, torch.ones(1, 40, dtype=torch.int64))
    module.stepper(model, cache, logits, read).run()
    assert len(kernel_layers(cache)) == 2


@pytest.mark.parametrize("kind", ["TorchDynamoException", "FailOnRecompileLimitHit"])
def test_what_torch_compile_says_is_one_line_or_a_row(kind, monkeypatch):
    """Out of memory within it is a row like any other; all else is an error that names torch.compile."""

    def failing(said):
        def measure(*_):
            raise getattr(torch._dynamo.exc, kind)(said)

        return measure

    settings = Settings(compiled=True)
    monkeypatch.setattr(module, "measure", failing("CUDA out of memory.\nTried"))
    assert module.case(module.Bench(), "made", None, 1, 8, settings) is False
    monkeypatch.setattr(module, "measure", failing("no compiler\nfound"))
    with pytest.raises(KernelizeError, match=r"torch.compile failed: no compiler"):
        module.case(module.Bench(), "made", None, 1, 8, settings)
