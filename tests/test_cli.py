"""The command line: light to start; one clear line for bad input, nothing written; the whole job on a tiny model."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from tiny import byte_tokenizer, tiny_llama
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import kernelize
from kernelize.card import VARIANTS
from kernelize.cli import main, publication
from kernelize.cli.app import app
from kernelize.cli.options import KernelFlags
from kernelize.convert import load_config
from kernelize.errors import InputError, KernelizeError
from kernelize.pipeline import override_stages, plan_for, short_names
from kernelize.recipe import Recipe
from kernelize.runtime.spec import KernelSpec

KERNEL = ["--window", "16", "--block", "8", "--sinks", "2", "--slots", "8", "--feature-dim", "16"]
KERNEL += ["--budget", "uniform"]
RECIPE = """\
name: tiny
description: a tiny run
kernel: {window: 16, block: 8, sinks: 2, slots: 8, feature_dim: 16}
stages:
  - {name: transfer, kind: transfer, steps: 1, sequence_length: 64, batch_tokens: 128, data: [sample]}
  - {name: distil, kind: distil, steps: 1, sequence_length: 64, batch_tokens: 128, data: [sample]}
evaluation: {length: 192, texts: 1, passkey_lengths: [128], trials: 5}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds `source`, a plain model; `made`, the same converted; `encoder`, no decoder; `recipe.yaml`."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_llama().save_pretrained(folder / "source")
    byte_tokenizer(chat=True).save_pretrained(folder / "source")
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertModel(config).save_pretrained(folder / "encoder")
    (folder / "recipe.yaml").write_text(RECIPE)
    assert main(["convert", str(folder / "source"), "-o", str(folder / "made"), *KERNEL]) == 0
    return folder


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


# --- light --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["import kernelize", "from kernelize.cli import main; main(['--help'])"])
def test_nothing_heavy_is_imported_unasked(what):
    heavy = python(
        f"{what}\nimport sys; print('heavy', sorted({{'torch', 'transformers', 'pydantic'}} & set(sys.modules)))"
    )
    assert heavy.splitlines()[-1] == "heavy []"


def test_the_public_api_is_functions_and_types_in_any_import_order():
    kinds = {name: type(getattr(kernelize, name)).__name__ for name in kernelize.__all__}
    assert {n for n, kind in kinds.items() if kind == "function"} == {"convert", "evaluate", "finetune", "load", "push"}
    assert kinds["KernelSpec"] == "type"
    assert (
        python("from kernelize.convert import load\nimport kernelize as k\nprint(type(k.convert).__name__)")
        == "function\n"
    )


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="knernel"):
        kernelize.knernel  # noqa: B018


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "kernelize.cli", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"kernelize {kernelize.__version__}\n")


def test_every_command_takes_json_and_has_help(capsys):
    for command in app.registered_commands:
        assert run(command.name, "--help") == 0
        assert "--json" in capsys.readouterr().out


# --- bad input ----------------------------------------------------------------------------------------------

