"""Where a training step's time goes: distillation of a known shape with random weights, on one GPU.

    python benchmarks/training.py time --rows 16 32         # tokens a second of whole micro-steps, and of their parts
    python benchmarks/training.py profile                   # the kernels of one micro-step, and what the host waits for
    python benchmarks/training.py graph                     # a micro-step as one CUDA graph: is it right, and how fast

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
from layer import kernels

from kernelize import micro_graph
from kernelize.compiled import compiled_layers
from kernelize.data import Row
from kernelize.objectives import Distil
from kernelize.plan import ConversionPlan
from kernelize.recipe import DistilWeights, load_recipe
from kernelize.runtime.layout import whole_rows
from kernelize.runtime.modeling import kernelize_model
from kernelize.runtime.spec import KernelSpec
from kernelize.shapes import SHAPES, random_model

WARM, REPEATS = 2, 4


class MicroStep:
    """One micro-batch of a distillation, again and again."""

    def __init__(self, shape: str, rows: int, length: int, device: str, changes: dict[str, Any]):
        gpu = device == "cuda"
        teacher = random_model(shape, device=device)
        spec = KernelSpec.from_dict(load_recipe("default").kernel | changes)
        self.features = spec.feature_dim
        plan = ConversionPlan.uniform(spec, teacher.config.num_hidden_layers)
        student = kernelize_model(copy.deepcopy(teacher), list(plan.layers)).float().to(device).train()
        teacher = teacher.to(torch.bfloat16 if gpu else torch.float32).requires_grad_(False)
        self.objective, self.device = Distil(student, teacher, DistilWeights()), device
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=gpu)
        self.size, self.rows = (rows, length), self.batch(rows, length)
        self.counts = torch.tensor([float(rows * length), 1.0], device=device)

    def batch(self, rows: int, length: int) -> Row:
        ids = torch.randint(0, self.objective.model.config.vocab_size, (rows, length), device=self.device)
        positions = torch.arange(length, device=self.device).expand(rows, -1)
        return Row(ids, positions, ids, torch.zeros_like(ids, dtype=torch.bool))

    def autocast(self) -> Any:
        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()

    def forward(self) -> torch.Tensor:
        with self.autocast(), whole_rows():
            return self.objective(*self.rows, self.counts).loss

    def micro(self, rows: Row, counts: torch.Tensor) -> torch.Tensor:
        """As the training loop's: adds the gradients, and gives loss and terms."""
        with self.autocast():
            losses = self.objective(*rows, counts)
        losses.loss.backward()
        return torch.cat((losses.loss.detach()[None], losses.terms / counts[0]))

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.objective.model.parameters() if p.requires_grad]

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


def gradients_of(step: MicroStep, run: Callable[[Row, torch.Tensor], torch.Tensor], rows: Row) -> list[torch.Tensor]:
    """[losses, all gradients as one vector] of a micro-step."""
    step.optimizer.zero_grad()
    with whole_rows():
        losses = run(rows, step.counts)
    return [losses.float(), torch.cat([p.grad.flatten() for p in step.parameters if p.grad is not None])]


def difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> dict[str, float]:
    """How far losses and gradients are apart, relative to their norms."""
    parts = zip(("loss", "gradient"), found, expected, strict=True)
    return {name: float((a - b).norm() / b.norm()) for name, a, b in parts}


