"""Publishing: what is sent, once and whole; what is never sent; that what was pushed loads without kernelize."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hub_server import TOKEN, USER, HubServer
from huggingface_hub import ModelCard
from huggingface_hub.utils import close_session
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kernelize import card, hub, reload
from kernelize.convert import convert, load, save
from kernelize.errors import InputError, KernelizeError
from kernelize.pipeline import document
from kernelize.plan import ConversionPlan
from kernelize.quantize import quantize_model
from kernelize.runtime.spec import KernelSpec

# The client itself uploads through an argument that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

EXPORT = Path(__file__).parent / "fixtures" / "edge"
RUNTIME = Path(hub.__file__).with_name("runtime")
NAME = f"{USER}/tiny"
CONFIG = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
SPEC = KernelSpec(feature_dim=16, window=16, sinks=2, slots=16, block=8)
CARD = "---\nlicense: mit\n---\n\n# tiny\n"


@pytest.fixture
def server(monkeypatch):
    """A Hub that this process talks to, with plain LFS uploads and no waiting."""
    with HubServer() as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(hub, "WAIT", 0.0)
        yield running
        close_session()


@pytest.fixture
def trusted(monkeypatch):
    """Takes the reload for granted, for tests of the transfer alone."""
    result = hub.VerifyResult(0.0, hub.TOLERANCE, 192, 8, 0.0)
    monkeypatch.setattr(hub, "verify", lambda folder: result)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Looks like a checkpoint from outside; its weights are noise."""
    made = tmp_path / "tiny"
    made.mkdir()
    plan = ConversionPlan.uniform(SPEC, CONFIG.num_hidden_layers)
    config = {**CONFIG.to_dict(), "model_type": "kernelized_llama", "kernelize": plan.to_dict()}
    (made / "config.json").write_text(json.dumps(config))
    (made / "model.safetensors").write_bytes(os.urandom(4096))
    (made / "tokenizer.json").write_text("{}")
    (made / "README.md").write_text(CARD)
    for path in RUNTIME.glob("*.py"):
        shutil.copy(path, made)
    return made


def sent_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()} | {hub.SUMS_NAME}


# --- what is sent ---


def test_push_is_one_commit_with_every_file(server, trusted, folder):
    result = hub.push(folder, NAME)
    assert server.repos[NAME].messages == [
        "initial commit",
        f"Upload a checkpoint made with kernelize {hub.__version__}",
    ]
    stored = server.files(NAME)
    assert {p.name: stored[p.name] for p in folder.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert set(stored) - sent_names(folder) == {".gitattributes"}
    assert (result.commit, result.repo_id) == (server.repos[NAME].refs["main"], NAME)


def test_name_without_owner_is_the_users(server, trusted, folder):
    assert hub.push(folder, "tiny").repo_id == NAME


def test_training_state_logs_and_pickles_stay_here(server, trusted, folder):
    before = sent_names(folder)
    for name in (
        "optimizer.bin",
        "pytorch_model.bin",
        "rng.pkl",
        "log.jsonl",
        "events.out.tfevents.1",
        "optimizer.safetensors",
    ):
        (folder / name).write_bytes(b"x")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "model.safetensors").write_bytes(b"x")
    assert {file.path for file in hub.push(folder, NAME).files} == before
    assert set(server.files(NAME)) == before | {".gitattributes"}