BAD = {
    "missing folder": (["convert", "{0}/nowhere"], "nowhere"),
    "no model": (["convert", "{0}"], "config.json"),
    "encoder": (["convert", "{0}/encoder"], "no causal language model"),
    "encoder plan": (["plan", "{0}/encoder"], "no causal language model"),
    "no GGUF": (["convert", "{0}/recipe.yaml.gguf"], "there is no file"),
    "converted twice": (["convert", "{0}/made"], "already kernelized"),
    "nonsense window": (["convert", "{0}/source", "--window", "0"], "window=0 is below 1"),
    "no memory to rank by": (["convert", "{0}/source", "--feature-map", "none"], "policy='mixed'"),
    "unknown map": (["convert", "{0}/source", "--feature-map", "hedgehogg"], "did you mean 'hedgehog'"),
    "layer that is not there": (["convert", "{0}/source", "--keep", "7"], "layer 7; the model has 0 to 1"),
    "layer twice": (["convert", "{0}/source", "--keep", "1,0-1"], "layer 1 twice"),
    "two choices": (["convert", "{0}/source", "--keep", "1", "--pattern", "KS"], "--keep or --pattern"),
    "nothing converted": (["convert", "{0}/source", "--pattern", "S"], "all 2 layers"),
    "unknown recipe": (["convert", "{0}/source", "--config", "defualt"], "did you mean 'default'"),
    "unknown YAML option": (["convert", "{0}/source", "--config", "{1}/windw.yaml"], "did you mean 'window'"),
    "no YAML": (["convert", "{0}/source", "--config", "{1}/empty.yaml"], "empty.yaml"),
    "unknown option": (["convert", "{0}/source", "--windw", "3"], "--window"),
    "not a number": (["convert", "{0}/source", "--window", "x"], "--window"),
    "unknown command": (["covert", "{0}/source"], "covert"),
    "unknown dtype": (["convert", "{0}/source", "--dtype", "float33"], "float33"),
    "JSON nowhere": (["convert", "{0}/source", "--json", "{1}/nowhere/x.json"], "cannot be written"),
    "empty data": (["finetune", "{0}/made", "--config", "{0}/recipe.yaml", "--teacher", "{0}/source",
                    "--data", "{1}/empty.txt"], "empty.txt"),
    "missing data": (["finetune", "{0}/made", "--config", "{0}/recipe.yaml", "--teacher", "{0}/source",
                      "--data", "{1}/nowhere.txt"], "nowhere.txt"),
    "sequence too long": (["finetune", "{0}/made", "--config", "{0}/recipe.yaml", "--teacher", "{0}/source",
                           "--sequence-length", "512"], "512"),
    "data of another kind": (["finetune", "{0}/made", "--config", "{0}/recipe.yaml", "--teacher", "{0}/source",
                              "--data", "{0}/recipe.yaml"], "allowed: .txt, .txt.xz, .jsonl, .parquet"),
    "kernelized teacher": (["finetune", "{0}/made", "--config", "{0}/recipe.yaml", "--teacher", "{0}/made"],
                           "is kernelized itself (kernelized_llama); give the original model"),
    "negative seed": (["generate", "{0}/source", "x", "--temperature", "1", "--seed", "-1"], "--seed"),
    "no teacher": (["finetune", "{0}/made", "--config", "{0}/recipe.yaml"], "teacher"),
    "not converted": (["finetune", "{0}/source", "--config", "{0}/recipe.yaml"], "no kernelized checkpoint"),
    "demo of an encoder": (["demo", "--source", "{0}/encoder"], "no causal language model"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, folder, tmp_path, capsys):
    (tmp_path / "windw.yaml").write_text("name: x\ndescription: y\nkernel: {windw: 3}\n")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "empty.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    arguments, said = BAD[name]
    writes = ["-o", str(tmp_path / "out")] if arguments[0] in ("convert", "finetune", "demo") else []
    code = run(*(a.format(folder, tmp_path) for a in arguments), *writes)
    shown = capsys.readouterr().err
    lines = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert (code, len(lines)) == (2, 1), shown
    assert said in lines[0]
    assert "Traceback" not in shown
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--output", "{}"], "cannot be written: not a file in an existing folder"),
        (["--output", "/proc/x.yaml"], "/proc/x.yaml cannot be written"),
        (["--machine", "foo"], "machine='foo' is not one of"),
        (["--dtype", "int8"], "dtype='int8' is not one of auto, float32, bfloat16, float16, float64"),
    ],
)
def test_a_plan_that_cannot_be_made_shows_no_table(folder, options, said, capsys):
    assert run("plan", folder / "source", *(option.format(folder) for option in options)) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.out == ""


def test_a_sequence_length_alone_leaves_batches_of_whole_sequences():
    recipe = Recipe.from_yaml(RECIPE, "x")
    for length, tokens in ((50, 100), (64, 128), (99, 99), (500, 500)):
        changed = override_stages(recipe, sequence_length=length)
        assert [(s.sequence_length, s.batch_tokens) for s in changed.stages] == [(length, tokens)] * 2


