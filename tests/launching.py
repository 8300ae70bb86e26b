"""Runs a script in several CPU processes, under an engine as a file in configs/accelerate describes it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

ENGINES = Path(__file__).parents[1] / "configs/accelerate"
KEPT = ("ACCELERATE_", "FSDP_")  # what an engine's file puts into the environment


def engine_environment(engine: str, processes: int) -> dict[str, str]:
    """What `accelerate launch --config_file` would set for the script's processes, but for where they run."""
    options = ["--config_file", str(ENGINES / f"{engine}.yaml"), "--num_processes", str(processes), "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(options))
    made = prepare_multi_gpu_env(arguments)
    return {key: value for key, value in made.items() if key.startswith(KEPT)} | {"ACCELERATE_MIXED_PRECISION": "no"}


def launch(script: Path, *arguments: str, engine: str = "ddp", processes: int = 2, timeout: float = 280) -> None:
    """AssertionError with what it wrote if the script fails."""
    environment = os.environ | engine_environment(engine, processes)
    environment |= {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, str(script), *arguments], env=environment, timeout=timeout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