def graph(step: MicroStep, tell: Callable[[dict[str, Any]], None]) -> None:
    """Rows of what a captured micro-step computes, beside the eager one, for two batches and after the weights have
    changed; then of what each takes.

    Two eager runs differ as well, by the order of atomic additions: a replay must not differ by more than that.
    SystemExit where it is not captured.
    """
    batches = [step.batch(*step.size) for _ in range(2)]
    expected = [gradients_of(step, step.micro, rows) for rows in batches]
    for number, rows in enumerate(batches):
        tell({"eager again, batch": number} | difference(gradients_of(step, step.micro, rows), expected[number]))
    tell({"batch": "1 against 0"} | difference(*expected))
    tell({"micro-step": "eager"} | timed(step, step.micro, batches[0]))
    before = [parameter.detach().clone() for parameter in step.parameters]
    changed(step)
    later = [gradients_of(step, step.micro, rows) for rows in batches]  # all that is eager before a graph takes memory
    for number in range(len(batches)):
        tell({"other weights against before": number} | difference(later[number], expected[number]))
    after = assigned(step, before)
    steps = captured(step, batches[0])

    def run(rows: Row, counts: torch.Tensor) -> torch.Tensor:
        return steps(rows, counts, True)

    for number, rows in enumerate(batches):
        tell({"graph, batch": number} | difference(gradients_of(step, run, rows), expected[number]))
    assigned(step, after)
    for number, rows in enumerate(batches):
        tell({"graph, other weights, batch": number} | difference(gradients_of(step, run, rows), later[number]))
    tell({"micro-step": "graph"} | timed(step, run, batches[0]))
    if step.device == "cuda":
        tell({"peak GB": torch.cuda.max_memory_allocated() / 1e9, "reserved GB": torch.cuda.memory_reserved() / 1e9})


def captured(step: MicroStep, rows: Row) -> micro_graph.MicroSteps:
    """The step's graph. SystemExit, with the reason, where there is none."""
    told: list[dict[str, Any]] = []
    recorder = micro_graph.RECORDERS[step.device]()
    steps = micro_graph.MicroSteps(step.micro, step.parameters, recorder, told.append)
    steps.stepped()
    for _ in range(micro_graph.WARM_UPS + 1):
        gradients_of(step, lambda rows, counts: steps(rows, counts, True), rows)
    if [event.get("micro_batch") for event in told] != [step.size[0]]:
        raise SystemExit(f"not captured: {told}")
    return steps


def changed(step: MicroStep) -> None:
    """Other weights, in place: as the optimizer leaves them, and far enough to be seen."""
    with torch.no_grad():
        for parameter in step.parameters:
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))


def assigned(step: MicroStep, values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gives the weights these values, in place, and back those that they had."""
    with torch.no_grad():
        had = [parameter.detach().clone() for parameter in step.parameters]
        for parameter, value in zip(step.parameters, values, strict=True):
            parameter.copy_(value)
    return had


def timed(step: MicroStep, run: Callable[[Row, torch.Tensor], torch.Tensor], rows: Row) -> dict[str, float]:
    with whole_rows():
        done, host = seconds(lambda: run(rows, step.counts), step.device)
    return {"ms": 1e3 * done, "host ms": 1e3 * host}


def profile(step: MicroStep, top: int) -> None:
    for _ in range(2):
        step()
    events = kernels(step, 1)
    print(f"# {sum(e.self_device_time_total for e in events) / 1e3:.1f} ms on the device, "
          f"{sum(e.count for e in events)} launches")  # fmt: skip
    for e in events[:top]:
        print(f"{e.self_device_time_total / 1e3:8.2f} ms {e.count:5d}×  {e.key[:150]}", flush=True)


def stamp(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__, "date": datetime.date.today().isoformat()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "profile", "graph"])
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--rows", type=int, nargs="+", default=[16], help="sequences of a micro-batch")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--features", type=int, help="of the memory, by default the recipe's")
    parser.add_argument("--eager", action="store_true", help="without torch.compile around the attention")
    parser.add_argument("--top", type=int, default=45, help="kernels that the profile names")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.what == "graph" and device not in micro_graph.RECORDERS:
        raise SystemExit("graph: there is no GPU here")
    changes = {"feature_dim": given.features} if given.features else {}
    for rows in given.rows:
        step = MicroStep(given.shape, rows, given.length, device, changes)
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
    if given.what == "graph":
        about = {"shape": given.shape, "rows": rows, "length": given.length}
        about |= {"compiled": not given.eager, "features": step.features}
        graph(step, lambda row: put(stamp(step.device) | about | row, given.out))
        return
    about = {"compiled": not given.eager, "features": step.features}
    row = stamp(step.device) | about | measure(step, given.shape, rows, given.length)
    put(row, given.out)


def put(row: dict[str, Any], out: Path | None) -> None:
    """Prints a row, and appends it to the file `out`."""
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    if out:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