@pytest.mark.parametrize("command", ["convert", "finetune", "demo", "report"])
def test_an_output_folder_that_is_not_empty_stays_as_it_is(command, folder, tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    rows = tmp_path.parent / "rows.json"
    rows.write_text(json.dumps({"rows": [dict.fromkeys(["model", "suite"], "x") | {
        "metric": "ppl", "length": 8, "depth": None, "value": 1.0, "low": None, "high": None, "n": 1}]}))  # fmt: skip
    sources = {"convert": [folder / "source"], "finetune": [folder / "made"], "demo": [], "report": [rows]}
    assert run(command, *sources[command], "-o", tmp_path) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# --- what a conversion says of itself -------------------------------------------------------------------------


def test_a_recipe_changed_by_flags_says_by_which(folder):
    recipe = Recipe.from_yaml((folder / "made" / "recipe.yaml").read_text("utf-8"))
    flags = "--window 16 --sinks 2 --slots 8 --block 8 --feature-dim 16 --budget uniform"
    assert recipe.description == f"default, changed by {flags}"
    again = KernelFlags(config=str(folder / "made" / "recipe.yaml"), slots=4, sink_logits=False).recipe(2)
    assert again.description == f"default, changed by {flags} --slots 4 --no-sink-logits"
    assert KernelFlags(window=64).recipe(2).description == KernelFlags().recipe(2).description


def test_what_to_do_next_can_be_copied(folder, tmp_path, capsys):
    """Run as it is shown, the next command finds what the last one wrote."""
    assert run("convert", folder / "source", "-o", tmp_path / "two words", *KERNEL) == 0
    shown = capsys.readouterr().out
    following = shlex.split(shown[shown.rindex("next: kernelize ") :])[2:]
    assert following == ["check", str(tmp_path / "two words")]
    assert "`kernelize audit 'two words' --against source" in (tmp_path / "two words/README.md").read_text("utf-8")


def test_the_record_has_every_option_that_the_result_follows_from(folder, tmp_path, capsys):
    assert run("convert", folder / "source", "-o", tmp_path / "made", *KERNEL, "--dtype", "bfloat16") == 0
    assert run("convert", folder / "source", "-o", tmp_path / "streamed", *KERNEL, "--stream") == 0
    options = ["--config", folder / "recipe.yaml", "--teacher", folder / "source", "--dtype", "float32"]
    assert run("finetune", tmp_path / "made", "-o", tmp_path / "tuned", *options) == 0
    records = (json.loads((tmp_path / name / "kernelize.json").read_text()) for name in ("tuned", "streamed"))
    assert [command.split("--output ")[1] for record in records for command in record["commands"]] == [
        "made --dtype bfloat16", "tuned --dtype float32", "streamed --stream"]  # fmt: skip


def test_the_help_of_push_names_every_variant():
    assert set(VARIANTS) <= set(re.findall(r"[\w-]+", publication.push.__doc__ or ""))


def test_a_conversion_records_that_nothing_was_trained(folder, tmp_path, capsys):
    assert "after the conversion: 0. `kernelize finetune made" in (folder / "made" / "README.md").read_text("utf-8")
    assert run("info", folder / "made") == 0
    assert "tokens trained: 0;" in capsys.readouterr().out
    shutil.copytree(folder / "made", tmp_path / "foreign")
    (tmp_path / "foreign" / "kernelize.json").unlink()
    assert run("info", tmp_path / "foreign") == 0
    assert "tokens trained: not recorded;" in capsys.readouterr().out


# --- exit codes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (KernelizeError("the disk is full"), 1, "the disk is full"),
        (RuntimeError("a\nbug"), 1, "RuntimeError: a bug (--debug shows the traceback)"),
    ],
)
def test_failures_have_their_own_exit_codes(error, code, said, folder, capsys, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(sys.modules["kernelize.convert"], "load_config", fail)
    assert run("plan", folder / "source") == code
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown


def test_debug_shows_the_traceback_before_or_after_the_command(capsys):
    for arguments in (["--debug", "plan", "/nowhere"], ["plan", "/nowhere", "--debug"]):
        assert main(arguments) == 2
        assert "Traceback" in capsys.readouterr().err


# --- the job ------------------------------------------------------------------------------------------------


def test_dry_run_is_plan_and_writes_nothing(folder, tmp_path, capsys):
    assert run("plan", folder / "source", *KERNEL, "--pattern", "KS", "--json", tmp_path / "a.json") == 0
    output = tmp_path / "out"
    options = ["--dry-run", "-o", output, "--json", tmp_path / "b.json"]
    assert run("convert", folder / "source", *KERNEL, "--keep", "1", *options) == 0
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads((tmp_path / "b.json").read_text())
    assert not output.exists()
    assert "softmax" in capsys.readouterr().out


def test_flags_override_the_recipe_and_leave_the_rest(folder, tmp_path):
    path = tmp_path / "plan.json"
    assert run("plan", folder / "source", "--config", folder / "recipe.yaml", "--slots", "4", "--json", path) == 0
    spec = json.loads(path.read_text())["layers"][0]["spec"]
    assert (spec["slots"], spec["window"], spec["feature_dim"]) == (4, 16, 16)


def test_every_field_of_a_spec_has_a_flag():
    fields = {field.name for field in dataclasses.fields(KernelSpec)}
    fields -= {"head_slots"}  # what `--budget heads` comes to
    assert fields == {field.name for field in dataclasses.fields(KernelFlags)} - {"config", "budget", "keep", "pattern"}


def test_check_passes_after_convert(folder, tmp_path, capsys):
    path = tmp_path / "check.json"
    assert run("check", folder / "made", "--against", folder / "source", "--json", path) == 0
    rows = json.loads(path.read_text())["checks"]
    assert {row["passed"] for row in rows} == {True}
    shown = capsys.readouterr().out
    assert all(row["name"] in shown for row in rows)


def test_a_failing_check_is_exit_code_1(folder, capsys, monkeypatch):
    from kernelize import check

    failing = check.CheckRow("one token at a time", False, 0.5, 1e-8, "")
    monkeypatch.setattr(check, "check", lambda *_, **__: [failing])
    assert run("check", folder / "made") == 1
    assert "fails 1 of 1 checks: one token at a time" in capsys.readouterr().err


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> Path:
    """A model of 64 learned positions."""
    folder = tmp_path_factory.mktemp("learned") / "gpt2"
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=257, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("command", "options", "length"),
    [
        ("generate", ["the", "--max-new-tokens", "62"], 65),
        ("generate", ["x" * 60, "--max-new-tokens", "5"], 65),
        ("bench", ["--lengths", "32", "--tokens", "32"], 66),
        ("bench", ["--lengths", "32", "--tokens", "2", "--train"], 2048),
        ("inspect", ["--tokens", "256"], 256),
    ],
)
def test_learned_positions_end_before_anything_is_written(
    learned, command, options, length, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert run(command, learned, *options) == 2
    said = capsys.readouterr()
    assert f"length={length} (answers included) is beyond the 64 learned positions of " in said.err
    assert (said.out, list(tmp_path.iterdir())) == ("", [])


def test_a_document_past_learned_positions_is_not_read_for_its_state(learned, capsys, tmp_path):
    assert run("convert", learned, "-o", tmp_path / "made", *KERNEL) == 0
    assert run("generate", tmp_path / "made", "x" * 65, "--save-state", tmp_path / "state") == 2
    assert "length=65 (answers included) is beyond the 64 learned positions of " in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


def test_a_prompt_of_half_a_surrogate_pair_is_one_line(folder, capsys):
    assert run("generate", folder / "made", "\ud800 abc") == 2
    assert "the prompt: '\\ud800' is half of a surrogate pair" in capsys.readouterr().err


def test_generate_streams_what_json_keeps(folder, tmp_path, capsys):
    path = tmp_path / "text.json"
    options = ["--max-new-tokens", "5", "--json", path]
    assert run("generate", folder / "made", "Call me", *options) == 0
    (done,) = json.loads(path.read_text())
    assert done["prompt_tokens"] == 7
    assert 1 <= done["new_tokens"] <= 5
    assert capsys.readouterr().out == done["text"] + "\n"
    assert run("generate", folder / "made", "Call me", "--chat", "--temperature", "0.7", *options) == 0
    assert json.loads(path.read_text())[0]["prompt_tokens"] == len("<user>Call me\n")


def test_generate_reads_once_and_answers_later(folder, tmp_path, capsys):
    state, path, options = tmp_path / "book", tmp_path / "text.json", ["--max-new-tokens", "5"]
    book = "Call me Ishmael. Some years ago, never mind how long precisely, having little money"
    assert run("generate", folder / "made", book[:40], "--save-state", state, "--json", path) == 0
    assert f"read 40 tokens; wrote {state}" in capsys.readouterr().out
    assert json.loads(path.read_text())["bytes"] == (size := state.stat().st_size)
    assert run("generate", folder / "made", book[40:60], "--load-state", state, "--save-state", state) == 0
    assert state.stat().st_size == size
    capsys.readouterr()
    for _ in range(2):  # asking changes nothing
        assert run("generate", folder / "made", book[60:], "--load-state", state, *options) == 0
        later = capsys.readouterr().out
        assert run("generate", folder / "made", book, *options) == 0
        assert later == capsys.readouterr().out
    assert run("generate", folder / "made", "Who?", "--load-state", state, "--chat", *options) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["{0}/source", "x", "--save-state", "{1}/book"], "what a kernelized model has; this is a llama"),
        (["{0}/source", "x", "--load-state", "{1}/book"], "what a kernelized model has; this is a llama"),
        (["{0}/made", "x", "--save-state", "{1}/book", "--chat"], "leave out --chat"),
        (["{0}/made", "x", "--save-state", "{1}/book", "--compile"], "leave out --compile"),
        (["{0}/made", "x", "--compile", "--device", "cpu"], "the model is on cpu, not on a GPU"),
        (["{0}/source", "x", "--compile"], "the model is not kernelized"),
        (["{0}/made", " ", "--save-state", "{1}/book"], "the prompt is empty"),
        (["{0}/made", "x", "--save-state", "{1}/nowhere/book"], "cannot be written"),
        (["{0}/made", "x", "--load-state", "{1}/book"], "is no saved state"),
        (["{0}/made", "x", "--load-state", "{0}/made/model.safetensors"], "is no saved state"),
    ],
)
def test_generate_refuses_states(options, said, folder, tmp_path, capsys):
    assert run("generate", *(option.format(folder, tmp_path) for option in options)) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_document_is_not_read_for_a_state_that_cannot_be_saved(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kernelize.generate.read_text", lambda *_: pytest.fail("it was read"))
    assert run("convert", folder / "source", "-o", tmp_path / "hybrid", *KERNEL, "--keep", "1") == 0
    assert run("generate", tmp_path / "hybrid", "x", "--save-state", tmp_path / "book") == 2
    assert "layer 1 keeps softmax attention" in capsys.readouterr().err


def test_bench_compiles_on_a_gpu_alone(folder, capsys):
    assert run("bench", folder / "made", "--lengths", "64", "--compile", "--device", "cpu") == 2
    assert "the model is on cpu, not on a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["  "], ["x", "--max-new-tokens", "0"], ["x", "--temperature", "-1"]])
def test_generate_refuses(option, folder):
    assert run("generate", folder / "made", *option) == 2


def test_list_names_what_there_is(tmp_path, capsys):
    assert run("list", "--json", tmp_path / "list.json") == 0
    groups = json.loads((tmp_path / "list.json").read_text())
    assert {"hedgehog"} < set(groups["feature maps"])
    assert {"llama", "gpt2"} < set(groups["model families"])
    assert {"default", "demo"} < set(groups["recipes"])


def test_the_record_says_all_of_the_kernels_whatever_the_defaults_will_be(folder, tmp_path):
    """Also where an earlier release left out what was its default, beside a checkpoint with other features."""
    made = tmp_path / "made"
    shutil.copytree(folder / "made", made)
    kept = Recipe.from_yaml((made / "recipe.yaml").read_text("utf-8")).kernel
    assert kept.keys() | {"reach"} == KernelSpec().to_dict().keys()
    short = {name: value for name, value in kept.items() if name != "feature_dim"}
    before = Recipe.from_yaml((made / "recipe.yaml").read_text("utf-8")).model_copy(update={"kernel": short})
    (made / "recipe.yaml").write_text(before.to_yaml())
    options = ["--config", folder / "recipe.yaml", "--teacher", folder / "source"]
    assert run("finetune", made, "-o", tmp_path / "tuned", *options) == 0
    assert Recipe.from_yaml((tmp_path / "tuned" / "recipe.yaml").read_text("utf-8")).kernel["feature_dim"] == 16


def test_the_record_of_a_training_has_the_kernels_of_the_checkpoint_by_its_recipe_or_its_plan(folder, tmp_path):
    """A checkpoint from the Hub, or one that Python code has saved, comes without a recipe."""
    made, other = tmp_path / "made", tmp_path / "other.yaml"
    shutil.copytree(folder / "made", made)
    other.write_text(RECIPE.replace("window: 16", "window: 24") + "budget: auto\n")
    for name in ("with", "without"):
        assert run("finetune", made, "-o", tmp_path / name, "--config", other, "--teacher", folder / "source") == 0
        recorded = Recipe.from_yaml((tmp_path / name / "recipe.yaml").read_text("utf-8"))
        plan = json.loads((made / "config.json").read_text())["kernelize"]
        assert plan_for(recorded, load_config(folder / "source")).to_dict() == plan
        assert recorded.budget == "uniform"
        (made / "recipe.yaml").unlink(missing_ok=True)


def test_finetune_evaluate_report_and_push_keep_the_record(folder, tmp_path, capsys):
    tuned, rows = tmp_path / "tuned", tmp_path / "rows.json"
    options = ["--config", folder / "recipe.yaml", "--teacher", folder / "source", "--json", tmp_path / "train.json"]
    assert run("finetune", folder / "made", "-o", tuned, *options) == 0
    assert json.loads((tmp_path / "train.json").read_text())["completed"] is True
    options = ["--teacher", folder / "source", "--suite", "ppl", "--lengths", "64,128", "--json", rows, "--card"]
    assert run("evaluate", tuned, *options) == 0
    assert run("report", rows, "-o", tmp_path / "report") == 0
    assert run("info", tuned, "--json", tmp_path / "info.json") == 0
    facts = json.loads((tmp_path / "info.json").read_text())
    assert facts["tokens"] == 256
    assert facts["rows"] == json.loads(rows.read_text())["rows"]
    assert [command.split()[1] for command in facts["commands"]] == ["convert", "finetune"]
    assert "256" in (tuned / "README.md").read_text()
    assert (tmp_path / "report" / "index.html").is_file()
    assert run("push", tuned, "someone/tuned", "--dry-run", "--json", tmp_path / "push.json") == 0
    sent = json.loads((tmp_path / "push.json").read_text())
    assert {"model.safetensors", "recipe.yaml", "README.md"} <= {file["path"] for file in sent["files"]}


def test_two_models_of_one_name_stay_two_beside_a_teacher(folder, tmp_path):
    twins = [tmp_path / name / "model" for name in ("a", "b")]
    for twin in twins:
        shutil.copytree(folder / "source", twin)
    questions, rows = tmp_path / "sets", tmp_path / "rows.json"
    questions.mkdir()
    (questions / "gaps.jsonl").write_text('{"context": "two and two is", "target": " four"}\n' * 3)
    options = ["--teacher", folder / "made", "--suite", "ppl", "--suite", "passkey", "--suite", "tasks", "--seed", "3"]
    options += ["--lengths", "ppl=64", "--lengths", "150", "--pieces", "2", "--trials", "1", "--task", "gaps"]
    assert run("evaluate", *twins, *options, "--tasks-data", questions, "--json", rows) == 0
    found = [row for row in json.loads(rows.read_text())["rows"] if row["depth"] is None]
    assert {row["model"] for row in found} == {"teacher", "a/model", "b/model"}
    assert {(r["metric"], r["length"], r["n"]) for r in found if r["suite"] != "model"} >= {
        ("ppl", 64, 2), ("passkey", 150, 5), ("gaps/acc", None, 3)}  # fmt: skip


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["org/model-1.5B", "x/y.gguf"], ["model-1.5B", "y"]),
        (["a/m", "b/m", "b/n"], ["a/m", "b/m", "b/n"]),
        (["some/teacher"], ["some/teacher"]),
        (["x/a/m", "x/b/m"], ["a/m", "b/m"]),
    ],
)
def test_names_are_short_and_distinct(sources, names):
    assert short_names(sources) == names
    with pytest.raises(InputError, match="given twice"):
        short_names([*sources, sources[0]])


