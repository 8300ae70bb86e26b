"""The page of examples/web in headless Chromium: it reads by the rule, answers, and its state stays as large as it is.

It is driven by tests/web_page.mjs through playwright-core, on tests/fixtures/edge, an export that says the alphabet.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
WEB = TESTS.parent / "examples" / "web"
EXPORT = TESTS / "fixtures" / "edge"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDED = {
    "Chromium": CHROMIUM,
    "node": shutil.which("node"),
    "node_modules (run `npm ci` in examples/web)": (WEB / "node_modules").is_dir(),
}
MISSING = [name for name, found in NEEDED.items() if not found]
STATE = 8 + 8 + 128  # bytes
DOCUMENT = "It was a dark and stormy night. " * 12

pytestmark = pytest.mark.skipif(
    bool(MISSING) and os.environ.get("CI") != "true", reason=f"not installed: {', '.join(MISSING)}"
)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def site(tmp_path):
    """The page on a static server, its export in `model`; (address, the folder of the export)."""
    for path in WEB.iterdir():
        if path.name != "model":
            (tmp_path / path.name).symlink_to(path)
    export = Path(shutil.copytree(EXPORT, tmp_path / "model"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/", export
    server.shutdown()
    server.server_close()
    thread.join()


def visit(address: str, **settings) -> dict:
    """What the page says when it is used so; see web_page.mjs."""
    given = {"web": str(WEB), "url": address, "browser": CHROMIUM, "patience": 60_000, **settings}
    command = ["node", str(TESTS / "web_page.mjs"), json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_it_reads_a_document_answers_and_its_state_stays_as_large_as_it_is(site):
    said = visit(site[0], document=DOCUMENT, questions=["abc", "tuv"], limit=4)
    assert said["status"] == "alphabet, fp32, one thread"
    assert said["answers"] == ["defg", "wxyz"]  # ends early where a block was not let go in time
    assert set(said["bytes"]) == {STATE}
    assert int(said["seen"]) == len("<user>") + len(DOCUMENT.strip())
    heights = {point.split(",")[1] for point in said["line"].split()}
    assert len(heights) == 1
    assert (said["errors"], said["outside"]) == ([], [])


def test_a_missing_model_is_one_clear_line(site):
    assert "nowhere/kernelize-edge.json: the server answers 404" in visit(f"{site[0]}?model=nowhere")["error"]


def test_a_foreign_or_truncated_export_is_one_clear_line(site):
    address, export = site
    (export / "leave.onnx").write_bytes((export / "leave.onnx").read_bytes()[:40])
    assert visit(address)["error"].startswith("leave.onnx cannot be loaded: ")
    facts = json.loads((export / "kernelize-edge.json").read_text()) | {"format": "other 7"}
    (export / "kernelize-edge.json").write_text(json.dumps(facts))
    assert visit(address)["error"] == "the model's format is other 7, this page reads kernelize-edge 1"


def test_its_packages_are_pinned():
    package = json.loads((WEB / "package.json").read_text())
    versions = {**package["dependencies"], **package["devDependencies"]}
    assert all(version[0].isdigit() for version in versions.values()), versions
