"""Runs a script in several CPU processes, under an engine as a file in configs/accelerate describes it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from kernelize.launch import engine_environment, launch_command


def launch(script: Path, *arguments: str, engine: str = "ddp", processes: int = 2, timeout: float = 1200) -> None:
    """AssertionError with what it wrote if the script fails."""
    environment = os.environ | engine_environment(engine, processes)
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("KERNELIZE_DEEPSPEED")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = launch_command(script, arguments, processes)
    done = subprocess.run(command, env=environment, timeout=timeout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