def test_what_cannot_be_asked_is_refused_before_a_model_is_loaded(folder, capsys, monkeypatch):
    monkeypatch.setattr("kernelize.pipeline.load_for_use", lambda *_, **__: pytest.fail("a model was loaded"))
    for options in (["--suite", "pppl"], ["--suite", "ppl", "--pieces", "0"], ["--suite", "ppl", "--limit", "3"]):
        assert run("evaluate", folder / "made", *options) == 2
    assert capsys.readouterr().err.count("error: ") == 3


def test_tokens_of_a_past_that_is_not_known_are_not_counted_as_none(folder, tmp_path):
    made = tmp_path / "made"
    shutil.copytree(folder / "made", made)
    facts = json.loads((made / "kernelize.json").read_text())
    (made / "kernelize.json").write_text(json.dumps({name: value for name, value in facts.items() if name != "tokens"}))
    options = ["--config", folder / "recipe.yaml", "--teacher", folder / "source"]
    assert run("finetune", made, "-o", tmp_path / "tuned", *options) == 0
    assert "Tokens trained after the conversion: not recorded" in (tmp_path / "tuned" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("option", ["--json", "--output"])
def test_a_file_may_be_a_pipe(folder, option):
    reading, writing = os.pipe()
    assert run("plan", folder / "source", option, f"/dev/fd/{writing}") == 0
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert "feature_map" in pipe.read()


def test_the_card_keeps_the_suites_that_are_not_measured_anew(folder, tmp_path):
    made = tmp_path / "made"
    shutil.copytree(folder / "made", made)
    for suite, length in (("ppl", "64"), ("passkey", "150"), ("ppl", "128")):
        assert run("evaluate", made, "--suite", suite, "--lengths", length, "--card") == 0
    known = json.loads((made / "kernelize.json").read_text())["rows"]
    assert {(row["metric"], row["length"]) for row in known} >= {("ppl", 128), ("passkey", 150)}
    assert ("ppl", 64) not in {(row["metric"], row["length"]) for row in known}


def test_a_plan_is_made_from_what_inspect_measured_and_keeps_its_bytes(folder, tmp_path, capsys):
    few = ("--map", "none", "--map", "elu", "--size", "8", "--tokens", "256")
    files = [tmp_path / name for name in ("plan.yaml", "heads.png", "found.json")]
    where = ("--output", files[0], "--plot", files[1], "--json", files[2])
    assert run("inspect", folder / "source", *few, "--state-bytes", "200000", *where) == 0
    found = json.loads(files[2].read_text())
    assert {row["spec"]["feature_map"] for row in found["maps"]} == {"none", "elu"}
    assert run("plan", folder / "source", "--config", files[0], "--json", tmp_path / "plan.json") == 0
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert run("inspect", folder / "source", *few, "--state-bytes", "10") == 2
    assert "state_bytes=10 is too little" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--state-bytes", "9"], "--state-bytes is what --spec auto may spend"),
        (["--spec", "auto", "--state-bytes", "99999", "--feature-dim", "8"], "leave out --feature-dim"),
        (["--spec", "auto", "--state-bytes", "99999", "--config", "demo"], "leave out --config"),
        (["--spec", "auto", "--state-bytes", "99999", "--stream"], "--stream is for those that do not fit"),
    ],
)
def test_options_without_effect_are_refused(folder, tmp_path, capsys, options, said):
    assert run("convert", folder / "source", "-o", tmp_path / "out", *options) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("bench {} --window 16", "--window does nothing without --shape"),
        ("bench {} --no-sink-logits", "--sink-logits does nothing without --shape"),
        ("bench {} --alone", "--alone does nothing without --shape"),
        ("plan {} --processes 1", "--processes does nothing without --machine"),
        ("plan {} --engine ddp", "--engine does nothing without --machine"),
        ("plan {} --revision foo", "revision='foo' is one of a Hub id"),
        ("check {} --revision foo", "revision='foo' is one of a Hub id"),
        ("list --layers 0", "--layers does nothing without --measure"),
        ("list --map elu", "--map does nothing without --measure"),
        ("list --size 32", "--size does nothing without --measure"),
        ("list --device cpu", "--device does nothing without --measure"),
        ("list --families --measure {}", "leave out one of them"),
        ("generate {} x --top-k 0", "--top-k does nothing without a --temperature above 0"),
        ("generate {} x --temperature 1 --seed 4294967296", "less than or equal to 4294967295"),
        ("generate {} x --top-p 0.5 --temperature 0", "--top-p does nothing without a --temperature above 0"),
        ("generate {} x --seed 0", "--seed does nothing without a --temperature above 0"),
        ("evaluate {} --suite ppl --lengths passkey=256", "--lengths passkey=256 does nothing without --suite passkey"),
        ("evaluate {} --suite ppl --haystack novel", "(--haystack) does nothing without the suite passkey or recall"),
        ("evaluate {} --suite ppl --task gaps", "(--task) does nothing without the suite tasks or lm-eval"),
        ("inspect {} --output x.yaml", "--output does nothing without --state-bytes"),
    ],
)
def test_options_that_go_with_another_one_are_refused_alone(folder, capsys, command, said):
    assert run(*command.format(folder / "source").split()) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.out == ""


