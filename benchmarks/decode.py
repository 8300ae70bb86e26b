"""Decoding on one GPU: does the CUDA graph write what the eager step writes, and how long does a token take.

    python benchmarks/decode.py check                   # graph = eager, tiny models of several families
    python benchmarks/decode.py kernel                  # the step's kernels against the reference, and their time
    python benchmarks/decode.py time --shape llama3-8b  # milliseconds a token, eager and as a graph
    python benchmarks/decode.py profile --shape llama3-8b --length 131072   # the kernels of a token, both ways

`--out FILE` appends the rows as JSON lines, with device, versions and date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
import traceback
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from layer import graphed, kernels, layer, milliseconds, relative, tokens

from kernelize.decode import Decoder, Sampling, prefill
from kernelize.runtime import fused_step, reference
from kernelize.runtime.attention import KernelAttention
from kernelize.runtime.modeling import kernelize_model
from kernelize.runtime.spec import KernelSpec
from kernelize.shapes import SHAPES, random_model

FAMILIES = ("llama", "gpt2", "qwen3", "gptj", "gpt_neox", "phi3", "olmo2")
SPECS = {
    "mixed": KernelSpec(window=16, block=8, slots=12, sinks=2, feature_dim=16),
    "aging": KernelSpec(window=16, block=8, slots=12, sinks=2, feature_dim=16, aging=50),
    "keydiff": KernelSpec(window=16, block=8, slots=12, sinks=2, feature_dim=16, policy="keydiff"),
    "learned": KernelSpec(window=16, block=8, slots=12, sinks=2, feature_dim=16, policy="learned"),
    "delta": KernelSpec(window=16, block=8, slots=12, sinks=2, feature_dim=16, policy="attention",
                        rule="gated_delta", decay="gated"),
    "favor": KernelSpec(window=16, block=8, slots=12, sinks=2, feature_map="favor", feature_dim=16),
    "no memory": KernelSpec(window=16, block=8, slots=12, sinks=2, feature_map="none", policy="attention"),
}  # fmt: skip


def agree(name: str, model, ids: torch.Tensor, mask: torch.Tensor | None, tokens: int) -> dict:
    model.generation_config.eos_token_id = None
    graph, eager = Decoder(model), Decoder(model, graph=False)
    rows = {"what": name, "rows": ids.shape[0]}
    same = [bool(torch.equal(*(d.write(x, m, max_new_tokens=tokens) for d in (graph, eager))))
            for x, m in ((ids, mask), (ids[:, 13:], None if mask is None else mask[:, 13:]))]  # fmt: skip
    return {**rows, "graph": graph.eager or "captured", "first prompt": same[0], "second prompt": same[1],
            "ok": all(same) and graph.eager is None}  # fmt: skip


def check(keep) -> None:
    from families import tiny_student

    generator = torch.Generator().manual_seed(0)
    for name in FAMILIES:
        ids = torch.randint(1, 257, (3, 70), generator=generator).cuda()
        mask = torch.ones_like(ids)
        mask[0, :9] = 0
        model = tiny_student(name).cuda()
        for x, m in ((ids[:1], None), (ids, mask)):
            keep(agree(f"{name} float32", model, x, m, 100))
    for name, spec in SPECS.items():
        keep(agree(f"llama {name}", tiny_student("llama", spec).cuda(), ids, mask, 100))
    sampled = Decoder(tiny_student("llama").cuda(), Sampling(0.8, 20, 0.9))
    text = sampled.write(ids, max_new_tokens=60)
    again = sampled.write(ids, max_new_tokens=60)
    keep({"what": "sampling", "graph": sampled.eager or "captured", "differs from call to call":
          not torch.equal(text, again), "ok": sampled.eager is None and not torch.equal(text, again)})  # fmt: skip


KERNEL_CASES = [
    ("llama3-8b", {"slots": 128}, (1, 32, 8, 128), torch.bfloat16),
    ("llama3-8b, 16 rows", {"slots": 128}, (16, 32, 8, 128), torch.bfloat16),
    ("llama3-8b, fp16", {"slots": 128}, (1, 32, 8, 128), torch.float16),
    ("smollm2-135m", {}, (1, 9, 3, 64), torch.bfloat16),
    ("smollm2-135m, float32", {}, (2, 9, 3, 64), torch.float32),
    ("attention", {"policy": "attention"}, (1, 9, 3, 64), torch.bfloat16),
    ("gated, no aging", {"decay": "gated", "aging": 0}, (2, 8, 2, 80), torch.bfloat16),
    ("block 1", {"block": 1, "slots": 20, "window": 32}, (1, 4, 2, 64), torch.bfloat16),
    ("block 64, 512 slots", {"block": 64, "slots": 512, "window": 256}, (1, 4, 2, 64), torch.bfloat16),
    ("no memory", {"feature_map": "none", "policy": "attention"}, (1, 8, 2, 128), torch.bfloat16),
    ("heads of 256, 64 features", {"feature_dim": 64}, (1, 4, 1, 256), torch.bfloat16),
]


def holders(spec: KernelSpec, state) -> torch.Tensor:
    """The positions held in each share, sorted: [B, Hk, slots]."""
    first, parts = spec.sinks + spec.ring, []
    for _, capacity in spec.shares:
        parts.append(state.pos[:, :, first : first + capacity].sort(-1)[0])
        first += capacity
    return torch.cat(parts, -1)


@torch.no_grad()
def check_kernel(case: tuple) -> dict:
    """Each step from the reference's own state; then a chain in place, and what a step takes inside a graph."""
    name, fields, (B, H, Hk, D), dtype = case
    spec = KernelSpec(**{"aging": 1024, **fields})
    attention = layer(spec, H, Hk, D) if spec.has_memory else KernelAttention(spec, H, Hk, D).cuda()
    steps = 2 * spec.positions + 5 * spec.block
    if spec.decay == "gated":
        torch.nn.init.normal_(attention.decay_weight, std=0.1)
    kernel, q, k, v = attention.kernel(D**-0.5), *tokens(B, H, Hk, D, steps, dtype)
    state = reference.empty_state(spec, k, v)
    chain, worst, memory, differ = state.map(torch.clone), 0.0, 0.0, 0
    for t in range(steps):
        now = [x[:, :, t : t + 1] for x in (q, k, v)]
        got, after = fused_step.step(*now, kernel, state)
        _, chain = fused_step.step(*now, kernel, chain, in_place=True)
        expected, state = reference.step(*now, kernel, state)
        worst, memory = max(worst, relative(got.y, expected.y)), max(memory, relative(after.memory, state.memory))
        differ += int((holders(spec, after) != holders(spec, state)).sum())
    apart = int((holders(spec, chain) != holders(spec, state)).sum())
    row = {
        "kernel": name,
        "steps": steps,
        "y": worst,
        "memory": memory,
        "holders that differ": differ,
        "in place, at the end": apart,
        "of": holders(spec, state).numel(),
        "seen": chain.seen.tolist() == [steps] * B,
    }
    for what, seen in (("step ms", spec.ring * 64 + 1), ("leave ms", spec.ring * 64)):
        chain.seen.fill_(seen)

        def run(seen=seen):
            fused_step.step(*now, kernel, chain, in_place=True)
            chain.seen.fill_(seen)

        row[what] = milliseconds(graphed(lambda: [run() for _ in range(32)])) / 32
    row["fill ms"] = milliseconds(graphed(lambda: [chain.seen.fill_(1) for _ in range(32)])) / 32
    row["ok"] = worst < (1e-2 if dtype != torch.float32 else 1e-4) and memory < 1e-2 and row["seen"]
    return row