def test_dry_run_sends_nothing_and_lists_exactly_what_a_push_sends(server, trusted, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    plan = hub.push(folder, NAME, dry_run=True)
    assert server.requests == []
    assert plan.commit is None
    assert [(f.path, f.size, f.sha256) for f in plan.files[:-1]] == [
        (p.name, p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()) for p in sorted(folder.iterdir())
    ]
    assert plan.files[-1].path == hub.SUMS_NAME
    assert hub.push(folder, NAME, token=TOKEN).files == plan.files


def test_the_sums_are_those_of_all_other_files(server, trusted, folder):
    hub.push(folder, NAME)
    stored = server.files(NAME)
    listed = dict(reversed(line.split("  ")) for line in stored[hub.SUMS_NAME].decode().splitlines())
    others = set(stored) - {hub.SUMS_NAME, ".gitattributes"}
    assert listed == {name: hashlib.sha256(stored[name]).hexdigest() for name in others}


def test_folders_of_this_machine_stay_here(server, trusted, folder):
    (folder / "README.md").unlink()
    card.record(folder, commands=["kernelize convert /home/me/models/x.gguf --output ~/work/out"])
    (folder / "recipe.yaml").write_text("source: /home/me/models/x.gguf\ndata: [{hub: org/data}]\n")
    hub.push(folder, NAME)
    stored = server.files(NAME)
    for name in ("README.md", "kernelize.json", "recipe.yaml"):
        text = stored[name].decode()
        assert "/home" not in text
        assert "~/" not in text
    assert "kernelize convert x.gguf --output out" in stored["README.md"].decode()
    edited = stored["README.md"].decode() + "\nkernelize check /home/me/out\nSee /api/v1/models.\n"
    (folder / "README.md").write_text(edited)
    hub.push(folder, NAME)
    assert server.files(NAME)["README.md"].decode().endswith("\nkernelize check out\nSee /api/v1/models.\n")
    assert stored["recipe.yaml"].decode() == "source: x.gguf\ndata: [{hub: org/data}]\n"
    assert "/home/me" in (folder / "kernelize.json").read_text()


@pytest.mark.parametrize("text", ["https://a.b/c/d", "org/name", "1/2 and 3/4", "a: /", "[x](docs/y.md)", "~2 / 3"])
def test_what_is_no_path_stays(text):
    assert card.portable(text) == text


# --- variants ---


@pytest.fixture
def variants(folder) -> Path:
    """The folder with an int8 checkpoint and two exports in it, and one that is neither."""
    shutil.copytree(folder, folder.parent / "copy")
    (folder.parent / "copy").rename(folder / "int8")
    rows = [{"suite": "ppl", "metric": "ppl_ratio", "model": "int8", "value": 1.002}]
    card.record(folder / "int8", quantisation={"bits": 8, "scheme": "int8, a scale a row", "rows": rows})
    shutil.copytree(EXPORT, folder / "onnx-int8")
    (folder / "onnx-int8" / "notes.txt").write_text("mine")
    (folder / "executorch").mkdir()
    for name in hub.EXPORTED[card.PROGRAM]:
        (folder / "executorch" / name).write_text('{"precision": "fp32"}')
    (folder / "scratch").mkdir()
    (folder / "scratch" / "model.onnx").write_bytes(b"x")
    return folder


def test_variants_go_into_the_same_commit_by_name(server, trusted, variants):
    (variants / "README.md").unlink()
    plan = hub.push(variants, NAME, dry_run=True)
    hub.push(variants, NAME)
    stored = server.files(NAME)
    assert {file.path for file in plan.files} == set(stored) - {".gitattributes"}
    assert len(server.repos[NAME].messages) == 2
    inside = {name for name in stored if "/" in name}
    quantised = {"config.json", "kernelize.json", "model.safetensors", "tokenizer.json"}
    exported = {f"onnx-int8/{n}" for n in hub.EXPORTED[card.EDGE]} | {
        f"executorch/{n}" for n in hub.EXPORTED[card.PROGRAM]
    }
    assert inside == {f"int8/{n}" for n in quantised} | exported
    written = stored["README.md"].decode()
    assert {"onnx", "executorch", "torchao", "8-bit"} <= set(ModelCard(written).data.tags)
    assert f'`from_pretrained("{NAME}", subfolder="int8", trust_remote_code=True)`' in written
    assert "| ×1.0020 |" in written


def test_a_variant_that_is_not_sent_stays_and_one_that_is_replaces(server, trusted, variants):
    hub.push(variants, NAME)
    (variants / "int8" / "model.safetensors").rename(variants / "int8" / "model-00001-of-00001.safetensors")
    shutil.rmtree(variants / "onnx-int8")
    hub.push(variants, NAME)
    stored = server.files(NAME)
    assert "onnx-int8/model.onnx" in stored
    assert {n for n in stored if n.startswith("int8/model")} == {"int8/model-00001-of-00001.safetensors"}


def test_a_variant_that_is_none_is_refused(server, trusted, variants):
    (variants / "onnx-int8" / "weights.bin").unlink()
    with pytest.raises(InputError, match=r"onnx-int8: lacks weights\.bin"):
        hub.push(variants, NAME)
    shutil.rmtree(variants / "onnx-int8")
    (variants / "executorch" / "model.pte").unlink()
    with pytest.raises(InputError, match=r"executorch: lacks model\.pte"):
        hub.push(variants, NAME)
    shutil.rmtree(variants / "executorch")
    (variants / "int8" / "kernelize.json").unlink()
    with pytest.raises(InputError, match=r"int8: has no kernelize\.json"):
        hub.push(variants, NAME)
    assert server.requests == []


def test_private_and_revision_arrive(server, trusted, folder):
    hub.push(folder, NAME, private=True, revision="trial/1", commit_message="first")
    repo = server.repos[NAME]
    assert repo.private
    assert set(repo.refs) == {"main", "trial/1"}
    assert set(server.files(NAME)) == {".gitattributes"}
    assert set(server.files(NAME, "trial/1")) == sent_names(folder) | {".gitattributes"}
    assert repo.messages[-1] == "first"


def test_private_is_refused_for_a_public_repository(server, trusted, folder):
    hub.push(folder, NAME)
    with pytest.raises(InputError, match="public"):
        hub.push(folder, NAME, private=True)


def test_weights_and_code_of_an_earlier_push_are_replaced(server, trusted, folder):
    hub.push(folder, NAME)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "tokenizer.json").unlink()
    hub.push(folder, NAME)
    assert "model.safetensors" not in server.files(NAME)
    assert "tokenizer.json" in server.files(NAME)


