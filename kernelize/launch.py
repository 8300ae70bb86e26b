"""Several processes of a script under an engine of `configs/accelerate`: what to run, and in which environment."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from .errors import InputError
from .runtime.spec import SpecError, choose

KEPT = ("ACCELERATE_", "FSDP_")  # what an engine's file puts into the environment


def engines() -> dict[str, Path]:
    """Name and file of every engine that is shipped."""
    folder = Path(str(resources.files("kernelize.configs"))) / "accelerate"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def engine_environment(engine: str, processes: int) -> dict[str, str]:
    """What `accelerate launch --config_file` sets for the script's processes, but for where they run."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    try:
        choose("engine", engine, tuple(engines()))
    except SpecError as error:
        raise InputError(str(error)) from None
    options = ["--config_file", str(engines()[engine]), "--num_processes", str(processes), "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(options))
    arguments.deepspeed_fields_from_accelerate_config, arguments.main_process_port = "", 0
    made = prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    return {key: value for key, value in made.items() if key.startswith(KEPT)}


def launch_command(script: str | Path, arguments: Sequence[str], processes: int) -> list[str]:
    """The command that runs so many processes of a script on this machine."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*run, str(script), *arguments]
