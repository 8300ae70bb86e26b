"""The decoder writes what `model.generate` writes, with the step whose tensors stay where they are."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
from families import tiny_student, tiny_teacher
from tiny import byte_tokenizer

from kernelize.compiled import compiled_layers
from kernelize.decode import BLOCK, WARM_UPS, Decoder, Sampling, prefill, refused
from kernelize.errors import InputError
from kernelize.generate import Conversation
from kernelize.runtime.cache import CACHE

NEW = 2 * BLOCK + 3


@pytest.fixture(scope="module")
def model():
    return tiny_student("llama").double()  # in float64 no tie between slots can flip


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 257, (2, 70), generator=torch.Generator().manual_seed(0))


def generated(model, ids, mask=None, **settings):
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | settings
    return model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gptj"])
def test_greedy_equals_generate_also_for_the_next_prompt(family, ids):
    model = tiny_student(family).double()
    model.generation_config.eos_token_id = None
    decoder = Decoder(model)
    for prompt in (ids, ids[:, 20:]):
        blocks: list[torch.Tensor] = []
        got = decoder.write(prompt, max_new_tokens=NEW, on_tokens=blocks.append)
        assert torch.equal(got, generated(model, prompt, eos_token_id=None))
        assert torch.equal(torch.cat(blocks, 1), got)
    assert len(decoder.steps) == 1


def test_left_padded_rows_equal_single_rows(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    model.generation_config.eos_token_id = None
    decoder = Decoder(model)
    both = decoder.write(ids, mask, max_new_tokens=NEW)
    assert torch.equal(both[:1], decoder.write(ids[:1, 9:], max_new_tokens=NEW))
    assert torch.equal(both[1:], decoder.write(ids[1:], max_new_tokens=NEW))
    with pytest.raises(InputError, match="padded on the left"):
        decoder.write(ids, mask.flip(1), max_new_tokens=NEW)


def test_rows_end_where_generate_ends_them(model, ids):
    model.generation_config.eos_token_id = None
    free = generated(model, ids, eos_token_id=None)
    for stop in (int(free[0, 5]), int(free[1, BLOCK + 1])):
        model.generation_config.eos_token_id = stop
        expected = generated(model, ids, eos_token_id=stop, pad_token_id=stop)
        got = Decoder(model).write(ids, max_new_tokens=NEW)
        assert torch.equal(got[:, : expected.shape[1]], expected)
        assert bool((got[:, expected.shape[1] :] == stop).all())


def test_sampling_follows_the_distribution():
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log().expand(20000, -1)

    def shares(**settings):
        return torch.bincount(Sampling(**settings).pick(logits), minlength=5) / len(logits)

    near = {"rtol": 0, "atol": 0.015}
    torch.testing.assert_close(shares(temperature=1.0), logits[0].exp(), **near)
    torch.testing.assert_close(shares(temperature=0.5), (2 * logits[0]).softmax(0), **near)
    torch.testing.assert_close(shares(temperature=1.0, top_k=2), torch.tensor([5, 2, 0, 0, 0]) / 7, **near)
    torch.testing.assert_close(shares(temperature=1.0, top_p=0.8), torch.tensor([50, 20, 15, 0, 0]) / 85, **near)
    assert float(shares()[0]) == 1.0


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_refuses(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize("stop", [None, 5])
def test_a_conversation_writes_the_same_through_the_decoder(stop):
    model, texts = tiny_student("llama").double(), []
    if stop is not None:
        first = Conversation(model, byte_tokenizer(), max_new_tokens=stop + 1)
        encoded = byte_tokenizer()("Once upon", return_tensors="pt")["input_ids"]
        model.generation_config.eos_token_id = int(model.generate(encoded, **first.settings)[0, -1])
    for through in (False, True):
        pieces: list[str] = []
        talk = Conversation(model, byte_tokenizer(), max_new_tokens=NEW, on_text=pieces.append)
        talk.decoder = Decoder(model) if through else None
        done = talk.answer("Once upon")
        texts.append((done.text, done.new_tokens, "".join(pieces)))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("make", [tiny_student, tiny_teacher], ids=["kernelized", "softmax"])
def test_compiled_layers_compute_the_same(make, ids):
    """And leave nothing behind."""
    torch._dynamo.reset()
    model = make("llama").double()
    with torch.no_grad():
        results = []
        for compiled in (False, True):
            cache, _, read = prefill(model, ids)
            with compiled_layers(model, "eager") if compiled else nullcontext():
                out = model(input_ids=ids[:, :1], position_ids=read[:, None], use_cache=True, **{CACHE: cache})
            results.append(out.logits)
    torch.testing.assert_close(*results, rtol=0, atol=1e-9)
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_compiled_layers_leave_what_stood_there(ids):
    """Hooks of other libraries stand in place of a layer's forward."""
    model, seen = tiny_student("llama"), []
    for layer in model.model.layers:
        layer.forward = lambda *args, inner=layer.forward, **kwargs: seen.append(0) or inner(*args, **kwargs)
    with compiled_layers(model, "eager"):
        pass
    with torch.no_grad():
        model(ids)
    assert len(seen) == len(model.model.layers)


class Nothing:
    """Stands for a stream, a graph, or a context of torch.cuda."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def wait_stream(self, other):
        pass


@pytest.mark.parametrize("call", range(1, WARM_UPS + 2))
def test_a_capture_that_fails_leaves_the_step_as_it_was(model, ids, monkeypatch, call):
    """Whichever of its steps it is, when all layers but the last have gone on."""
    decoder = Decoder(model)
    expected = decoder.write(ids, max_new_tokens=NEW)
    for name in ("Stream", "CUDAGraph", "current_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    last, calls = model.model.layers[-1], itertools.count(1)
    whole = last.forward

    def failing(*args, **kwargs):
        out = whole(*args, **kwargs)
        if next(calls) == call + 1:  # the first is the prefill
            raise RuntimeError("no graph for this")
        return out

    monkeypatch.setattr(last, "forward", failing)
    failed = Decoder(model)
    failed.eager = None
    assert torch.equal(failed.write(ids, max_new_tokens=NEW), expected)
    assert failed.eager == "RuntimeError: no graph for this"


def test_what_the_decoder_cannot_do_is_refused(model):
    hybrid = tiny_student("gemma2")
    assert "layer 0 keeps softmax attention, which the decoder does not" in str(refused(hybrid))
    with pytest.raises(InputError, match="layer 0"):
        Decoder(hybrid)
    assert refused(model) is None
    model.generation_config.repetition_penalty = 1.2
    assert "repetition_penalty=1.2" in str(refused(model))
    model.generation_config.repetition_penalty = None
