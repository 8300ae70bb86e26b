"""Publish a checkpoint: reload it where kernelize is absent, compare, and push it to the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .card import (
    CARD_NAME,
    CHECKPOINT,
    EDGE,
    EDGE_FACTS,
    ENVIRONMENT_NAME,
    FACTS_NAME,
    PROGRAM,
    RECIPE_NAME,
    VARIANTS,
    model_card,
    portable,
    read_config,
    read_variant,
    runtime_files,
    variants,
)
from .errors import InputError, KernelizeError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    CommitOperation = CommitOperationAdd | CommitOperationDelete

RUNTIME = Path(__file__).with_name("runtime")
TOLERANCE = 1e-4  # max abs difference of logits; the same code on the same machine gives 0
ATTEMPTS = 3
WAIT = 3.0  # seconds between attempts; the client has its own, shorter ones for single requests
RETRY_STATUS = (408, 429, 500, 502, 503, 504)
REFUSALS = {401: "the Hub does not accept the token: ", 403: "the token may not write there: "}
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_OIDC_ID_TOKEN")
WEIGHTS = ("model*.safetensors",)
LOADED = (*WEIGHTS, "model*.safetensors.index.json", "*.py")
EXPORTED = {  # docs/edge.md
    EDGE: (EDGE_FACTS, "model.onnx", "weights.bin", "leave.onnx", "tokenizer.json"),
    PROGRAM: (EDGE_FACTS, "model.pte", "tokenizer.json"),
}
BINARY = (*WEIGHTS, "*.onnx", "*.pte", "weights.bin")
SUMS_NAME = "SHA256SUMS"
TEXTS = (
    ENVIRONMENT_NAME, "*.json", "*.md", "*.yaml", "*.jinja", "LICENSE*", "NOTICE*",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip
SECRET = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class VerifyResult:
    """A reload in a clean process, beside the same computation here."""

    difference: float  # max abs over the logits of the whole prompt
    tolerance: float
    prompt_tokens: int
    greedy_tokens: int
    seconds: float


@dataclass(frozen=True)
class SentFile:
    path: str
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class PushResult:
    """What was sent, or with `dry_run` what would be."""

    repo_id: str
    revision: str
    dry_run: bool
    files: tuple[SentFile, ...]
    verified: VerifyResult
    commit: str | None = None
    url: str | None = None

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


# --- verify ---


def verify(folder: str | Path, *, trust_remote_code: bool = True) -> VerifyResult:
    """Reloads `folder` in a process in which kernelize cannot be imported, and compares its answers with ours.

    The clean process runs offline, with an empty module cache and without the Hub token. Raises KernelizeError when
    the reload fails or when logits or greedy tokens differ, InputError when the folder is no kernelized checkpoint.
    """
    folder = _checkpoint(folder)
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(answer_there, folder, trust_remote_code), pool.submit(_answer_here, folder)
        there, here = (answer.result() for answer in asked)
    difference = compare(folder, here, there)
    counts = here["logits"].shape[0], len(here["tokens"])
    return VerifyResult(difference, TOLERANCE, *counts, time.monotonic() - started)


def compare(folder: Path, here: dict, there: dict) -> float:
    """The largest difference of logits of two answers of `folder`; KernelizeError where they are not the same."""
    if here["logits"].shape != there["logits"].shape:
        raise KernelizeError(f"{folder}: the reloaded model has another vocabulary than the one loaded here")
    difference = (here["logits"] - there["logits"]).abs().max().item()
    if not difference <= TOLERANCE:
        raise KernelizeError(
            f"{folder}: reloaded without kernelize, the logits differ by {difference:.3g}, above {TOLERANCE:g}; "
            "the files do not belong together: convert or save the checkpoint again"
        )
    if here["tokens"].tolist() != there["tokens"].tolist():
        raise KernelizeError(f"{folder}: reloaded without kernelize, greedy decoding gives other tokens")
    return difference


def _answer_here(folder: Path) -> dict:
    from .convert import load
    from .reload import answer

    model, _ = load(str(folder))
    return answer(model)


def answer_there(folder: Path, trust_remote_code: bool = True) -> dict:
    """`reload.answer` of the checkpoint in a clean process; KernelizeError with its last line where it fails."""
    import torch
    from safetensors.torch import load_file

    from . import reload

    options = json.dumps({"trust_remote_code": trust_remote_code, "threads": torch.get_num_threads()})
    with tempfile.TemporaryDirectory(prefix="kernelize-verify-") as scratch:
        target = Path(scratch, "answer.safetensors")
        child = subprocess.run(
            [sys.executable, "-I", str(Path(reload.__file__)), str(folder.resolve()), str(target), options],
            env=_clean_environment(scratch), cwd=scratch, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if child.returncode:
            lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
            reason = lines[-1] if lines else f"exit code {child.returncode}"
            raise KernelizeError(f"{folder}: does not load without kernelize: {reason}")
        return load_file(target)


def _clean_environment(scratch: str) -> dict[str, str]:
    """Ours, without the token and without the modules and settings that earlier runs have left."""
    kept = {k: v for k, v in os.environ.items() if k not in TOKEN_VARIABLES}
    return {**kept, "HF_HOME": scratch, "HF_MODULES_CACHE": f"{scratch}/modules", "HF_HUB_OFFLINE": "1"}


# --- what is sent ---


def files_to_send(folder: str | Path, name: str | None = None) -> dict[str, Path | bytes]:
    """The checkpoint and its variants as path -> file (or content, for what is written anew), in sending order.

    Of the folder only files on the allow-list: safetensors weights, the runtime, tokenizer, JSON, YAML and Markdown; of
    sub-folders only those that `card.VARIANTS` names. Training state, logs, and pickles match nothing. A card that
    nobody edited is written anew, for the Hub's `name` of the checkpoint, and the record and the recipe without the
    folders of this machine. SHA256SUMS, of all other files, comes last. Raises InputError when a Python file is not
    this kernelize's runtime, byte for byte.
    """
    folder = _checkpoint(folder)
    sent = _files_of(folder, "*.py")
    for variant in variants(folder):
        sent |= {f"{variant}/{path}": content for path, content in _variant(folder / variant).items()}
    written = folder / CARD_NAME
    if not written.is_file() or written.read_text("utf-8") == model_card(folder):
        sent[CARD_NAME] = model_card(folder, name).encode()
    sums = "".join(f"{file.sha256}  {file.path}\n" for file in _describe(sent))
    return {**sent, SUMS_NAME: sums.encode()}


def _files_of(folder: Path, *more: str) -> dict[str, Path | bytes]:
    """Those of a checkpoint's files that the allow-list, and the patterns `more`, let through."""
    for path in runtime_files(folder):
        _check_runtime(path)
    allowed = (*WEIGHTS, *TEXTS, *more)
    found = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and _matches(path.name, allowed)}
    return {name: _without_folders(path) for name, path in found.items()}


