"""Training on more than one device, and what `predict` says of it: random weights of known shapes, the sample text.

    python benchmarks/scale.py train --shape llama3-8b --processes 1,2 --out FILE   # the rows for GPUs
    python benchmarks/scale.py train --shape tiny --processes 1,2   # the same on the CPU, in minutes
    python benchmarks/scale.py train --stages long --length 131072 --context 8192 --rows 1 --micro-batch 1 --processes 1
    python benchmarks/scale.py predict                              # memory and time against predictions, on the CPU
    python benchmarks/scale.py figures                              # the predictions of docs/scaling.md; nothing is run

The stage `long` reads by chunks, across which the state is carried; past `--context` it goes on without the teacher. A
row is one stage on so many processes: tokens a second (of the steps after the first two), peak bytes of the device
(on the CPU of the process), each step's loss, and the efficiency against as many times one process.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from kernelize.launch import engine_environment, launch_command
from kernelize.plan import ConversionPlan
from kernelize.predict import FACTOR, Machine, machine_named, predict
from kernelize.recipe import Recipe, load_recipe
from kernelize.runtime.modeling import kernelize_model
from kernelize.runtime.spec import KernelSpec
from kernelize.shapes import SHAPES
from kernelize.train import finetune

WARM = 2  # steps that are not timed
SPARE = 2  # steps that are planned beyond those: the run is stopped before its end
STAGES: dict[str, dict[str, Any]] = {
    "transfer": {"kind": "transfer"},
    "lora": {"kind": "distil", "trainable": "new+lora", "gradient_checkpointing": True},
    "all": {"kind": "distil", "trainable": "all", "gradient_checkpointing": True},
    "long": {"kind": "distil", "trainable": "new+lora", "chunk_tokens": 4096, "distil": {"kl": 1.0, "beyond": 0.1}},
}
CONTEXT = 2**20  # tokens that a model is made for
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2}
CASES: list[tuple[int, dict[str, Any]]] = [  # of `predict`: layers, stage
    (4, {"kind": "transfer"}),
    (4, {"kind": "distil", "trainable": "new"}),
    (4, {"kind": "distil", "trainable": "all"}),
    (8, {"kind": "distil", "trainable": "all"}),
    (8, {"kind": "distil", "trainable": "all", "gradient_checkpointing": True}),
]


def letters() -> Any:
    """A tokenizer of bytes: weights are random, so it does not matter which of the vocabulary's rows a text reads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={"</s>": 0} | {x: i for i, x in enumerate(alphabet, 1)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def config_of(fields: dict[str, Any], words: int, context: int = CONTEXT) -> Any:
    fields = {"model_type": "llama", **fields, "max_position_embeddings": context}
    fields["vocab_size"] = max(fields.get("vocab_size", 0), words)
    return AutoConfig.for_model(fields.pop("model_type"), **fields, bos_token_id=None, eos_token_id=0)


