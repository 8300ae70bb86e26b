"""Files that are damaged or lie are one clear line, take no memory, and stay as they are; what may not be, is not."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import OPERATIONS, edited, kinds, outcome, peak, write_gguf
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, tiny_llama

from kernelize.cli import main
from kernelize.convert import load
from kernelize.data import read_documents
from kernelize.errors import InputError, first_line
from kernelize.evaluate import Store
from kernelize.recipe import Recipe
from kernelize.sources import INDEX, check_gguf, check_pinned
from kernelize.tasks import read_set
from kernelize.texts import read_text


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    return kinds(tmp_path_factory.mktemp("valid"))


QUICK = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
EDITS = st.lists(
    st.tuples(st.sampled_from(OPERATIONS), st.floats(0, 1), st.binary(max_size=12)), min_size=1, max_size=3
)
KINDS = [
    "safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "index", "shard", "plan in config.json",
    "facts of the card", "GGUF", "recipe", "text", "JSON lines", "evaluation text", "parquet", "rows", "state",
    "training checkpoint",
]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
@QUICK
@given(edits=EDITS, seed=st.integers(0, 2**32))
def test_a_spoilt_file_is_read_or_is_one_line(valid, name, edits, seed):
    """By edits of bytes, and by what its kind can be made to say; in bounded time and memory, and it stays as it is."""
    kind, before = valid[name], peak()
    raw = kind.path.read_bytes()
    try:
        for spoilt in (edited(raw, edits), kind.spoil(raw, random.Random(seed))):
            kind.path.write_bytes(spoilt)
            assert outcome(kind) in ("read", "refused")
    finally:
        kind.path.write_bytes(raw)
    assert peak() - before < 400 << 20


def test_every_kind_is_tried(valid):
    assert set(KINDS) == set(valid)
    assert {outcome(kind) for kind in valid.values()} == {"read"}


# --- weights that do not fit ------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "source", max_shard_size="30KB")
    byte_tokenizer(chat=True).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def change(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def reindex(source: Path, change) -> None:
    index = json.loads((source / INDEX).read_text())
    change(index["weight_map"])
    (source / INDEX).write_text(json.dumps(index))


NORM = "model.layers.1.input_layernorm.weight"


def drop(source: Path) -> None:
    for file in source.glob("*.safetensors"):
        save_file({n: t for n, t in load_file(file).items() if n != NORM}, file, {"format": "pt"})
    reindex(source, lambda where: where.pop(NORM))


def lie_about_a_shard(source: Path) -> None:
    reindex(source, lambda where: where.update({NORM: next(f for f in where.values() if f != where[NORM])}))


def of_config(**fields):
    return lambda source: change(source / "config.json", **fields)


def of_index(shard: str):
    return lambda source: reindex(source, lambda where: where.update({NORM: shard}))


def pickled(source: Path) -> None:
    for file in source.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    (source / INDEX).unlink()


def named_template(source: Path) -> None:
    change(source / "tokenizer_config.json", chat_template=[{"name": "../../x", "template": ""}])


BAD = {
    "a tensor is missing": (drop, NORM),
    "a tensor has another shape": (of_config(intermediate_size=96), r"the config says \[96, 32\]"),
    "a size without end": (of_config(vocab_size=10**11), r"\[100000000000, 32\]"),
    "more layers than tensors": (of_config(num_hidden_layers=1000), "the weights are 21 tensors"),
    "layers without end": (of_config(num_hidden_layers=10**12), "above 10000"),
    "one layer too many": (of_config(num_hidden_layers=3), "missing is 'model.layers.2"),
    "a shard is missing": (lambda source: sorted(source.glob("*.safetensors"))[0].unlink(), "which is not there"),
    "the index names another shard": (lie_about_a_shard, f"says that '{NORM}' is in"),
    "the index leaves the folder": (of_index("../x.safetensors"), "no file of its own"),
    "the index is a list": (lambda source: (source / INDEX).write_text("[]"), "not an object"),
    "a template leaves the folder": (named_template, "chat template"),
    "no UTF-8": (lambda source: (source / "config.json").write_bytes(b"\xff\xfe{\0}\0"), "cannot be read as JSON"),
    "nested without end": (lambda source: (source / "config.json").write_text("[" * 10**5), "cannot be read as JSON"),
    "only pickles": (pickled, "pickled weights are not read"),
}


@pytest.mark.parametrize("name", BAD)
def test_weights_and_texts_that_do_not_fit_are_named(source, tmp_path, capsys, name):
    spoil, said = BAD[name]
    spoil(source)
    with pytest.raises(InputError, match=said):
        load(source)
    before = sorted(tmp_path.rglob("*"))
    assert main(["convert", str(source), "-o", str(tmp_path / "out")]) == 2
    assert sum(line.startswith("error: ") for line in capsys.readouterr().err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "read"),
    [("convert", "source"), ("finetune", "converted"), ("quantize", "converted"), ("export", "converted")],
)
def test_a_source_is_never_its_own_output(source, converted, tmp_path, capsys, command, read):
    folder = tmp_path / "mine"
    shutil.copytree(source if read == "source" else converted, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    options = {"finetune": ["--config", "demo"], "quantize": ["--bits", "8"]}.get(command, [])
    there = tmp_path / "." / "x" / ".." / "mine"
    assert main([command, str(folder), "-o", str(there), "--overwrite", *options]) == 2
    assert "is the source, which is only read" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["a" * 300, "loop", "dangling"])
def test_an_output_that_cannot_be_is_one_line(source, tmp_path, capsys, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert main(["convert", str(source), "-o", str(tmp_path / name)]) == 2
    assert re.search("File name too long|symbolic link to nothing", capsys.readouterr().err)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "meta", ""])
def test_a_device_that_is_not_here_is_one_line(source, tmp_path, capsys, device):
    assert main(["convert", str(source), "-o", str(tmp_path / "out"), "--device", device]) == 2
    assert f"device={device!r} cannot be used here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, b"\xff\xfe not text\n", b"{}\n"], ids=["folder", "binary", "other"])
def test_a_cache_that_is_none_is_one_line(tmp_path, content):
    path = tmp_path / "cache"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(path))):
        Store(path)


def test_lines_end_in_newlines_alone(tmp_path):
    """JSON strings may hold Unicode's other separators as they are, which Python takes for ends of lines."""
    odd = "a\u2028b\u2029c\x85d"
    for name, row in (("text", {"text": odd}), ("questions", {"context": odd, "target": " x"})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n\n", "utf-8")
    assert read_text(str(tmp_path / "text.jsonl")) == odd
    (question,) = read_set(tmp_path / "questions.jsonl").questions
    assert question.pairs[0][0] == odd


@pytest.mark.parametrize(
    ("error", "said"),
    [(AssertionError(), "AssertionError"), (ValueError("\n a \nb"), "a"), (OSError("one of:\n 1\n2"), "one of: 1")],
)
def test_an_error_that_says_nothing_is_named(error, said):
    assert first_line(error) == said


def test_a_gguf_file_that_promises_more_than_it_has_is_refused_at_once(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    raw = (tmp_path / "tiny.gguf").read_bytes()
    assert len(check_gguf(tmp_path / "tiny.gguf")) == 21
    at = raw.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    for lie in (raw[:-1], raw[:8] + b"\xff" * 8 + raw[16:], raw[:16] + b"\xff" * 8 + raw[24:],
                raw[:at] + b"\xff" * 6 + b"\0\0" + raw[at + 8 :]):  # fmt: skip
        (tmp_path / "tiny.gguf").write_bytes(lie)
        with pytest.raises(InputError, match=r"tiny.gguf"):
            load(tmp_path / "tiny.gguf")
    model, _ = load(_restored(tmp_path / "tiny.gguf", raw))
    assert torch.equal(model.model.norm.weight, tiny_llama(vocab_size=258).model.norm.weight)


def _restored(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


# --- data and recipes -------------------------------------------------------------------------------------------------

STAGE = "stages: [{name: a, kind: transfer, steps: 1, sequence_length: 64, batch_tokens: 128, data: [sample]}]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("layers: {'0-3': {slots: 1}, '2': {slots: 2}}", "layer 2 twice"),
        ("layers: {'1': {slots: 1}}\nkeep: [1]", r"\[1\] stand in keep and in layers"),
        ("name: !!python/object/apply:os.system ['touch pwned']", "not valid YAML"),
        ("kernel: &a [*a]", "recipe"),
        ("name: " + "[" * 5000, "not valid YAML"),
        ("layers: {0-99999999999: {slots: 1}}", "layers"),
        ("kernel: {slots: 1" + "0" * 30 + "}", "above"),
    ],
)
def test_a_recipe_that_is_nonsense_is_one_line(text, said):
    with pytest.raises(InputError, match=said):
        Recipe.from_yaml("name: x\ndescription: y\n" * ("name" not in text) + text)
    assert not Path("pwned").exists()


DATA = {
    "empty": ("d.jsonl", b"", "empty"),
    "binary": ("d.txt", b"\0\1\2" * 999, "binary"),
    "latin-1": ("d.txt", "grün\n".encode("latin-1") * 99, "not UTF-8"),
    "UTF-16": ("d.jsonl", '{"text": "x"}\n'.encode("utf-16"), "not UTF-8"),
    "half of a surrogate pair": ("d.jsonl", b'{"text": "x"}\n{"text": "\\ud800 abc"}\n', "line 2: '\\ud800' is half"),
    "a line that is no object": ("d.jsonl", b'{"text": "x"}\n[1]\n', "line 2"),
    "an enormous line": ("d.jsonl", b'{"text": "' + b"x" * (65 << 20) + b'"}\n', "line 1"),
    "no parquet": ("d.parquet", b"PAR1" + b"\xff" * 99, "cannot be read"),
    "only blank documents": ("d.jsonl", b'{"text": ""}\n' * 3, "no text"),
    "no such column": ("d.jsonl", b'{"words": "x"}\n', "no column"),
}


@pytest.mark.parametrize("name", DATA)
def test_data_that_cannot_be_used_is_one_line_and_nothing_is_trained(name, tmp_path, capsys, converted):
    file, raw, said = DATA[name]
    (tmp_path / file).write_bytes(raw)
    (tmp_path / "r.yaml").write_text(f"name: x\ndescription: y\n{STAGE}")
    options = ["--config", tmp_path / "r.yaml", "--data", tmp_path / file, "-o", tmp_path / "out", "--tokens", "128"]
    assert main(["finetune", str(converted), *map(str, options)]) == 2
    shown = capsys.readouterr().err
    assert said in next(line for line in shown.splitlines() if line.startswith("error: ")), shown
    assert not (tmp_path / "out").exists()


def test_a_folder_that_was_there_before_bad_data_is_as_it_was(tmp_path, converted):
    (tmp_path / "d.jsonl").write_bytes(DATA["a line that is no object"][1])
    (tmp_path / "r.yaml").write_text(f"name: x\ndescription: y\n{STAGE}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    options = ["--config", tmp_path / "r.yaml", "--data", tmp_path / "d.jsonl", "-o", tmp_path / "out", "--tokens", 128]
    assert main(["finetune", str(converted), *map(str, options), "--overwrite"]) == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    tiny_llama().save_pretrained(folder / "source")
    byte_tokenizer().save_pretrained(folder / "source")
    flags = ["--window", "9", "--block", "4", "--slots", "4", "--feature-dim", "8", "--budget", "uniform"]
    assert main(["convert", str(folder / "source"), "-o", str(folder / "made"), *flags]) == 0
    return folder / "made"


def test_evaluation_text_names_the_line_that_cannot_be_read(tmp_path):
    for number, (second, said) in enumerate([
        (rb'{"text": "\ud800 abc"}', r"line 2: '\\ud800' is half of a surrogate pair"),
        (b'{"words": "x"}', "line 2: no column 'text'; it has words"),
        (b'{"text": 3}', "line 2: TypeError: text holds int"),
    ]):  # fmt: skip
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(b'{"text": "x"}\n' + second)
        with pytest.raises(InputError, match=said):
            read_text(str(path))
    question = {"context": "\udc00 a", "target": " b"}
    (tmp_path / "set.jsonl").write_text(json.dumps(question))
    with pytest.raises(InputError, match=r"row 1: '\\udc00' is half"):
        read_set(tmp_path / "set.jsonl")


def test_a_mark_of_byte_order_is_no_text(tmp_path):
    for name, raw in (("bom.txt", "x\n"), ("bom.jsonl", '{"text": "x\\n"}\n')):
        (tmp_path / name).write_text(raw, "utf-8-sig")
        assert read_text(str(tmp_path / name)) == "x\n"
        assert list(read_documents(str(tmp_path / name))) == [{"text": "x\n"}]


@pytest.mark.parametrize("ending", [b"\r\n", b"\r"])
def test_ends_of_lines_of_another_machine_are_newlines_in_training_and_evaluation(tmp_path, ending):
    path = tmp_path / "text.txt"
    path.write_bytes(ending.join([b"one", b"two", b""]))
    assert read_text(str(path)) == "one\ntwo\n"
    assert list(read_documents(str(path))) == [{"text": "one\ntwo\n"}]


# --- code, and paths --------------------------------------------------------------------------------------------------

EVIL = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_of_a_source_never_runs_unasked(source, tmp_path, where):
    (source / "evil.py").write_text(EVIL)
    maps = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    change(source / where, auto_map=maps, model_type="evil", tokenizer_class="T")
    with pytest.raises(InputError):
        load(source)
    assert not list(tmp_path.rglob("ran"))


def test_code_from_another_repository_cannot_be_pinned_and_is_refused(source):
    change(source / "config.json", auto_map={"AutoConfig": "some/body--evil.C"})
    with pytest.raises(InputError, match="code from 'some/body', which nothing pins"):
        load(source, trust_remote_code=True)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "abc123"])
