"""Trainings that are killed from outside: processes of their own, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import byte_tokenizer, tiny_llama

import kernelize.train  # noqa: F401  so that the server has imported it
from kernelize.cli import main

torch.set_num_threads(1)

SHAPE = "sequence_length: 32, batch_tokens: 64, micro_batch: 2, warmup: 0.0, learning_rate: 1.0e-2, data: [sample]"
RECIPE = f"""\
name: killed
description: a run that is killed
kernel: {{window: 9, block: 4, sinks: 1, slots: 4, feature_dim: 16}}
checkpoint_steps: 1
stages:
  - {{name: transfer, kind: transfer, steps: 6, window_dropout: 0.5, {SHAPE}}}
  - {{name: lora, kind: distil, trainable: new+lora, steps: 6, {SHAPE}}}
  - {{name: all, kind: distil, trainable: all, steps: 6, {SHAPE}}}
"""


def sources(folder: Path) -> Path:
    """`source`, a plain model; `made`, the same converted; `recipe.yaml`."""
    tiny_llama().save_pretrained(folder / "source")
    byte_tokenizer().save_pretrained(folder / "source")
    (folder / "recipe.yaml").write_text(RECIPE)
    convert = ["convert", folder / "source", "-o", folder / "made", "--config", folder / "recipe.yaml"]
    assert main([str(word) for word in convert]) == 0
    return folder


def command(folder: Path, output: Path) -> list[str]:
    options = ["--config", folder / "recipe.yaml", "--teacher", folder / "source", "-o", output, "--resume"]
    return [str(word) for word in ("finetune", folder / "made", *options)]


def start(arguments: list[str], file_size: int | None = None) -> multiprocessing.process.BaseProcess:
    """The command in a process of its own, in which no file may become larger than `file_size` bytes."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # where the server finds this module
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killing"])
    process = context.Process(target=_child, args=(arguments, file_size))
    process.start()
    return process


def _child(arguments: list[str], file_size: int | None) -> None:
    errors = Path(arguments[arguments.index("-o") + 1] + ".stderr").open("w")  # noqa: SIM115
    os.dup2(errors.fileno(), 2)
    os.dup2(errors.fileno(), 1)
    if file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    sys.exit(main(arguments))


def finish(arguments: list[str], file_size: int | None = None) -> tuple[int | None, str]:
    """(exit code, what was said on stderr) of a command that nobody kills."""
    process = start(arguments, file_size)
    process.join(120)
    assert not process.is_alive(), "hangs"
    return process.exitcode, Path(arguments[arguments.index("-o") + 1] + ".stderr").read_text()


def kill_when(arguments: list[str], ready: Callable[[], bool], how: signal.Signals = signal.SIGKILL) -> int | None:
    """Starts the command and sends `how` at the moment `ready`; the exit code, which is 0 if it was done before."""
    process = start(arguments)
    while process.is_alive() and not ready():
        time.sleep(0.0003)
    if process.is_alive():
        os.kill(process.pid or 0, how)
    process.join(120)
    return process.exitcode


def saving(output: Path) -> Callable[[], bool]:
    """Whether a checkpoint, or the model itself, is just being written."""
    return lambda: any(output.glob("checkpoints/.*.part")) or any(output.parent.glob(f".{output.name}.part"))


def soon(output: Path, rng: random.Random) -> Callable[[], bool]:
    """A random moment while the run starts, or within what it logs next (two lines a step): it rarely ends before."""
    lines, seconds, reached = logged(output) + rng.randint(0, 8), rng.uniform(0, 0.2), float("inf")

    def ready() -> bool:
        nonlocal reached
        if reached == float("inf") and logged(output) >= lines:
            reached = time.monotonic()
        return time.monotonic() - reached >= seconds

    return ready


def logged(output: Path) -> int:
    log = output / "train.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def storm(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kills runs at `kills` random moments, every other one while something is saved, and goes on each time.

    Every run that gets to its end has the bits of an undisturbed one. Returns what happened, counted.
    """
    rng, reference = random.Random(seed), folder / "undisturbed"
    assert finish(command(folder, reference))[0] == 0
    expected = load_file(reference / "model.safetensors")
    counted = {"kills": 0, "while saving": 0, "finished": 0}
    output = folder / "killed"
    while counted["kills"] < kills or output.exists():
        moment = soon(output, rng) if counted["kills"] % 2 else _later(saving(output), rng)
        killed = counted["kills"] < kills
        code = kill_when(command(folder, output), moment) if killed else finish(command(folder, output))[0]
        if code == -signal.SIGKILL:
            counted["kills"] += 1
            counted["while saving"] += saving(output)()
            _assert_no_half(output)
            continue
        assert code == 0, Path(f"{output}.stderr").read_text()
        counted["finished"] += 1
        found = load_file(output / "model.safetensors")
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        shutil.rmtree(output)
    return counted


def _later(ready: Callable[[], bool], rng: random.Random) -> Callable[[], bool]:
    """At one of the first moments at which `ready` holds, not always the first one."""
    left = rng.randint(1, 6)

    def later() -> bool:
        nonlocal left, before
        now = ready()
        left -= now and not before
        before = now
        return left <= 0 and now

    before = False
    return later


def _assert_no_half(output: Path) -> None:
    """Under the final names stands what is complete, or nothing."""
    if (output / "config.json").exists():
        assert {"model.safetensors", "recipe.yaml", "README.md", "kernelize.json"} <= {p.name for p in output.iterdir()}
    for checkpoint in output.glob("checkpoints/[0-9]*"):
        assert (checkpoint / "SHA256SUMS").exists()
