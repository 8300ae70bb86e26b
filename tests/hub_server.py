"""A Hugging Face Hub in miniature on 127.0.0.1: the endpoints that huggingface_hub calls to push and to pull.

Repositories, commits and large files live in memory. Every request is recorded, and `fail` makes the next
requests of a kind answer with an error, so that tests can count commits, look for leaked tokens and interrupt
uploads.
Xet storage is not spoken: clients set HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

USER = "tester"
TOKEN = "hf_" + "t0ken" * 7
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".model", ".onnx")


class RefusedError(Exception):
    """Answers a request with an HTTP error."""

    def __init__(self, status: int, message: str, code: str = "", **body):
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **body}


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Repo:
    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content
    messages: list[str] = field(default_factory=list)

    def commit(self, revision: str, tree: dict[str, bytes], message: str) -> str:
        self.messages.append(message)
        oid = hashlib.sha1(f"{len(self.messages)} {revision} {message}".encode()).hexdigest()
        self.trees[oid] = tree
        self.refs[revision] = oid
        return oid

    def resolve(self, revision: str) -> str:
        oid = self.refs.get(revision, revision)
        if oid not in self.trees:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


class HubServer:
    """`with HubServer() as hub:` serves on `hub.url` until the block ends."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}  # sha256 -> content
        self.requests: list[Request] = []
        self.faults: list[list] = []  # [method, part of the path, status, times left, passing before]
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> HubServer:
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    # --- what tests ask ---

    def fail(self, method: str, part: str, *, status: int = 500, times: int = 1, after: int = 0) -> None:
        """Of the requests of `method` whose path contains `part`, `after` pass, and the next `times` get `status`."""
        self.faults.append([method, part, status, times, after])

    def seen(self, method: str, part: str) -> list[Request]:
        return [r for r in self.requests if r.method == method and part in r.path]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.trees[repo.resolve(revision)]

    # --- answers ---

    def answer(self, request: Request):
        """The (status, headers, body) of a request; raises RefusedError."""
        with self.lock:
            self.requests.append(request)
            self._inject(request)
            path = urlsplit(request.path).path
            for method, pattern, endpoint in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and request.method in method:
                    parts = {name: unquote(part or "") for name, part in match.groupdict().items()}
                    self._authorise(request, parts)
                    return endpoint(self, request, **parts)
        raise RefusedError(404, f"no such endpoint: {request.method} {path}")

    def _inject(self, request: Request) -> None:
        for fault in self.faults:
            method, part, status, left, passing = fault
            if not left or method != request.method or part not in request.path:
                continue
            if passing:
                fault[4] -= 1
                continue
            fault[3] -= 1
            raise RefusedError(status, "injected fault")

    def _authorise(self, request: Request, groups: dict) -> None:
        known = request.headers.get("authorization") == f"Bearer {TOKEN}"
        reading = request.method in ("GET", "HEAD") or "validate-yaml" in request.path
        stored = request.path.startswith("/large/")  # stands for a signed storage address
        repo = self.repos.get(groups.get("repo", ""))
        if stored or known or (reading and not (repo and repo.private)):
            return
        raise RefusedError(401, "Invalid username or password.", "RepoNotFound" if repo else "")

    def repo(self, name: str) -> Repo:
        if name not in self.repos:
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        return self.repos[name]

    def create(self, request: Request):
        asked = json.loads(request.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if name in self.repos:
            raise RefusedError(409, "You already created this model repo", url=f"{self.url}/{name}")
        private = asked.get("private") or asked.get("visibility") == "private"
        self.repos[name] = Repo(private=bool(private))
        self.repos[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return _json({"url": f"{self.url}/{name}", "name": name})

    def validate_yaml(self, request: Request):
        content = json.loads(request.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, flags=re.DOTALL)
        data = yaml.safe_load(match.group(1)) if match else None
        if not isinstance(data, dict):
            raise RefusedError(400, "no metadata", errors=[{"message": "no metadata"}], warnings=[])
        return _json({"errors": [], "warnings": []})

    def branch(self, request: Request, repo: str, revision: str):
        found = self.repo(repo)
        if revision in found.refs:
            raise RefusedError(409, "Reference already exists")
        found.refs[revision] = found.resolve(json.loads(request.body or b"{}").get("startingPoint", "main"))
        return _json({})

    def preupload(self, request: Request, repo: str, revision: str):
        found = self.repo(repo)
        tree = found.trees[found.resolve(revision)]
        files = [_upload_mode(f["path"], tree) for f in json.loads(request.body)["files"]]
        return _json({"files": files, "commitOid": found.resolve(revision)})

    def lfs_batch(self, request: Request, repo: str):
        self.repo(repo)
        objects = [self._lfs_object(repo, o) for o in json.loads(request.body)["objects"]]
        return _json({"transfer": "basic", "objects": objects})

    def _lfs_object(self, repo: str, wanted: dict) -> dict:
        if wanted["oid"] in self.large:
            return wanted
        upload = {"href": f"{self.url}/large/{wanted['oid']}"}
        verify = {"href": f"{self.url}/{repo}.git/info/lfs/verify"}
        return {**wanted, "actions": {"upload": upload, "verify": verify}}

    def lfs_put(self, request: Request, oid: str):
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise RefusedError(400, "content does not have this sha256")
        self.large[oid] = request.body
        return 200, {}, b""

    def lfs_verify(self, request: Request, repo: str):
        wanted = json.loads(request.body)
        if len(self.large.get(wanted["oid"], b"")) != wanted["size"]:
            raise RefusedError(404, "not uploaded")
        return _json({})

    def commit(self, request: Request, repo: str, revision: str):
        found = self.repo(repo)
        lines = [json.loads(line) for line in request.body.splitlines()]
        tree = dict(found.trees[found.resolve(revision)])
        for line in lines[1:]:
            self._apply(tree, line["key"], line["value"])
        oid = found.commit(revision, tree, lines[0]["value"]["summary"])
        return _json({"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}"})

    def _apply(self, tree: dict[str, bytes], key: str, value: dict) -> None:
        if key == "file":
            tree[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile" and value["oid"] in self.large:
            tree[value["path"]] = self.large[value["oid"]]
        elif key == "deletedFile":
            del tree[value["path"]]
        else:
            raise RefusedError(400, f"cannot apply {key} {value.get('path')}")

    def info(self, request: Request, repo: str, revision: str = ""):
        found = self.repo(repo)
        oid = found.resolve(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(found.trees[oid])]
        return _json({"_id": "0", "id": repo, "modelId": repo, "sha": oid, "private": found.private,
                      "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})  # fmt: skip

    def tree(self, request: Request, repo: str, revision: str, folder: str = ""):
        found = self.repo(repo)
        files = found.trees[found.resolve(revision)]
        prefix = f"{folder.strip('/')}/" if folder else ""
        if prefix and not any(path.startswith(prefix) for path in files):
            raise RefusedError(404, f"{folder} does not exist", "EntryNotFound")
        return _json([_entry(path, files[path]) for path in sorted(files) if path.startswith(prefix)])

    def refs(self, request: Request, repo: str):
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in self.repo(repo).refs.items()]
        return _json({"branches": branches, "tags": [], "converts": []})

    def resolve(self, request: Request, repo: str, revision: str, file: str):
        found = self.repo(repo)
        oid = found.resolve(revision)
        headers = {"X-Repo-Commit": oid}
        if file not in found.trees[oid]:
            return (
                404,
                {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"},
                b"",
            )
        content = found.trees[oid][file]
        headers |= {"ETag": f'"{_oid(file, content)}"', "Accept-Ranges": "bytes"}
        return _ranged(request.headers.get("range"), headers, content)


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
MODEL = rf"/api/models/{REPO}"
ROUTES = (
    (("POST",), "/api/repos/create", HubServer.create),
    (("POST",), "/api/validate-yaml", HubServer.validate_yaml),
    (("POST",), MODEL + "/branch/(?P<revision>.+)", HubServer.branch),
    (("POST",), MODEL + "/preupload/(?P<revision>.+)", HubServer.preupload),
    (("POST",), MODEL + "/commit/(?P<revision>.+)", HubServer.commit),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", HubServer.lfs_batch),
    (("POST",), rf"/{REPO}\.git/info/lfs/verify", HubServer.lfs_verify),
    (("PUT",), "/large/(?P<oid>[0-9a-f]{64})", HubServer.lfs_put),
    (("GET",), MODEL, HubServer.info),
    (("GET",), MODEL + "/revision/(?P<revision>.+)", HubServer.info),
    (("GET",), MODEL + "/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", HubServer.tree),
    (("GET",), MODEL + "/refs", HubServer.refs),
    (("GET", "HEAD"), rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", HubServer.resolve),
)


def _json(body, status: int = 200):
    return status, {"Content-Type": "application/json"}, json.dumps(body).encode()


def _oid(path: str, content: bytes) -> str:
    """What the Hub calls a file's oid: sha256 of a large file, git's sha1 of a small one."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _upload_mode(path: str, tree: dict[str, bytes]) -> dict:
    mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
    known = {"oid": _oid(path, tree[path])} if path in tree else {}
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, **known}


def _entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": entry["oid"], "size": len(content), "pointerSize": 134}
    return entry


def _ranged(asked: str | None, headers: dict, content: bytes):
    if not asked:
        return 200, headers, content
    first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
    start, stop = int(first), min(int(last or len(content)) + 1, len(content))
    return 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}, content[start:stop]


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body are two writes; a delay after each would add up

        def handle_any(self) -> None:
            headers = {k.lower(): v for k, v in self.headers.items()}
            request = Request(self.command, self.path, headers, self._body(headers))
            try:
                status, extra, body = hub.answer(request)
            except RefusedError as error:
                status, extra, body = _json(error.body, error.status)
                extra |= {
                    "X-Error-Message": str(error),
                    **({"X-Error-Code": error.code} if error.code else {}),
                }
            self._reply(status, extra, body)

        do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815 (http.server looks them up)

        def _body(self, headers: dict[str, str]) -> bytes:
            if headers.get("transfer-encoding") == "chunked":
                return b"".join(iter(self._chunk, b""))
            return self.rfile.read(int(headers.get("content-length", 0)))

        def _chunk(self) -> bytes:
            chunk = self.rfile.read(int(self.rfile.readline(), 16))
            self.rfile.readline()
            return chunk

        def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args) -> None:
            pass

    return Handler