def test_foreign_code_is_refused(server, trusted, folder):
    (folder / "spec.py").write_text("import os\n")
    with pytest.raises(InputError, match=r"spec\.py: not the runtime"):
        hub.push(folder, NAME)
    assert server.requests == []


# --- the token ---


def test_token_goes_only_into_the_authorization_header(server, trusted, folder, capfd):
    said: list[str] = []
    result = hub.push(folder, NAME, on_progress=said.append)
    assert any(r.headers.get("authorization") == f"Bearer {TOKEN}" for r in server.requests)
    assert not any(TOKEN in r.path or TOKEN.encode() in r.body for r in server.requests)
    assert not any("authorization" in r.headers for r in server.seen("PUT", "/large/"))
    out, err = capfd.readouterr()
    assert TOKEN not in f"{out}{err}{said}{result}{result.to_dict()}"


@pytest.mark.parametrize("name", ["recipe.yaml", "README.md", "tokenizer_config.json"])
def test_file_with_a_token_is_refused(server, trusted, folder, name):
    (folder / name).write_text(f"{CARD}\ntoken: {TOKEN}\n")
    with pytest.raises(InputError, match=f"{name}: contains") as caught:
        hub.push(folder, NAME)
    assert TOKEN not in str(caught.value)
    assert server.requests == []


def test_missing_token_is_one_line(server, trusted, folder, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match="no Hugging Face token: set HF_TOKEN"):
        hub.push(folder, NAME)


def test_refused_token_is_named_but_not_shown(server, trusted, folder):
    wrong = "hf_" + "x" * 34
    with pytest.raises(KernelizeError, match="does not accept the token") as caught:
        hub.push(folder, NAME, token=wrong)
    assert wrong not in str(caught.value)
    assert "\n" not in str(caught.value)


# --- bad input ---


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "-x", "has space", "a--b", "x.git"])
def test_bad_repository_name(server, trusted, folder, repo_id):
    with pytest.raises(InputError, match="allowed is NAME or OWNER/NAME"):
        hub.push(folder, repo_id)
    assert server.requests == []


def test_folder_that_is_no_kernelized_checkpoint(server, trusted, folder, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        hub.push(tmp_path / "absent", NAME)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="only safetensors"):
        hub.push(folder, NAME)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="no kernelized checkpoint"):
        hub.push(folder, NAME)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        hub.push(folder, NAME)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        hub.push(folder, NAME)


# --- faults ---


@pytest.mark.parametrize(
    ("method", "part"), [("PUT", "/large/"), ("POST", "/commit/"), ("POST", "/repos/create"), ("POST", "/preupload/")]
)
def test_one_server_error_does_not_stop_a_push(server, trusted, folder, method, part):
    server.fail(method, part)
    hub.push(folder, NAME)
    assert len(server.repos[NAME].messages) == 2
    assert len(server.seen("PUT", "/large/")) == (2 if method == "PUT" else 1)


def test_push_that_gave_up_resumes_without_sending_weights_again(server, trusted, folder):
    server.fail("POST", "/commit/", status=503, times=hub.ATTEMPTS)
    with pytest.raises(KernelizeError, match="503") as caught:
        hub.push(folder, NAME)
    assert "\n" not in str(caught.value)
    assert server.repos[NAME].messages == ["initial commit"]
    hub.push(folder, NAME)
    assert len(server.seen("PUT", "/large/")) == 1
    assert len(server.repos[NAME].messages) == 2