def _without_folders(path: Path) -> Path | bytes:
    """The file; or its content where that named folders of this machine. Of a card, only commands are touched."""
    if path.name not in (FACTS_NAME, RECIPE_NAME, CARD_NAME):
        return path
    lines = path.read_text("utf-8").splitlines(keepends=True)
    whole = path.name != CARD_NAME
    moved = [portable(line) if whole or line.startswith("kernelize ") else line for line in lines]
    return path if moved == lines else "".join(moved).encode()


def _variant(folder: Path) -> dict[str, Path | bytes]:
    """Of a quantised checkpoint all but the code, which the loader takes from above; of an export the files it has."""
    if VARIANTS[folder.name] == CHECKPOINT:
        return {name: file for name, file in _files_of(_checkpoint(folder)).items() if name != CARD_NAME}
    read_variant(folder)
    wanted = EXPORTED[VARIANTS[folder.name]]
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder}: lacks {', '.join(missing)}; export it again")
    return {name: folder / name for name in wanted}


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _check_runtime(path: Path) -> None:
    ours = RUNTIME / path.name
    if not ours.is_file() or path.read_bytes() != ours.read_bytes():
        raise InputError(
            f"{path}: not the runtime file of kernelize {__version__}; only code that this version ships is pushed: "
            "load the checkpoint and save it again"
        )