def pair(config: Any) -> tuple[Any, Any]:
    """A random model, converted, and the original, in host memory; made on the process's device, which is faster."""
    mine = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device, dtype = (mine, torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    torch.manual_seed(0)
    with torch.device(device):
        teacher = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().cpu()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    student = kernelize_model(copy.deepcopy(teacher), list(ConversionPlan.uniform(spec(), layers_of(config)).layers))
    return student, teacher


def layers_of(config: Any) -> int:
    return config.num_hidden_layers


def spec() -> KernelSpec:
    return KernelSpec.from_dict(load_recipe("default").kernel)


def one_stage(fields: dict[str, Any], length: int, rows: int, steps: int) -> Recipe:
    shape = {
        "name": "stage",
        "sequence_length": length,
        "batch_tokens": length * rows,
        "steps": steps,
        "data": ["sample"],
    }
    stage = {"packing": "joined", "learning_rate": 1e-4, **shape, **fields}
    return Recipe.from_dict(
        {"name": "scale", "description": "measurement", "stages": [stage], "checkpoint_steps": 10**6}
    )


def measure(config: Any, recipe: Recipe, output: Path, words: Any) -> dict[str, Any]:
    """Trains, and says on the main process how fast and in which memory."""
    cuda, before = torch.cuda.is_available(), resident()
    student, teacher = pair(config)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    moments: list[float] = []
    cpu: list[float] = []
    losses: list[float] = []
    timed = recipe.stages[0].total_steps - SPARE

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            moments.append(time.monotonic())
            cpu.append(time.process_time())
            losses.append(event["metrics"]["loss"])
            if len(moments) == timed:  # all processes stop after the next step
                os.kill(os.getpid(), signal.SIGTERM)

    with patch("kernelize.train._Run._checkpoint"):  # of an 8B model's weights and moments 96 GB
        finetune(student, words, recipe, output, teacher=teacher, on_event=listen, overwrite=True)
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if not moments:
        return {}
    spent = [[b - a for a, b in zip(at[WARM - 1 :], at[WARM:], strict=False)] for at in (moments, cpu)]
    wall, used = map(statistics.median, spent)
    tokens = recipe.stages[0].batch_tokens
    found = {"tokens_per_second": tokens / wall, "step_cpu_seconds": used, "peak_bytes": peak - (0 if cuda else before)}
    found["losses"] = losses[:timed]
    return found | {"device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__}


def resident() -> int:
    """Bytes of this process's memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# --- train ------------------------------------------------------------------------------------------------------------


def train(given: argparse.Namespace) -> None:
    alone: dict[str, float] = {}
    for name in given.stages.split(","):
        for processes in map(int, given.processes.split(",")):
            row = launched(given, name, processes)
            alone.setdefault(name, row["tokens_per_second"] / processes)
            row["efficiency"] = row["tokens_per_second"] / (processes * alone[name])
            show(row, given.out)


def launched(given: argparse.Namespace, name: str, processes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        arguments = ["worker", "--shape", given.shape, "--stage", name, "--found", str(found)]
        for option in ("length", "rows", "micro_batch", "steps", "context"):
            arguments += [f"--{option.replace('_', '-')}", str(getattr(given, option))]
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
        environment = os.environ | engine_environment(given.engine, processes) | {"PYTHONPATH": paths}
        if not torch.cuda.is_available():
            environment |= {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}
        subprocess.run(launch_command(__file__, arguments, processes), env=environment, check=True)
        row = {"shape": given.shape, "engine": given.engine, "stage": name, "processes": processes}
        row |= {"length": given.length, "rows": given.rows, "context": given.context}
        row["date"] = datetime.date.today().isoformat()
        return row | json.loads(found.read_text())


def worker(given: argparse.Namespace) -> None:
    """One of the processes of `train`. All are as long in every number of processes: the global batch is the same."""
    fields = STAGES[given.stage] | {"micro_batch": given.micro_batch}
    words = letters()
    config = config_of(dict(SHAPES[given.shape]), len(words), given.context)
    output = given.found.parent / "out"
    found = measure(config, one_stage(fields, given.length, given.rows, WARM + given.steps + SPARE), output, words)
    if found:
        given.found.write_text(json.dumps(found))


# --- predict ----------------------------------------------------------------------------------------------------------


def compare(given: argparse.Namespace) -> None:
    """Each case in a process of its own. Exits with 1 if a measurement is further than FACTOR from its prediction."""
    far = 0
    for number in range(len(CASES)):
        command = [sys.executable, __file__, "case", "--number", str(number)]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.PIPE)
        row = json.loads(done.stdout.splitlines()[-1])
        far += any(not 1 / FACTOR <= row[key] <= FACTOR for key in ("memory_ratio", "time_ratio"))
        show(row, given.out)
    sys.exit(1 if far else 0)


def case(given: argparse.Namespace) -> None:
    (layers, stage), words = CASES[given.number], letters()
    config = config_of(SMALL | {"num_hidden_layers": layers}, len(words))
    recipe = one_stage({"micro_batch": 2, **stage}, 512, 2, WARM + 2 + SPARE)
    flops, scores = processor_speed(SMALL["hidden_size"])
    with tempfile.TemporaryDirectory() as folder:  # the first run loads what any run needs
        first = one_stage({"micro_batch": 1, **stage}, 64, 1, WARM + 1 + SPARE)
        measure(config_of(SMALL | {"num_hidden_layers": 1}, len(words)), first, Path(folder) / "first", words)
        found = measure(config, recipe, Path(folder) / "out", words)
    machine = Machine("this CPU", 0, flops, 1.0, fused=False, scores=scores)
    said = predict(config, ConversionPlan.uniform(spec(), layers), recipe.stages[0], machine)
    ratios = {"memory_ratio": found["peak_bytes"] / said.memory}
    ratios["time_ratio"] = found["step_cpu_seconds"] / said.step_seconds
    print(json.dumps({"layers": layers, "stage": stage, **ratios, "predicted": said.to_dict(), "measured": found}))


def processor_speed(width: int) -> tuple[float, float]:
    """Of one thread: FLOPs a second in a product as large as the model's, and exponentials a second."""
    a, b = torch.randn(1024, width), torch.randn(width, 4 * width)
    product, exponential = processor_seconds(lambda: a @ b), processor_seconds(lambda: b.exp())
    return 2 * 1024 * width * 4 * width / product, b.numel() / exponential


def processor_seconds(run: Callable[[], Any]) -> float:
    """CPU time of a call, the median of 20."""
    times = []
    for _ in range(20):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return statistics.median(times)


# --- figures ----------------------------------------------------------------------------------------------------------

LLAMA_70B = dict(SHAPES["llama3-8b"]) | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64
}  # fmt: skip
LORA, EVERYTHING = STAGES["lora"], STAGES["all"]
FIGURES: list[tuple[str, str, str, int, dict[str, Any]]] = [  # model, machine, engine, processes, stage
    ("8B", "h200", "ddp", 1, {"kind": "transfer"}),
    ("8B", "h200", "fsdp2", 2, {"kind": "transfer"}),
    ("8B", "h200", "ddp", 1, LORA),
    ("8B", "h200", "fsdp2", 2, LORA),
    ("8B", "h200", "fsdp2", 2, EVERYTHING),
    ("8B", "h200", "fsdp2", 4, EVERYTHING),
    ("8B", "rtx4090", "ddp", 1, {"kind": "transfer", "layers_at_a_time": 4}),
    (
        "8B",
        "h200",
        "ddp",
        1,
        {**LORA, "sequence_length": 131072, "chunk_tokens": 4096, "gradient_checkpointing": False},
    ),
    ("70B", "h100", "ddp", 8, {"kind": "transfer", "layers_at_a_time": 8}),
    ("70B", "h100", "fsdp2", 64, LORA),
    ("70B", "h100", "fsdp2", 64, EVERYTHING),
]


def figures(given: argparse.Namespace) -> None:
    """A Markdown table."""
    print(
        "| model | on | stage | weights, gradients, optimizer | activations | gathered, logits | GB | tokens/s | disk |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for size, machine, engine, processes, fields in FIGURES:
        config = config_of(dict(SHAPES["llama3-8b"]) if size == "8B" else dict(LLAMA_70B), 0)
        config.dtype = torch.bfloat16
        length = fields.get("sequence_length", 2048)
        rows = max(1, 524288 // length)
        stage = {"micro_batch": 1, **fields}
        recipe = one_stage(stage, length, rows, 8)
        p = predict(
            config, ConversionPlan.uniform(spec(), layers_of(config)), recipe.stages[0], machine_named(machine),
            processes=processes, sharded=engine != "ddp",
        )  # fmt: skip
        named = " ".join(str(v) if k in ("kind", "trainable") else f"{k} {v}" for k, v in fields.items() if v)
        parts = [p.weights + p.gradients + p.optimizer, p.activations, p.gathered + p.logits, p.memory]
        cells = [f"{x / 1e9:.1f}" for x in parts] + [f"{recipe.stages[0].batch_tokens / p.step_seconds:,.0f}"]
        cells = [size, f"{processes} x {machine}, {engine}", named, *cells, f"{p.stored_bytes / 1e9:.0f}"]
        print(f"| {' | '.join(cells)} |")


def show(row: dict[str, Any], out: Path | None) -> None:
    print(json.dumps(row), flush=True)
    if out:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run in (("train", train), ("worker", worker), ("predict", compare), ("case", case), ("figures", figures)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--out", type=Path, help="file of JSON lines that rows are added to")
        command.add_argument("--shape", default="tiny", choices=SHAPES)
        command.add_argument("--length", type=int, default=2048, help="tokens a sequence")
        command.add_argument("--rows", type=int, default=8, help="sequences a global batch")
        command.add_argument("--context", type=int, default=CONTEXT, help="tokens that the teacher can read")
        command.add_argument("--micro-batch", type=int, default=4)
        command.add_argument("--steps", type=int, default=6, help="that are timed")
    commands.choices["train"].add_argument("--processes", default="1,2")
    commands.choices["train"].add_argument("--stages", default="transfer,lora")
    commands.choices["train"].add_argument("--engine", default="fsdp2")
    commands.choices["worker"].add_argument("--stage", choices=STAGES)
    commands.choices["worker"].add_argument("--found", type=Path)
    commands.choices["case"].add_argument("--number", type=int)
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
