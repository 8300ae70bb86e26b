"""One thread a test process: the processes of pytest-xdist share the cores. A browser for those who ask for it."""

import os

import browser as headless
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> headless.Browser:
    """A headless browser; without one a test is skipped, and fails in CI."""
    program = headless.find()
    if program is None and os.environ.get("CI"):
        pytest.fail(f"none of {', '.join(headless.NAMES)} is installed: see .ci/run")
    if program is None:
        pytest.skip("no headless browser is installed")
    return headless.Browser(program, tmp_path_factory.mktemp("browser"))