def _checkpoint(folder: str | Path) -> Path:
    """The folder, if it holds a kernelized checkpoint with safetensors weights."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; allowed is the output of `kernelize convert` or `finetune`")
    if "kernelize" not in read_config(folder):
        raise InputError(f"{folder}: no kernelized checkpoint: config.json has no `kernelize`; convert it first")
    if not any(folder.glob(WEIGHTS[0])):
        raise InputError(f"{folder}: has no {WEIGHTS[0]}; only safetensors weights are pushed")
    return folder


def _describe(sent: dict[str, Path | bytes]) -> tuple[SentFile, ...]:
    from huggingface_hub import CommitOperationAdd

    infos = {name: CommitOperationAdd(name, content).upload_info for name, content in sent.items()}
    return tuple(SentFile(name, info.size, info.sha256.hex()) for name, info in infos.items())


def _refuse_secrets(sent: dict[str, Path | bytes], token: str | None) -> None:
    for name, content in sent.items():
        if _matches(name.rpartition("/")[2], BINARY):
            continue
        text = content if isinstance(content, bytes) else content.read_bytes()
        if SECRET.search(text) or (token and token.encode() in text):
            raise InputError(f"{name}: contains a Hugging Face token; remove it, and revoke the token")


# --- push ---


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    on_progress: Progress | None = None,
) -> PushResult:
    """Verifies a kernelized checkpoint and sends it to the Hub as one commit.

    `revision` is a branch, made if it is missing; `token` defaults to HF_TOKEN or the login of `hf auth login`.
    A failed transfer is tried again and resumes: large files that arrived are not sent twice, and running the
    same push again sends only what is missing. With `dry_run` nothing is sent and no token is needed.

    Raises InputError for a folder, repository name or token that cannot be used, KernelizeError when the reload
    differs or the Hub cannot be reached or refuses.
    """
    say = on_progress or (lambda text: None)
    _check_repo_id(repo_id)
    folder = _checkpoint(folder)
    token = None if dry_run else _token(token)
    sent = files_to_send(folder, repo_id)
    _refuse_secrets(sent, token)
    say("reloading in a clean process")
    verified = verify(folder)
    for variant in variants(folder):
        if VARIANTS[variant] == CHECKPOINT:
            say(f"reloading {variant} in a clean process")
            verify(folder / variant)
    files = _describe(sent)
    plan = PushResult(repo_id, revision or "main", dry_run, files, verified)
    if token is None:
        return plan
    say(f"sending {len(files)} files, {plan.size / 1e6:.1f} MB")
    message = commit_message or f"Upload a checkpoint made with kernelize {__version__}"
    return _with_retry(lambda: _send(plan, sent, private, message, token), token, say)


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"repository {repo_id!r}: allowed is NAME or OWNER/NAME ({_one_line(error)})") from error


def _token(token: str | None) -> str:
    from huggingface_hub import get_token

    found = token or get_token()
    if not found:
        raise InputError("no Hugging Face token: set HF_TOKEN, or log in with `hf auth login`")
    return found


def _send(plan: PushResult, sent: dict[str, Path | bytes], private: bool, message: str, token: str) -> PushResult:
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="kernelize", library_version=__version__)
    repo_id = _open_repository(api, plan, private)
    operations = _operations(sent) + _stale(api, repo_id, plan.revision, sent)
    commit = api.create_commit(repo_id, operations, commit_message=message, revision=plan.revision)
    return dataclasses.replace(plan, repo_id=repo_id, commit=commit.oid, url=commit.commit_url)


def _open_repository(api: HfApi, plan: PushResult, private: bool) -> str:
    """Creates what is missing; the full name. Without `private`, a new repository follows the owner's default."""
    repo_id = api.create_repo(plan.repo_id, private=True if private else None, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise InputError(f"{repo_id}: exists already and is public; make it private first, or choose another name")
    if plan.revision != "main":
        api.create_branch(repo_id, branch=plan.revision, exist_ok=True)
    return repo_id


def _operations(sent: dict[str, Path | bytes]) -> list[CommitOperation]:
    from huggingface_hub import CommitOperationAdd

    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in sent.items()]


def _stale(api: HfApi, repo_id: str, revision: str, sent: Collection[str]) -> list[CommitOperation]:
    """Weights and code of an earlier push that this one lacks: left there, they would be loaded beside ours or
    instead of ours (model.safetensors goes before shards)."""
    from huggingface_hub import CommitOperationDelete

    folders = {name.rpartition("/")[0] for name in sent}  # a variant that is not sent stays as it is
    there = [name.rpartition("/") for name in api.list_repo_files(repo_id, revision=revision)]
    replaced = [
        f"{folder}{slash}{name}" for folder, slash, name in there if folder in folders and _matches(name, LOADED)
    ]
    return [CommitOperationDelete(name) for name in replaced if name not in sent]


# --- failures of the network ---


def _with_retry(send: Callable[[], PushResult], token: str, say: Progress, attempts: int = ATTEMPTS) -> PushResult:
    """Each attempt asks the Hub anew what it already has, so a repetition neither resends nor commits twice."""
    from huggingface_hub.errors import HTTPError

    try:
        return send()
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        if attempts == 1 or not _passing(error):
            raise KernelizeError(f"push failed: {_explain(error)}".replace(token, "***")) from error
    say(f"the transfer broke off, trying again ({attempts - 1} left)")
    time.sleep(WAIT)
    return _with_retry(send, token, say, attempts - 1)


def _cause(error: BaseException) -> BaseException:
    """The HTTP error behind `error`; the client wraps it when an upload in a thread fails."""
    from huggingface_hub.errors import HTTPError

    while not isinstance(error, HTTPError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _passing(error: BaseException) -> bool:
    """Whether another attempt may succeed: the network failed, or the Hub was busy or broken."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    cause = _cause(error)
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code in RETRY_STATUS
    return isinstance(cause, HTTPError)


def _explain(error: BaseException) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    cause = _cause(error)
    if isinstance(cause, HfHubHTTPError):
        hint = REFUSALS.get(cause.response.status_code, "")
        return f"{hint}{_one_line(cause)}"
    if isinstance(cause, HTTPError):
        return f"cannot reach {constants.ENDPOINT}: {_one_line(cause)}"
    return _one_line(cause)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