def test_an_interrupted_push_of_shards_sends_only_what_is_missing(server, trusted, folder):
    (folder / "model.safetensors").unlink()
    shards = {f"model-0000{i}-of-00005.safetensors": os.urandom(4096) for i in range(1, 6)}
    for name, content in shards.items():
        (folder / name).write_bytes(content)
    server.fail("PUT", "/large/", status=403, times=99, after=2)  # no attempt helps
    with pytest.raises(KernelizeError, match="403"):
        hub.push(folder, NAME)
    arrived, tried = set(server.large), len(server.seen("PUT", "/large/"))
    assert len(arrived) == 2
    server.faults.clear()
    hub.push(folder, NAME)
    sent = {request.path.rpartition("/")[2] for request in server.seen("PUT", "/large/")[tried:]}
    assert sent == {hashlib.sha256(content).hexdigest() for content in shards.values()} - arrived
    assert {name: server.files(NAME)[name] for name in shards} == shards


def test_the_same_push_again_makes_no_second_commit(server, trusted, folder):
    assert hub.push(folder, NAME).commit == hub.push(folder, NAME).commit
    assert len(server.repos[NAME].messages) == 2


def test_no_network_is_one_line(server, trusted, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(KernelizeError, match=r"cannot reach http://127\.0\.0\.1:9") as caught:
        hub.push(folder, NAME)
    assert "\n" not in str(caught.value)


# --- with a real model ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A converted tiny Llama whose window, slots and memory are all read by the reload's prompt."""
    torch.manual_seed(0)
    model = convert(LlamaForCausalLM(CONFIG).eval(), ConversionPlan.uniform(SPEC, 2, keep=(1,)))
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(CONFIG.vocab_size)}, unk_token="w0"))
    return save(
        model,
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0"),
        tmp_path_factory.mktemp("hub") / "tiny-kernelized",
    )


@pytest.fixture
def copied(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))


