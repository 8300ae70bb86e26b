"""Where a training step's time goes: distillation of a known shape with random weights, on one GPU.

    python benchmarks/training.py time --rows 16 32         # tokens a second of whole micro-steps, and of their parts
    python benchmarks/training.py profile                   # the kernels of one micro-step, and what the host waits for

`--out FILE` appends the rows as JSON lines, with device, versions and date. The model is the one that `finetune`
trains: float32 weights, bfloat16 arithmetic under autocast, the teacher in bfloat16, KL over the whole vocabulary,
AdamW; without `--eager` compiled around the attention.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kernelize.compiled import compiled_layers
from kernelize.objectives import Distil
from kernelize.plan import ConversionPlan
from kernelize.recipe import DistilWeights, load_recipe
from kernelize.runtime.modeling import kernelize_model
from kernelize.runtime.spec import KernelSpec
from kernelize.shapes import SHAPES, random_model

WARM, REPEATS = 2, 4


class MicroStep:
    """One micro-batch of a distillation, again and again."""

    def __init__(self, shape: str, rows: int, length: int, device: str):
        gpu = device == "cuda"
        teacher = random_model(shape, device=device)
        spec = KernelSpec.from_dict(load_recipe("default").kernel)
        plan = ConversionPlan.uniform(spec, teacher.config.num_hidden_layers)
        student = kernelize_model(copy.deepcopy(teacher), list(plan.layers)).float().to(device).train()
        teacher = teacher.to(torch.bfloat16 if gpu else torch.float32).requires_grad_(False)
        self.objective, self.device = Distil(student, teacher, DistilWeights()), device
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=gpu)
        ids = torch.randint(0, student.config.vocab_size, (rows, length), device=device)
        positions = torch.arange(length, device=device).expand(rows, -1)
        self.rows = ids, positions, ids, torch.zeros_like(ids, dtype=torch.bool)

    def autocast(self) -> Any:
        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()

    def forward(self) -> torch.Tensor:
        with self.autocast():
            return self.objective(*self.rows).loss.sum() / self.rows[0].numel()

    def __call__(self) -> None:
        self.forward().backward()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.objective.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def student(self) -> None:
        with self.autocast():
            self.objective.read_student(*self.rows[:2])

    def teacher(self) -> None:
        with self.autocast():
            self.objective.read_teacher(*self.rows[:2])


def seconds(run: Callable[[], Any], device: str) -> tuple[float, float]:
    """(until the device is done, until the host has asked for all) of a call; medians."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    found = []
    for number in range(REPEATS + WARM):
        wait()
        start = time.perf_counter()
        run()
        asked = time.perf_counter() - start
        wait()
        if number >= WARM:
            found.append((time.perf_counter() - start, asked))
    done, host = zip(*found, strict=True)
    return statistics.median(done), statistics.median(host)


def measure(step: MicroStep, shape: str, rows: int, length: int) -> dict[str, Any]:
    row: dict[str, Any] = {"shape": shape, "rows": rows, "length": length}
    parts = {"student": step.student, "teacher": step.teacher, "forward": step.forward, "micro-step": step}
    for name, run in (*parts.items(), ("update", step.update)):
        done, host = seconds(run, step.device)
        row[f"{name} ms"], row[f"{name} host ms"] = 1e3 * done, 1e3 * host
    row["tokens/s"] = rows * length / (row["micro-step ms"] + row["update ms"]) * 1e3
    if step.device == "cuda":
        row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def profile(step: MicroStep, top: int) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    for _ in range(2):
        step()
    with record(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
    print(f"# {sum(e.self_device_time_total for e in events) / 1e3:.1f} ms on the device, "
          f"{sum(e.count for e in events)} launches")  # fmt: skip
    for e in events[:top]:
        print(f"{e.self_device_time_total / 1e3:8.2f} ms {e.count:5d}×  {e.key[:150]}", flush=True)


def stamp(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__, "date": datetime.date.today().isoformat()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "profile"])
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--rows", type=int, nargs="+", default=[16], help="sequences of a micro-batch")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--eager", action="store_true", help="without torch.compile around the attention")
    parser.add_argument("--top", type=int, default=45, help="kernels that the profile names")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for rows in given.rows:
        step = MicroStep(given.shape, rows, given.length, device)
        with ExitStack() as stack:
            for features in () if given.eager else (step.objective.student_features, step.objective.teacher_features):
                stack.enter_context(compiled_layers(features.model))
            report(step, given, rows)
        del step
        if device == "cuda":
            torch.cuda.empty_cache()


def report(step: MicroStep, given: argparse.Namespace, rows: int) -> None:
    if given.what == "profile":
        profile(step, given.top)
        return
    row = stamp(step.device) | {"compiled": not given.eager} | measure(step, given.shape, rows, given.length)
    print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    if given.out:
        with given.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
