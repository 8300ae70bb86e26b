"""A converted checkpoint behind `transformers serve`: the official client streams what `generate` gives."""

from __future__ import annotations

import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from openai import BadRequestError, OpenAI
from tiny import byte_tokenizer, tiny_llama

from kernelize.cli import main
from kernelize.cli.codes import DONE, INTERRUPTED
from kernelize.convert import convert, load, save
from kernelize.errors import InputError
from kernelize.plan import ConversionPlan
from kernelize.runtime.spec import KernelSpec
from kernelize.serve import serve

SPEC = KernelSpec(feature_map="hedgehog", feature_dim=16, window=16, sinks=2, slots=8, block=8)
MESSAGES = [{"role": "user", "content": "Hello there, who is it? " * 8}]
TOKENS, PATIENCE = 12, 120  # seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Its answers are longer than its window."""
    model = convert(tiny_llama(max_position_embeddings=512, eos_token_id=None), ConversionPlan.uniform(SPEC, 2))
    return save(model, byte_tokenizer(chat=True), tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def url(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "kernelize.cli", "serve", folder, "--port", port, "--device", "cpu"]
    server = subprocess.Popen(list(map(str, command)), env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        wait_for(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(PATIENCE) in (DONE, INTERRUPTED)


def wait_for(address: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nothing answers at {address}"
            time.sleep(0.1)


@pytest.fixture
def client(url):
    with OpenAI(base_url=url, api_key="none", timeout=PATIENCE, max_retries=0) as client:
        yield client


def expected(folder: Path) -> str:
    model, tokenizer = load(folder)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = model.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)
    return tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def plain(text: str) -> str:
    """Without the bytes that are no text: random weights write some, and a stream holds half a letter back."""
    return text.replace("\ufffd", "")


def test_the_official_client_streams_what_generate_gives(client, folder):
    stream = client.chat.completions.create(
        model=str(folder), messages=MESSAGES, stream=True, max_tokens=TOKENS, temperature=0
    )
    parts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len([part for part in parts if part]) > 1
    assert plain("".join(parts)) == plain(expected(folder))


def test_and_completes_at_once(client, folder):
    answer = client.chat.completions.create(model=str(folder), messages=MESSAGES, max_tokens=TOKENS, temperature=0)
    assert plain(answer.choices[0].message.content) == plain(expected(folder))
    assert answer.usage.completion_tokens == TOKENS


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n": 2}, "n=2 is not supported"), ({"temperature": -1}, "temperature=-1 is not a number from 0 to 2"),
        ({"top_p": 5}, "top_p=5 is not"), ({"max_tokens": 0}, "max_tokens=0 is not a whole number of at least 1"),
        ({"logprobs": True}, "logprobs=True is not supported"), ({"messages": []}, "messages is empty"),
        ({"messages": "Hi"}, "messages='Hi' is not a list of objects with a role"),
        ({"max_completion_tokens": True}, "max_completion_tokens=True is not a whole number"),
    ],
)  # fmt: skip
def test_what_would_be_left_out_is_refused(client, folder, options, said):
    with pytest.raises(BadRequestError, match=re.escape(said)):
        client.chat.completions.create(**{"model": str(folder), "messages": MESSAGES, "max_tokens": 2} | options)


@pytest.mark.parametrize(
    "options", [{"prompt": ""}, {"prompt": None}, {"temperature": 9.0}, {"n": 3}, {"echo": True}, {"best_of": 2}]
)
def test_and_for_completions_of_text(client, folder, options):
    with pytest.raises(BadRequestError):
        client.completions.create(**{"model": str(folder), "prompt": "Hi", "max_tokens": 2} | options)


def test_what_clients_send_without_a_wish_is_taken(client, folder):
    usual = {"n": 1, "temperature": 0, "top_p": 1, "presence_penalty": 0, "logprobs": False, "stop": None}
    answer = client.chat.completions.create(model=str(folder), messages=MESSAGES, max_tokens=TOKENS, **usual)
    assert plain(answer.choices[0].message.content) == plain(expected(folder))


def test_a_temperature_samples_also_where_the_models_own_settings_are_greedy(client, folder):
    ask = functools.partial(client.completions.create, model=str(folder), prompt="Hello", max_tokens=TOKENS)
    greedy = ask(temperature=0).choices[0].text
    sampled = [ask(temperature=2, seed=seed).choices[0].text for seed in (0, 1, 0)]
    assert sampled[0] == sampled[2]
    assert len({greedy, *sampled}) == 3


def test_continuous_batching_is_refused(folder):
    with pytest.raises(NotImplementedError, match="continuous batching"):
        load(folder)[0].init_continuous_batching()


def test_an_address_that_is_taken_or_is_none_is_refused_before_a_model_is_loaded(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(tmp_path), "--port", port]) == 2
    assert main(["serve", str(tmp_path), "--host", "nowhere.invalid"]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("error: cannot listen at ") == 2
    assert shown.out == ""


def test_what_is_not_converted_is_refused(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "plain")
    byte_tokenizer().save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="no kernelized checkpoint; `transformers serve` serves a llama"):
        serve(str(tmp_path / "plain"))
    assert main(["serve", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
