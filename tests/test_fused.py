"""The fused kernels obey the operation's laws under Triton's interpreter. On a GPU: benchmarks/layer.py check."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux")
LAWS = (
    "forward", "streams", "prefill", "ahead", "segments", "gradients", "lifetimes", "low_precision", "mixed_precision",
    "choice", "steps", "steps_in_low_precision", "far", "far_gradients", "far_steps", "bounds",
    "heads", "divergence", "capturable", "short_tiles",
)  # fmt: skip


@pytest.mark.parametrize("law", LAWS)
def test_fused_kernels(law):
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(here / "fused_laws.py"), law],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_without_a_gpu_chunked_is_chosen():
    """And says why."""
    import torch

    from kernelize.runtime.ops import describe
    from kernelize.runtime.spec import KernelSpec

    if not torch.cuda.is_available():
        assert describe(KernelSpec()) == "chunked (no GPU)"
