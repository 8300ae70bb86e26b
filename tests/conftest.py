"""One thread for a test process and for each that it starts: they share the cores. A browser for those who ask."""

import os

import browser as headless
import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> headless.Browser:
    """A headless browser; without one a test is skipped, and fails in CI."""
    program = headless.find()
    if program is None and os.environ.get("CI"):
        pytest.fail(f"none of {', '.join(headless.NAMES)} is installed: see .ci/run")
    if program is None:
        pytest.skip("no headless browser is installed")
    return headless.Browser(program, tmp_path_factory.mktemp("browser"))