def test_a_dry_run_asks_for_no_output_folder(folder, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("")
    monkeypatch.chdir(tmp_path)
    assert run("convert", folder / "source", "--dry-run") == 0


def test_ctrl_c_while_commands_are_imported_is_no_traceback(monkeypatch, capsys):
    class Interrupted(types.ModuleType):
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "kernelize.cli.app", Interrupted("kernelize.cli.app"))
    assert run("list") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_convert_chooses_by_itself_under_a_number_of_bytes(folder, tmp_path, capsys, monkeypatch):
    from kernelize.cli import inspection

    few = functools.partial(inspection.inspect_loaded, tokens=256, maps=("none", "elu"), sizes=(8,), slots=(16,))
    monkeypatch.setattr(inspection, "inspect_loaded", few)
    assert run("convert", folder / "source", "-o", tmp_path / "out", "--spec", "auto") == 2
    assert "--spec auto needs --state-bytes" in capsys.readouterr().err
    asked = ("--spec", "auto", "--state-bytes", "150000", "--json", tmp_path / "plan.json")
    assert run("convert", folder / "source", "-o", tmp_path / "out", *asked) == 0
    assert 0 < json.loads((tmp_path / "plan.json").read_text())["state_bytes"] <= 150_000


def test_one_map_is_measured_at_one_size(folder, tmp_path):
    asked = ("--map", "elu", "--map", "none", "--size", "8", "--layers", "1", "--json", tmp_path / "maps.json")
    assert run("list", "--measure", folder / "source", *asked) == 0
    rows = json.loads((tmp_path / "maps.json").read_text())["maps"]
    assert sorted(row["spec"]["feature_map"] for row in rows) == ["elu", "none"]


