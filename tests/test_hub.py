"""Publishing: what is sent, once and whole; what is never sent; that what was pushed loads without kernelize."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_server import TOKEN, USER, HubServer
from huggingface_hub.utils import close_session

from kernelize import hub
from kernelize.errors import InputError, KernelizeError

# The client itself uploads through an argument that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

RUNTIME = Path(hub.__file__).with_name("runtime")
NAME = f"{USER}/tiny"
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
    (made / "config.json").write_text(json.dumps({"model_type": "kernelized_llama", "kernelize": {"version": 1}}))
    (made / "model.safetensors").write_bytes(os.urandom(4096))
    (made / "tokenizer.json").write_text("{}")
    (made / "README.md").write_text(CARD)
    for path in RUNTIME.glob("*.py"):
        shutil.copy(path, made)
    return made


def sent_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


# --- what is sent ---


def test_push_is_one_commit_with_every_file(server, trusted, folder):
    result = hub.push(folder, NAME)
    assert server.repos[NAME].messages == [
        "initial commit",
        f"Upload a checkpoint made with kernelize {hub.__version__}",
    ]
    stored = server.files(NAME)
    assert {n: stored[n] for n in sent_names(folder)} == {p.name: p.read_bytes() for p in folder.iterdir()}
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
    assert [(f.path, f.size, f.sha256) for f in plan.files] == [
        (p.name, p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()) for p in sorted(folder.iterdir())
    ]
    assert hub.push(folder, NAME, token=TOKEN).files == plan.files


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


@pytest.mark.parametrize("name", ["recipe.yaml", "README.md", "kernelize.json"])
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


def test_the_same_push_again_makes_no_second_commit(server, trusted, folder):
    assert hub.push(folder, NAME).commit == hub.push(folder, NAME).commit
    assert len(server.repos[NAME].messages) == 2


def test_no_network_is_one_line(server, trusted, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(KernelizeError, match=r"cannot reach http://127\.0\.0\.1:9") as caught:
        hub.push(folder, NAME)
    assert "\n" not in str(caught.value)
