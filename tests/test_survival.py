"""What happens to a run does not matter: it goes on, or says in one line why not, and leaves nothing that is half."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from killing import command, finish, saving, sources, storm
from safetensors.torch import load_file, save_file
from test_train import LORA, TRANSFER, CrashError, assert_same_weights, crash_at, losses_of, recipe, run, student, text  # noqa: F401

from kernelize import checkpoints, files
from kernelize.cli import main
from kernelize.errors import InputError, KernelizeError
from kernelize.train import CHECKPOINTS, SKIPPED

# --- killed -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return sources(tmp_path_factory.mktemp("killed"))


def test_a_run_that_is_killed_again_and_again_ends_with_the_bits_of_an_undisturbed_one(folder):
    counted = storm(folder, kills=4, seed=0)
    assert counted["while saving"] >= 1, counted


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_four_kills(folder):
    counted = storm(folder, kills=24, seed=1)
    print(counted)
    assert counted["while saving"] >= 6, counted


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(folder):
    output = folder / "full"
    code, said = finish(command(folder, output), file_size=20_000)  # the weights of a stage that trains all are larger
    assert code == 1
    assert said.splitlines()[-1].startswith("error: cannot write")
    assert "File too large" in said
    assert "Traceback" not in said
    assert not (output / "config.json").exists()
    assert list(output.glob("checkpoints/[0-9]-*")), "earlier checkpoints stay"
    assert not saving(output)()
    assert finish(command(folder, output))[0] == 0
    log = [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]
    steps = [(event["stage"], event["step"]) for event in log if event["event"] == "step"]
    assert len(steps) == len(set(steps)) + 1, "only the step whose checkpoint was refused is done again"


@pytest.mark.parametrize(
    "words", [["convert", "source"], ["finetune", "made", "--teacher", "source"]], ids=lambda w: w[0]
)
def test_a_disk_that_is_read_only_is_bad_input_before_any_work(folder, tmp_path, monkeypatch, capsys, words):
    monkeypatch.setattr(files.os, "access", lambda *_: False)  # root may write anywhere, so a mode would not do
    words = [str(folder / word) if (folder / word).exists() else word for word in words]
    assert main([*words, "-o", str(tmp_path / "a" / "out"), "--config", str(folder / "recipe.yaml")]) == 2
    assert f"cannot be written: {tmp_path} does not allow it" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crashed(text, tmp_path_factory):  # noqa: F811
    """A recipe, and the output of a run of it that crashed after checkpoints 2 and 4 of its first stage."""
    made, output = recipe(text, TRANSFER), tmp_path_factory.mktemp("crashed") / "out"
    with pytest.raises(CrashError):
        run(made, output, on_event=crash_at("transfer", 5))
    assert written(output) == ["0-transfer-2", "0-transfer-4"]
    return made, output


@pytest.fixture
def stopped(crashed, tmp_path):
    """The same, to be spoilt."""
    made, output = crashed
    return made, shutil.copytree(output, tmp_path / "out")


def written(output):
    return sorted(path.name for path in (output / CHECKPOINTS).iterdir())


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("file", [checkpoints.PARAMETERS, checkpoints.OPTIMIZER, checkpoints.STATE, checkpoints.SUMS])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(stopped, file, damage):
    _, output = stopped
    damage(output / CHECKPOINTS / "0-transfer-4" / file)
    found, damaged = checkpoints.last(output / CHECKPOINTS)
    assert (found.stage, found.step) == (0, 2)
    assert len(damaged) == 1
    assert "0-transfer-4 is damaged: " in damaged[0]


def test_a_run_goes_on_from_the_one_before_to_the_same_bits(stopped, tmp_path):
    made, output = stopped
    flip(output / CHECKPOINTS / "0-transfer-4" / checkpoints.OPTIMIZER)
    resumed, _, events = run(made, output, resume=True)
    assert [event["problem"] for event in events if event["event"] == "damaged"] == [
        f"{output}/checkpoints/0-transfer-4 is damaged: optimizer.safetensors is not what was written"
    ]
    assert [event["step"] for event in events if event["event"] == "step"] == [3, 4, 5]
    assert_same_weights(resumed, run(made, tmp_path / "undisturbed")[0])


def test_without_a_whole_checkpoint_a_run_does_not_silently_start_anew(stopped):
    made, output = stopped
    for name in written(output):
        cut(output / CHECKPOINTS / name / checkpoints.PARAMETERS)
    with pytest.raises(InputError, match=r"no checkpoint is whole: .*-4 is damaged: parameters.safetensors is not"):
        run(made, output, resume=True)


def test_a_checkpoint_of_a_model_with_other_shapes_is_refused_before_anything_is_copied(tmp_path):
    saved, here = {"first": torch.zeros(2), "map": torch.zeros(2, 4)}, {"first": torch.ones(2), "map": torch.ones(2, 3)}
    save_file(saved, tmp_path / checkpoints.PARAMETERS)
    last = checkpoints.Checkpoint(0, 1, {}, {}, [], path=tmp_path)
    with pytest.raises(KernelizeError, match=r"map is \[2, 4\] there and \[2, 3\] here"):
        last.load_parameters(here)
    assert here["first"].sum() == 2


def test_halves_of_a_kill_are_not_taken_for_checkpoints_and_go_with_the_next_one(stopped):
    made, output = stopped
    half = output / CHECKPOINTS / ".0-transfer-5.part"
    half.mkdir()
    (half / checkpoints.STATE).write_text('{"stage": 0')
    with (output / "train.jsonl").open("a") as log:
        log.write('{"event": "st')
    run(made, output, resume=True)
    assert written(output) == ["0-transfer-4", "0-transfer-5"]
    assert all(json.loads(line) for line in (output / "train.jsonl").read_text().splitlines())


# --- outputs ----------------------------------------------------------------------------------------------------------


class KilledError(BaseException):
    pass


OPERATIONS = ("mkdir", "unlink", "replace", "rename", "fsync", "rmdir")


def killed_at(monkeypatch, number: int) -> list[str]:
    """From its operation `number` on, the file system does nothing any more; the list of those that were done."""
    done: list[str] = []

    def through(name, original):
        def operation(*arguments, **options):
            if len(done) >= number:
                raise KilledError
            done.append(name)
            return original(*arguments, **options)

        return operation

    for name in OPERATIONS:
        monkeypatch.setattr(files.os, name, through(name, getattr(os, name)))
    return done


def fill(output: Path, words: str, error: Exception | None = None, **options) -> None:
    with files.new_folder(output, **options) as folder:
        (folder / "config.json").write_text(words)
        if error:
            raise error
        (folder / "model.safetensors").write_text(words)


@pytest.mark.parametrize("before", ["nothing", "an older model"])
def test_whenever_a_process_dies_an_output_is_whole_or_no_model(tmp_path, monkeypatch, before):
    outcomes = set()
    for number in range(100):
        output = tmp_path / str(number) / "out"
        if before != "nothing":
            fill(output, "old")
            (output / "train.jsonl").write_text("log")
        with monkeypatch.context() as patch:
            done = killed_at(patch, number)
            with contextlib.suppress(KilledError):
                fill(output, "new", overwrite=True)
        texts = [
            (output / name).read_text() for name in ("config.json", "model.safetensors") if (output / name).exists()
        ]
        if (output / "config.json").exists():
            assert texts in (["old"] * 2, ["new"] * 2)
        if before != "nothing":
            assert (output / "train.jsonl").read_text() == "log"
        outcomes.add(tuple(texts))
        if len(done) < number:
            break
    assert ("new", "new") in outcomes
    assert len(outcomes) >= 2


def test_a_failure_leaves_the_older_output_and_nothing_beside_it(tmp_path):
    fill(tmp_path / "out", "old")
    with pytest.raises(KernelizeError, match=r"cannot write .*No space left"):
        fill(tmp_path / "out", "new", overwrite=True, error=OSError(28, "No space left on device"))
    assert (tmp_path / "out/config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("mask", "folders", "plain"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_an_output_may_be_read_by_whom_the_umask_lets(tmp_path, mask, folders, plain):
    before = os.umask(mask)
    try:
        with files.new_folder(tmp_path / "out") as part:
            save_file({"x": torch.zeros(1)}, part / "model.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == folders
    assert stat.S_IMODE((tmp_path / "out/model.safetensors").stat().st_mode) == plain


def test_a_file_is_replaced_at_once_and_a_device_written_to(tmp_path):
    target = tmp_path / "rows.json"
    files.write_file(target, "old")
    with pytest.raises(KernelizeError, match="cannot write"):
        files.write_file(tmp_path / "nowhere" / "x", "new")
    (tmp_path / "link").symlink_to(target)
    files.write_file(tmp_path / "link", "new")
    assert (target.read_text(), (tmp_path / "link").read_text()) == ("old", "new")
    with pytest.raises(KernelizeError, match="No space left"):
        files.write_file("/dev/full", "new")
    assert Path("/dev/full").is_char_device()


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_cannot_be_used_is_named_and_skipped(text, tmp_path, value):  # noqa: F811
    model = student()
    bad, step = {2}, [1]
    gate = model.model.layers[1].self_attn.kernelize.log_gate
    gate.register_hook(lambda gradient: gradient * value if step[0] in bad else gradient)
    before = {}

    def watch(event):
        if event["event"] in ("step", "skipped"):
            step[0] += 1
            before[step[0]] = gate.detach().clone()

    _, result, events = run(
        recipe(text, TRANSFER | {"on_nonfinite": "skip"}), tmp_path / "out", model=model, on_event=watch
    )
    (skipped,) = [event["problem"] for event in events if event["event"] == "skipped"]
    assert "stage 'transfer', step 2: the gradient of model.layers.1.self_attn.kernelize.log_gate is not" in skipped
    assert "document" in skipped
    assert result.completed
    assert result.stages[0].steps == 4
    assert torch.equal(before[2], before[3]), "a skipped step changes nothing"
    assert not torch.equal(before[3], before[4])
    assert all(value.isfinite().all() for value in load_file(tmp_path / "out/model.safetensors").values())


def test_a_run_that_can_use_no_step_any_more_stops(text, tmp_path):  # noqa: F811
    model = student()
    model.model.layers[0].self_attn.kernelize.log_gate.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(KernelizeError, match=rf"{SKIPPED} steps in a row"):
        run(recipe(text, TRANSFER | {"steps": 20, "on_nonfinite": "skip"}), tmp_path / "out", model=model)
    assert not (tmp_path / "out/config.json").exists()


def test_parameters_that_are_no_numbers_are_not_saved(text, tmp_path):  # noqa: F811
    model = student()

    def spoil(event):
        if event["event"] == "step" and event["step"] == 4:
            model.model.layers[1].self_attn.kernelize.log_gate.data[0] = math.inf

    with pytest.raises(KernelizeError, match=r"step 4: .*layers\.1.*log_gate is not finite, not saved"):
        run(recipe(text, TRANSFER), tmp_path / "out", model=model, on_event=spoil)
    assert written(tmp_path / "out") == ["0-transfer-2"]


def out_of_memory_above(model, rows: int) -> None:
    """Running `model` on more than so many sequences at once raises what a GPU raises."""

    def refuse(_, arguments, options):
        if len(options["input_ids"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.register_forward_pre_hook(refuse, with_kwargs=True)


@pytest.mark.parametrize("stage", [TRANSFER, LORA | {"distil": {"kl": 1.0, "ce": 0.5}}], ids=["transfer", "lora"])
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_global_one(text, tmp_path, stage):  # noqa: F811
    model = student()
    out_of_memory_above(model, 1)
    _, result, events = run(recipe(text, stage), tmp_path / "small", model=model)
    assert [event["micro_batch"] for event in events if event["event"] == "memory"] == [2, 1]
    _, _, plain = run(recipe(text, stage), tmp_path / "large")
    assert losses_of(events) == pytest.approx(losses_of(plain), rel=1e-4)
    assert result.completed


def test_one_sequence_that_is_too_much_is_an_error_that_says_what_helps(text, tmp_path):  # noqa: F811
    model = student()
    out_of_memory_above(model, 0)
    with pytest.raises(KernelizeError, match=r"out of memory with 1 sequences of 32 tokens.*gradient_checkpointing"):
        run(recipe(text, TRANSFER), tmp_path / "out", model=model)