def test_bench_puts_its_numbers_into_the_card(folder, tmp_path, capsys):
    made = tmp_path / "made"
    shutil.copytree(folder / "made", made)
    asked = ("--against", folder / "source", "--lengths", "16", "--tokens", "2")
    assert run("bench", made, *asked, "--card") == 0
    speed = (made / "README.md").read_text().partition("## Speed")[2].partition("\n## ")[0]
    assert "CPU cores" in speed
    assert "| bench | prefill_ms | 16 |" in speed
    assert "prefill_ms" not in (made / "README.md").read_text().partition("## Quality")[2].partition("\n## ")[0]
    assert run("bench", "--shape", "llama3-8b", "--card") == run("bench", folder / "source", "--card") == 2
    assert "--card needs a SOURCE" in capsys.readouterr().err


def test_demo_compares_four_models_and_writes_a_checkpoint(folder, tmp_path, capsys, monkeypatch):
    from kernelize import demo
    from kernelize.recipe import Recipe

    monkeypatch.setattr(demo, "load_recipe", lambda name: Recipe.from_yaml(RECIPE))
    monkeypatch.setattr(demo, "CHECKS", ("chunked prefill", "state bytes"))
    options = ["--source", folder / "source", "-o", tmp_path / "out", "--json", tmp_path / "demo.json"]
    assert run("demo", *options) == 0
    found = json.loads((tmp_path / "demo.json").read_text())
    assert {row["model"] for row in found["rows"]} == {demo.TEACHER, demo.WINDOW, demo.BEFORE, demo.AFTER}
    assert {row["passed"] for row in found["checks"]} == {True}
    shown = capsys.readouterr().out
    assert all(name in shown for name in (demo.TEACHER, demo.WINDOW, demo.BEFORE, demo.AFTER))
    assert run("generate", tmp_path / "out", "x", "--max-new-tokens", "2") == 0


def test_a_demo_that_is_told_to_stop_does_not_measure_half_a_model(folder, tmp_path, capsys, monkeypatch):
    from kernelize import demo
    from kernelize.recipe import Recipe
    from kernelize.train import TrainResult

    monkeypatch.setattr(demo, "load_recipe", lambda name: Recipe.from_yaml(RECIPE))
    monkeypatch.setattr(demo, "finetune", lambda *_, **__: TrainResult(tmp_path, (), completed=False))
    assert run("demo", "--source", folder / "source", "-o", tmp_path / "out") == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_control_holds_no_more_positions_than_the_plan():
    from kernelize.demo import window_plan
    from kernelize.plan import ConversionPlan
    from kernelize.runtime.spec import KernelSpec

    for spec in (KernelSpec(), KernelSpec(block=1), KernelSpec(block=64, window=256, slots=0, policy="value")):
        (control,) = window_plan(ConversionPlan((spec,))).layers
        assert not control.has_memory
        assert spec.positions - spec.block < control.positions <= spec.positions