def test_code_from_the_hub_runs_as_one_commit_or_not_at_all(revision, capsys):
    options = ["--revision", revision] if revision else []
    assert main(["convert", "some/model", "--trust-remote-code", *options]) == 2
    assert "full commit hash" in capsys.readouterr().err
    check_pinned("some/model", "0123456789abcdef0123456789abcdef01234567")


def test_nothing_outside_the_output_is_written_through_links_in_it(source, tmp_path):
    victim, output = tmp_path / "victim", tmp_path / "out"
    victim.write_text("precious")
    output.mkdir()
    for name in ("README.md", "config.json", "recipe.yaml", "kernelize.json", "model.safetensors", "modeling.py"):
        (output / name).symlink_to(victim)
    flags = ["--window", "9", "--block", "4", "--slots", "4", "--feature-dim", "8", "--budget", "uniform"]
    assert main(["convert", str(source), "-o", str(output), "--overwrite", *flags]) == 0
    assert victim.read_text() == "precious"
    assert not any(path.is_symlink() for path in output.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"victim", "out", "source"}


def test_the_hub_token_is_in_nothing_that_is_written_or_said(source, tmp_path, capfd, monkeypatch):
    token = "hf_" + "x" * 34
    monkeypatch.setenv("HF_TOKEN", token)
    flags = ["--window", "9", "--block", "4", "--slots", "4", "--feature-dim", "8", "--budget", "uniform"]
    (tmp_path / "r.yaml").write_text(f"name: x\ndescription: y\n{STAGE}")
    tuned = ["-o", tmp_path / "tuned", "--config", tmp_path / "r.yaml", "--json", tmp_path / "tuned.json"]
    assert main(["convert", str(source), "-o", str(tmp_path / "made"), *flags]) == 0
    assert main(["finetune", *map(str, (tmp_path / "made", *tuned))]) == 0
    assert main(["--debug", "convert", "some/model--x", "-o", str(tmp_path / "x")]) == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert token not in "".join(capfd.readouterr())
