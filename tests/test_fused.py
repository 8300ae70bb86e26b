"""The fused kernels obey the operation's laws under Triton's interpreter. On a GPU: benchmarks/layer.py check."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux")
HERE = Path(__file__).parent


def laws() -> list[str]:
    """Their names, as `fused_laws.LAWS` has them: read, not imported, for there Triton would be imported too early."""
    body = ast.parse((HERE / "fused_laws.py").read_text()).body
    found = next(x for x in body if isinstance(x, ast.Assign) and ast.unparse(x.targets[0]) == "LAWS")
    return [ast.unparse(law) for law in found.value.elts]


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory):
    """The process of fused_laws.py and what it has written: Triton reads TRITON_INTERPRET when it is imported."""
    log = tmp_path_factory.mktemp("fused") / "log"
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    with log.open("w") as written:
        server = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE / "fused_laws.py")],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=written,
            text=True,
            start_new_session=True,
        )
    yield server, log
    os.killpg(server.pid, signal.SIGKILL)  # also a law that has run out of time
    server.communicate()


@pytest.mark.parametrize("law", laws())
def test_fused_kernels(law, interpreted):
    """Imports take as long as many a law: they are done once."""
    server, log = interpreted
    print(law, file=server.stdin, flush=True)
    assert server.stdout.readline() == f"{law} 0\n", log.read_text()[-3000:]


def test_without_a_gpu_chunked_is_chosen():
    """And says why."""
    import torch

    from kernelize.runtime.ops import describe
    from kernelize.runtime.spec import KernelSpec

    if not torch.cuda.is_available():
        assert describe(KernelSpec()) == "chunked (no GPU)"
