"""How much memory a streamed conversion takes, beside one in memory: random weights of a known shape, on the CPU.

    python benchmarks/streamed.py --shape llama3-8b --layers 8 --work /tmp/streamed

Writes a checkpoint of that shape shard by shard, converts it in a process of its own, and prints one line of JSON:
bytes of the checkpoint and of its largest shard, the peak of the process's resident memory, and its processor time.
The peak is VmHWM of the process itself: what the system tells a parent about its children (ru_maxrss) begins with the
parent's own memory, which here has just written the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kernelize.convert import demo_source
from kernelize.recipe import load_recipe
from kernelize.shapes import SHAPES
from kernelize.stream import INDEX

SHARD = 1 << 30  # bytes
MEASURED = """
import re, sys
from kernelize.cli import main

code = main(sys.argv[2:])
peak = re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())
open(sys.argv[1], "w").write(peak[1])
sys.exit(code)
"""


def shards(parameters: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The names, cut into pieces of about SHARD bytes; each tensor is made when its piece is."""
    held: dict[str, torch.Tensor] = {}
    for name, like in parameters.items():
        if held and sum(x.nbytes for x in held.values()) + like.nbytes > SHARD:
            yield held
            held = {}
        held[name] = (
            torch.empty(like.shape, dtype=like.dtype).normal_(std=0.02)
            if like.ndim > 1
            else torch.ones_like(like, device="cpu")
        )
    yield held


def write(shape: str, layers: int | None, folder: Path) -> None:
    fields = dict(SHAPES[shape]) | ({"num_hidden_layers": layers} if layers else {})
    config = AutoConfig.for_model(fields.pop("model_type"), **fields, bos_token_id=None, eos_token_id=None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.dtype, config.architectures = torch.bfloat16, [type(model).__name__]
    folder.mkdir(parents=True)
    where = {}
    for number, shard in enumerate(shards(dict(model.named_parameters())), 1):
        save_file(shard, folder / f"part-{number:05}.safetensors", metadata={"format": "pt"})
        where |= dict.fromkeys(shard, f"part-{number:05}.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config.save_pretrained(folder)
    gguf = demo_source()
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama3.2-1b", choices=SHAPES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--work", type=Path, default=Path("streamed-work"))
    parser.add_argument("--in-memory", action="store_true", help="convert without --stream")
    parser.add_argument("--budget", default="uniform", choices=("uniform", "auto"), help="auto takes a backward pass")
    given = parser.parse_args()
    source = given.work / "source"
    if not source.exists():
        write(given.shape, given.layers, source)
    files = [file.stat().st_size for file in source.glob("*.safetensors")]
    peak = given.work / "peak"
    command = [sys.executable, "-c", MEASURED, str(peak), "convert", str(source), "-o", str(given.work / "out")]
    recipe = load_recipe("default").model_copy(update={"budget": given.budget, "stages": ()})
    (given.work / "recipe.yaml").write_text(recipe.to_yaml())
    options = [
        "--config",
        str(given.work / "recipe.yaml"),
        "--device",
        "cpu",
        "--overwrite",
        *([] if given.in_memory else ["--stream"]),
    ]
    subprocess.run([*command, *options], check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(given.work / "out")
    found = {
        "checkpoint_bytes": sum(files),
        "largest_shard_bytes": max(files),
        "peak_bytes": int(peak.read_text()) << 10,
    }
    found["user_seconds"] = round(used.ru_utime)
    print(
        json.dumps(
            {
                "shape": given.shape,
                "layers": given.layers,
                "stream": not given.in_memory,
                "budget": given.budget,
                **found,
            }
        )
    )


if __name__ == "__main__":
    main()