def check_kernels(keep) -> None:
    for case in KERNEL_CASES:
        try:
            keep(check_kernel(case))
        except Exception as error:
            keep({"kernel": case[0], "ok": False, "error": traceback.format_exc(limit=-4)[-1200:]})
            if "CUDA error" in str(error):  # nothing works after an illegal access
                raise


@torch.no_grad()
def time_shape(shape: str, batches: list[int], tokens: int, keep) -> None:
    model = random_model(shape, device="cuda", dtype=torch.bfloat16)
    spec = KernelSpec(slots=128, aging=1024)
    model = kernelize_model(model, [spec] * model.config.num_hidden_layers)
    for rows in batches:
        ids = torch.randint(5, 250, (rows, 512), device="cuda")
        row = {"what": shape, "rows": rows}
        for graph in ("eager", "graph", "compiled"):
            decoder = Decoder(model, graph=False)
            step = decoder.start(*prefill(model, ids))
            if graph != "eager":
                step.capture(graph == "compiled")
            for _ in range(3):
                step.run()
            torch.cuda.synchronize()
            n, start = 16 if graph == "eager" else tokens, time.perf_counter()
            for _ in range(n):
                step.run()
            torch.cuda.synchronize()
            row[f"{graph} ms"] = round((time.perf_counter() - start) / n * 1e3, 3)
            print(row, flush=True)
        row["state MB a row"] = round(sum(x.state.nbytes for x in step.cache.layers) / rows / 1e6, 1)
        keep(row)
        del decoder, step
        torch.cuda.empty_cache()


@torch.no_grad()
def profile_shape(shape: str, length: int, tokens: int, top: int, keep) -> None:
    """The kernels of a token's graph after a prompt of that length: microseconds and launches a token."""
    model = random_model(shape, device="cuda", dtype=torch.bfloat16)
    model = kernelize_model(model, [KernelSpec(slots=128, aging=1024)] * model.config.num_hidden_layers)
    ids = torch.randint(5, 250, (1, length), device="cuda")
    for compiled in (False, True):
        step = Decoder(model, graph=False).start(*prefill(model, ids))
        step.capture(compiled)
        for _ in range(3):
            step.run()
        events = kernels(step.run, tokens)
        whole = {"us": sum(e.self_device_time_total for e in events), "launches": sum(e.count for e in events)}
        keep({"what": shape, "length": length, "compiled": compiled, **{k: v / tokens for k, v in whole.items()}})
        for e in events[:top]:
            print(f"{e.self_device_time_total / tokens:8.1f} us {e.count / tokens:6.1f}×  {e.key[:120]}", flush=True)


def stamp() -> dict:
    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "date": str(datetime.date.today()),
            "transformers": transformers.__version__}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "kernel", "time", "profile"])
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["smollm2-135m", "llama3-8b"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--length", type=int, default=512, help="of the prompt, for a profile")
    parser.add_argument("--top", type=int, default=30, help="kernels that a profile names")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()

    def keep(row: dict) -> None:
        print(json.dumps(row), flush=True)
        if given.out:
            with given.out.open("a") as file:
                file.write(json.dumps({**stamp(), **row}) + "\n")

    if given.what == "check":
        check(keep)
    elif given.what == "kernel":
        check_kernels(keep)
    elif given.what == "profile":
        for shape in given.shape:
            profile_shape(shape, given.length, given.tokens, given.top, keep)
    else:
        for shape in given.shape:
            time_shape(shape, given.batch, given.tokens, keep)


if __name__ == "__main__":
    main()