def test_pushed_checkpoint_answers_the_same_where_kernelize_is_absent(server, checkpoint, tmp_path):
    assert hub.push(checkpoint, NAME, private=True).verified.difference == 0.0
    answer = tmp_path / "answer.safetensors"
    pulled = subprocess.run(
        [sys.executable, "-I", reload.__file__, NAME, answer, '{"trust_remote_code": true, "threads": 1}'],
        env={**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert pulled.returncode == 0, pulled.stderr
    assert TOKEN not in pulled.stdout + pulled.stderr
    here, there = reload.answer(load(checkpoint)[0]), load_file(answer)
    assert (here["logits"] - there["logits"]).abs().max() <= hub.TOLERANCE
    assert here["tokens"].tolist() == there["tokens"].tolist()


def test_a_quantised_variant_loads_from_its_sub_folder_where_kernelize_is_absent(server, trusted, copied, tmp_path):
    model, tokenizer = load(copied)
    quantize_model(model, 4)
    save(model, tokenizer, copied / "int4")
    rows = [{"suite": "ppl", "metric": "ppl_ratio", "model": "int4", "value": 1.0}]
    card.record(copied / "int4", quantisation={"bits": 4, "scheme": "int4", "rows": rows})
    hub.push(copied, NAME)
    assert not [name for name in server.files(NAME) if name.startswith("int4/") and name.endswith(".py")]
    answer, options = tmp_path / "answer.safetensors", '{"trust_remote_code": true, "threads": 1, "subfolder": "int4"}'
    pulled = subprocess.run(
        [sys.executable, "-I", reload.__file__, NAME, answer, options],
        env={**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert pulled.returncode == 0, pulled.stderr
    here, there = reload.answer(load(copied / "int4")[0]), load_file(answer)
    assert (here["logits"] - there["logits"]).abs().max() <= hub.TOLERANCE


def test_verify_catches_a_missing_runtime_file(copied):
    (copied / "feature_maps.py").unlink()
    with pytest.raises(KernelizeError, match=r"does not load without kernelize: .*feature_maps\.py"):
        hub.verify(copied)


def test_verify_catches_code_that_computes_something_else(copied):
    with (copied / "modeling.py").open("a") as file:
        file.write(TAMPERED)
    with pytest.raises(KernelizeError, match="logits differ by 1,"):
        hub.verify(copied)


TAMPERED = """
import functools

_forward = KernelizedModelMixin.forward

@functools.wraps(_forward)
def _shifted(self, *args, **kwargs):
    out = _forward(self, *args, **kwargs)
    out.logits = out.logits + 1
    return out

KernelizedModelMixin.forward = _shifted
"""


def test_verify_catches_weights_that_do_not_load(copied):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(KernelizeError, match=r"does not load without kernelize: .*SafetensorError"):
        hub.verify(copied)


# --- the card ---


def facts_of(text: str) -> tuple[dict, str]:
    parsed = ModelCard(text)
    return parsed.data.to_dict(), parsed.text


def test_card_without_measurements_says_so(checkpoint):
    data, text = facts_of(card.model_card(checkpoint))
    assert {"kernelize", "linear-attention"} <= set(data["tags"])
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert not {"license", "base_model", "language"} & set(data)
    assert "Not measured. `kernelize evaluate" in text
    assert "Not measured. `kernelize bench" in text
    assert "not recorded. `kernelize finetune" in text
    assert "commands that made this checkpoint were not recorded" in text


def test_card_is_filled_from_what_was_recorded(copied):
    source = card.Source("org/base", "org/base", license="apache-2.0", language=("en", "fr"))
    row = {"suite": "perplexity", "metric": "ppl", "length": 2048, "depth": None, "n": 9}
    rows = [
        {**row, "model": "teacher", "value": 20.0, "low": 19.0, "high": 21.0},
        {**row, "model": "kernelized", "value": 21.0, "low": None, "high": None},
        {**row, "model": "kernelized", "suite": "passkey", "metric": "passkey", "depth": 0.5, "value": 0.75},
        {**row, "model": "kernelized", "suite": "memory", "metric": "cache_bytes", "value": 45336.0},
    ]
    card.record(copied, source=source, tokens=1_234_567)
    card.record(copied, rows=rows, commands=["kernelize convert org/base"])
    (copied / "recipe.yaml").write_text("name: tried\n")
    data, text = facts_of(card.model_card(copied, "me/new"))
    assert (data["license"], data["base_model"], data["language"]) == ("apache-2.0", "org/base", ["en", "fr"])
    assert "| perplexity | ppl | 2048 |  | 20 [19, 21] | 21 (+5.0%) |" in text
    assert "| passkey | passkey | 2048 | 0.5 | not measured | 0.75 |" in text
    assert "| memory | cache_bytes | 2048 |  | not measured | 45.3 kB |" in text
    for part in ('from_pretrained("me/new", trust_remote_code=True)', "1,234,567", "name: tried", "convert org/base"):
        assert part in text


def test_card_states_plan_sizes_and_hashes_of_the_code(checkpoint):
    facts = card.read_facts(checkpoint)
    _, text = facts_of(card.model_card(facts))
    assert "| 1 | softmax, unchanged |" in text
    assert "slots 16" in text
    assert set(facts.code) == {p.name for p in checkpoint.glob("*.py")} >= {"modeling.py", "spec.py"}
    for name, digest in facts.code.items():
        assert f"| `{name}` | `{digest}` |" in text
        assert digest == hashlib.sha256((RUNTIME / name).read_bytes()).hexdigest()


def test_card_names_the_repository_unless_somebody_edited_it(server, trusted, copied):
    hub.push(copied, NAME)
    assert not (copied / "README.md").exists()
    written = server.files(NAME)["README.md"].decode()
    assert f'from_pretrained("{NAME}"' in written
    (copied / "README.md").write_text(card.model_card(copied))
    hub.push(copied, NAME)
    assert server.files(NAME)["README.md"].decode() == written
    (copied / "README.md").write_text(CARD)
    hub.push(copied, NAME)
    assert server.files(NAME)["README.md"].decode() == CARD


def test_the_versions_are_those_that_made_it_not_those_that_measured_it(copied):
    document(copied, commands=["kernelize convert org/base"])
    written = (copied / "environment.txt").read_text()
    assert f"# kernelize {hub.__version__}, Python" in written
    assert f"\ntorch=={torch.__version__.partition('+')[0]}\n" in written
    assert written.splitlines()[-1] in card.model_card(copied)
    (copied / "environment.txt").write_text("torch==0.0\n")
    document(copied, rows=[])
    assert (copied / "environment.txt").read_text() == "torch==0.0\n"


def test_source_of_a_folder_is_what_its_card_says(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage: de\n---\n")
    assert card.read_source(tmp_path) == card.Source(tmp_path.name, license="mit", language=("de",))


def test_unknown_fact_is_refused(copied):
    with pytest.raises(InputError, match="'row' is not one of source, tokens, rows, commands"):
        card.record(copied, row=[])
