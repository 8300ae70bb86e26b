"""One layer on one GPU: are the fused kernels right, and how long do they take beside their peers.

    python benchmarks/layer.py check        # against a dense float64 computation, forward and gradients
    python benchmarks/layer.py time         # milliseconds, beside softmax attention and flash-linear-attention
    python benchmarks/layer.py profile      # where the time goes
    python benchmarks/layer.py tune         # other ways to launch each kernel

`--out FILE` appends the rows as JSON lines, with device, versions and date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kernelize.runtime import chunked, fused
from kernelize.runtime.attention import KernelAttention
from kernelize.runtime.spec import KernelSpec
from kernelize.runtime.state import Kernel, Rotation, betas, features, log_decays, logits, unit

DENSE = 2048  # longest sequence of which every query is checked
PARTS = 3  # in which a call's kernels are compiled
ROWS = 48  # queries that are checked of a longer one
TOLERANCE = {torch.bfloat16: (1e-2, 2e-2), torch.float16: (1e-2, 2e-2), torch.float32: (1e-4, 1e-3)}
BFLOAT, HALF, FULL = torch.bfloat16, torch.float16, torch.float32

# (name, spec, (B, H, Hk, D), T, dtype)
LLAMA = {"feature_dim": 128, "window": 64, "sinks": 4, "slots": 128, "block": 16}
CASES = [
    ("llama mixed", dict(LLAMA), (1, 8, 2, 128), 2048, BFLOAT),
    ("llama attention", {**LLAMA, "policy": "attention"}, (1, 8, 2, 128), 1999, BFLOAT),
    ("llama fp16", dict(LLAMA), (1, 8, 2, 128), 2048, HALF),
    ("llama fp32", dict(LLAMA), (1, 4, 1, 128), 1500, FULL),
    ("smollm", {**LLAMA, "slots": 176}, (2, 9, 3, 64), 2048, BFLOAT),
    ("smollm 64 features", {**LLAMA, "slots": 176, "feature_dim": 64}, (2, 9, 3, 64), 2048, BFLOAT),
    ("smollm fp32 64 features", {**LLAMA, "slots": 176, "feature_dim": 64}, (2, 9, 3, 64), 1111, FULL),
    ("smollm fp32", {**LLAMA, "slots": 176}, (2, 9, 3, 64), 1111, FULL),
    ("smollm beyond reach", {**LLAMA, "slots": 176, "reach": 300}, (2, 9, 3, 64), 2048, BFLOAT),
    ("smollm fp32 beyond reach", {**LLAMA, "slots": 176, "reach": 300}, (2, 9, 3, 64), 1111, FULL),
    ("two heads a key head", dict(LLAMA), (1, 4, 2, 128), 1200, BFLOAT),
    ("heads of 80", {**LLAMA, "feature_dim": 64}, (1, 4, 4, 80), 1000, BFLOAT),
    ("heads of 96", {**LLAMA, "feature_dim": 96}, (1, 8, 1, 96), 777, BFLOAT),
    ("heads of 96 fp32", {**LLAMA, "feature_dim": 96}, (1, 4, 2, 96), 777, FULL),
    ("heads of 256", {**LLAMA, "feature_dim": 256}, (1, 4, 2, 256), 1024, BFLOAT),
    ("block 1", {**LLAMA, "block": 1, "slots": 20}, (1, 4, 2, 64), 700, BFLOAT),
    ("block 64, window 256", {**LLAMA, "block": 64, "window": 256}, (1, 4, 2, 128), 2000, BFLOAT),
    ("no slots, no decay", {**LLAMA, "slots": 0, "decay": "none"}, (1, 4, 2, 128), 2048, BFLOAT),
    ("gated decay", {**LLAMA, "decay": "gated"}, (1, 8, 2, 128), 2048, BFLOAT),
    ("delta rule", {**LLAMA, "policy": "attention", "rule": "delta", "decay": "none"}, (1, 4, 2, 128), 700, BFLOAT),
    (
        "gated delta rule",
        {**LLAMA, "policy": "attention", "rule": "gated_delta", "decay": "gated"},
        (1, 4, 2, 128),
        700,
        BFLOAT,
    ),
    ("delta rule fp32", {**LLAMA, "policy": "attention", "rule": "gated_delta"}, (1, 3, 1, 64), 700, FULL),
    ("forecast", {**LLAMA, "policy": "attention+forecast", "aging": 1024}, (1, 8, 2, 128), 2048, BFLOAT),
    ("slots by KV head", {**LLAMA, "head_slots": (216, 40)}, (1, 8, 2, 128), 2048, BFLOAT),
    ("llama 32k", dict(LLAMA), (1, 8, 2, 128), 32768, BFLOAT),
    ("llama 262k", dict(LLAMA), (1, 4, 1, 128), 262144, BFLOAT),
]


def layer(spec: KernelSpec, heads: int, kv_heads: int, head_dim: int, device: str = "cuda") -> KernelAttention:
    """A layer with random maps, a memory that matters and half-lives of 100 to 10,000 tokens."""
    generator = torch.Generator().manual_seed(0)
    attention = KernelAttention(spec, heads, kv_heads, head_dim)
    for module in (attention.map_q, attention.map_k, attention):
        module.reset()
    with torch.no_grad():
        for weight in (attention.map_q.weight, attention.map_k.weight):
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
        attention.log_gate += 3.0 + 0.5 * torch.randn(heads, generator=generator)
        if spec.decay != "none":
            attention.log_rate += 2.3 * (torch.rand(kv_heads, generator=generator) - 0.3)
        if spec.decay == "gated":
            attention.decay_weight += 0.05 * torch.randn(attention.decay_weight.shape, generator=generator)
    return attention.to(device)


def tokens(B: int, H: int, Hk: int, D: int, T: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """q as a model makes it, [B, T, H, D] transposed; likewise k and v."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = [(B, T, heads, D) for heads in (H, Hk, Hk)]
    return [torch.randn(s, device="cuda", generator=generator).to(dtype).transpose(1, 2) for s in shapes]


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """‖got − expected‖ / ‖expected‖; NaN if either has one."""
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


# --- check --------------------------------------------------------------------------------------------------


def dense(q, k, v, kernel, death, rows):
    """y [B, H, len(rows), D] in float64, by the definition, given who holds a slot until when (death [B, Hk, T])."""
    spec, (B, H, _, D), (_, Hk, T, _) = kernel.spec, q.shape, k.shape
    x, at = torch.arange(T, device=q.device), rows[:, None]
    leaves = x // spec.block + spec.back + 1
    block = at // spec.block
    left = (leaves <= block) & (x >= spec.sinks)
    holds = left & (death[:, :, None] > block) if spec.slots else left & False
    exact = ((x <= at) & ~left) | holds  # [B, Hk, rows, T]
    memory = left & ~holds
    group = q[:, :, rows].view(B, Hk, H // Hk, len(rows), D)
    s = (group @ k[:, :, None].mT) * kernel.scaling
    s = far_logits(s, group, k[:, :, None], rows, x, kernel)
    s = s.masked_fill(~exact.expand(B, Hk, -1, -1)[:, :, None], -torch.inf)
    top = s.amax(-1, keepdim=True).detach()
    phi_q = features(kernel, kernel.map_q, q, x[None, None])[:, :, rows].view(B, Hk, H // Hk, len(rows), -1)
    phi_k = features(kernel, kernel.map_k, k, x[None, None])
    weight, clock = phi_q @ phi_k[:, :, None].mT, k.new_zeros(B, Hk, T)
    if kernel.log_rate is not None:
        clock = (log_decays(kernel, k, v).expand(B, Hk, T) * (x >= spec.sinks)).cumsum(2)
        latest = ((block - spec.back) * spec.block - 1).clamp(min=0)  # the last token that has left by then
        age = clock[:, :, latest] - clock[:, :, None]  # [B, Hk, rows, T]
        weight = weight * age.clamp(max=0).exp()[:, :, None]
    weight = weight * memory.expand(B, Hk, -1, -1)[:, :, None] * kernel.log_gate.exp().view(Hk, -1, 1, 1)
    near, far = (s - top).exp(), weight * (-top).exp()
    total = near.sum(-1, keepdim=True) + far.sum(-1, keepdim=True)
    if spec.is_delta:
        death = death if spec.slots else leaves.expand(B, Hk, T)
        answers = delta_answers(unit(phi_q), unit(phi_k), v, betas(kernel, k), clock, death, spec, rows)
        y = (near @ v[:, :, None] + far.sum(-1, keepdim=True) * answers) / total
    else:
        y = (near + far) @ v[:, :, None] / total
    return y.view(B, H, len(rows), D)


def delta_answers(phi_q, phi_k, v, beta, clock, death, spec, rows):
    """What the memory of the delta rule answers [B, Hk, G, rows, D], by its definition, token after token."""
    return torch.stack([torch.stack([
        one_head(*(x[b, h] for x in (phi_q, phi_k, v, beta, clock, death)), spec, rows) for h in range(v.shape[1])
    ]) for b in range(len(v))])  # fmt: skip


def one_head(phi_q, phi_k, v, beta, clock, death, spec, rows):
    """phi_q [G, rows, F], phi_k [T, F], v [T, D], beta, clock and death [T] -> [G, rows, D]."""
    memory, then, begin, found = v.new_zeros(phi_k.shape[-1], v.shape[-1]), clock[0] * 0, clock[0] * 0, []
    dies = death.tolist()
    for block in range(int(rows[-1]) // spec.block + 1):
        for j in [x for x in range(block * spec.block) if dies[x] == block and x >= spec.sinks]:
            now = torch.minimum(begin, clock[j])
            error = (now - clock[j]).exp() * v[j] - phi_k[j] @ (memory * (now - then).exp())
            memory, then = memory * (now - then).exp() + torch.outer(phi_k[j], beta[j] * error), now
        gone = (block - spec.back) * spec.block  # so many tokens have left by now
        end = clock[gone - 1] if gone > 0 else begin
        found.append(phi_q[:, rows // spec.block == block] @ (memory * (end - then).exp()))
        begin = end
    return torch.cat(found, 1)


def far_logits(near, q, k, q_pos, k_pos, kernel):
    """Scores `near` [..., X, Y] of q [..., X, D] and k [..., Y, D], but with keys beyond `reach` standing there."""
    reach = kernel.spec.reach
    if not reach or kernel.rotation is None:
        return near
    q, k = kernel.rotation.turn(q, q_pos, reach), kernel.rotation.turn(k, k_pos, 0)
    return torch.where(q_pos[..., :, None] - k_pos[..., None, :] > reach, logits(q, k, kernel), near)


def lives_of(q, k, v, kernel):
    """(death [B, Hk, T], scores a share [B, Hk, T], applicants) as the fused kernels find them."""
    store = fused.fresh(q, k, v, kernel)
    phi_k, _ = fused.key_features(store, kernel)
    clock, end = fused.clocks(store, kernel)
    lives, scores = fused.select(store, kernel, fused.turned(store, kernel), phi_k, clock, end)
    return lives.death.view(k.shape[0], -1, lives.death.shape[1]), [s.view(k.shape[:3]) for s in scores.of_share]


def lifetimes_differ(kernel, death, scores, T):
    """Tokens whose death differs from chunked's on the same scores."""
    spec = kernel.spec
    if not spec.slots or T > DENSE:
        return 0
    blocks = -(-T // chunked.TILE) * (chunked.TILE // spec.block)
    x = torch.arange(T, device=death.device)
    arrive = torch.where(x >= spec.sinks, x // spec.block + spec.back + 1, blocks).expand_as(death)
    arrive = torch.where(arrive <= (T - 1) // spec.block, arrive, blocks)
    pad = spec.slots  # chunked's store begins with the old slots
    score = torch.nn.functional.pad(torch.stack(scores, -1), (0, 0, pad, 0))
    arrive = torch.nn.functional.pad(arrive, (pad, 0), value=blocks)
    expected = chunked.lifetimes(spec, score, arrive, blocks)[-1][:, :, pad:]
    return int((expected != death).sum())


def kernel_of(attention: KernelAttention, D: int) -> Kernel:
    """With rotary positions where keys have to be moved among them."""
    kernel, pairs = attention.kernel(D**-0.5), torch.arange(0, D, 2, device="cuda") / D
    return kernel._replace(rotation=Rotation(1e4**-pairs, False)) if kernel.spec.reach else kernel


def check(case: tuple) -> dict:
    name, fields, (B, H, Hk, D), T, dtype = case
    spec = KernelSpec(**fields)
    attention = layer(spec, H, Hk, D)
    leaves = [x.requires_grad_() for x in tokens(B, H, Hk, D, T, dtype)]
    kernel = kernel_of(attention, D)
    refused = fused.supports(kernel, *leaves)
    if refused:
        return {"case": name, "T": T, "dtype": str(dtype).split(".")[1], "ok": True, "refused": refused}
    with torch.no_grad():
        given = kernel._replace(spec=spec.spread) if spec.is_packed else kernel
        death, scores = lives_of(*leaves, given)
        differ = lifetimes_differ(given, death, scores, T)
    rows = torch.arange(T, device="cuda")
    if T > DENSE:
        rows = torch.randperm(T, device="cuda", generator=torch.Generator("cuda").manual_seed(1))[:ROWS].sort()[0]
        rows[-1] = T - 1
    out, _ = fused.attend(*leaves, kernel)
    with torch.no_grad():
        read = relative(fused.attend(*leaves, kernel, branches=False)[0].y, out.y)
    weight = torch.randn(B, H, len(rows), D, device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    (out.y[:, :, rows].float() * weight).sum().backward()
    got = [x.grad for x in leaves] + [p.grad for p in attention.parameters()]

    exact = attention.double()
    for p in exact.parameters():
        p.grad = None
    wide = [x.detach().double().requires_grad_() for x in leaves]
    y = dense(*wide, kernel_of(exact, D), death, rows)
    (y * weight).sum().backward()
    expected = [x.grad for x in wide] + [p.grad for p in exact.parameters()]
    names = ["q", "k", "v"] + [n for n, _ in attention.named_parameters()]
    names = [n for n, x in zip(names, expected, strict=True) if x is not None]  # a forecast has a loss of its own
    got, expected = ([x for x in xs if x is not None] for xs in (got, expected))
    grads = {n: relative(a, b) for n, a, b in zip(names, got, expected, strict=True)}
    forward = relative(out.y[:, :, rows], y)
    allowed = TOLERANCE[dtype]
    passed = max(forward, read) <= allowed[0] and max(grads.values()) <= allowed[1] and not differ
    split = halves(leaves, kernel, out.y) if T <= DENSE else 0.0
    return {"case": name, "T": T, "dtype": str(dtype).split(".")[1], "ok": passed, "forward": forward,
            "prefill": read, "lifetimes that differ": differ, "split in two": split, **grads}  # fmt: skip


@torch.no_grad()
def halves(leaves, kernel, y) -> float:
    """The same sequence in two calls: what differs. Sets may, where a score is a near-tie."""
    cut = leaves[0].shape[2] * 3 // 7
    kernel = kernel._replace(log_gate=kernel.log_gate.float(), log_rate=None if kernel.log_rate is None else
                             kernel.log_rate.float())  # fmt: skip
    first, state = fused.attend(*(x[:, :, :cut] for x in leaves), kernel)
    second, _ = fused.attend(*(x[:, :, cut:] for x in leaves), kernel, state)
    return relative(torch.cat([first.y, second.y], 2), y)


def safely(case: tuple) -> dict:
    start = time.time()
    try:
        return {**check(case), "seconds": time.time() - start}
    except Exception:
        return {"case": case[0], "ok": False, "error": traceback.format_exc(limit=-6)[-1500:]}


def compile_part(call: tuple, part: int) -> int:
    """Compiles every PARTS-th of the kernels that a call of a layer launches into Triton's cache: how many."""
    from compiled import launches_of, layer_call, warmed

    fields, shape, T, dtype, train = call
    launches, _ = launches_of(layer_call(fields, shape, T, train, dtype=dtype))
    if train:
        launches += launches_of(layer_call(fields, shape, T, False, dtype=dtype))[0]
    return warmed(launches, part, PARTS)


def compile_all(pool: ProcessPoolExecutor, calls: list[tuple]) -> None:
    """Compiling takes longest, and one process compiles one kernel after the other."""
    start = time.time()
    found = [pool.submit(compile_part, call, part) for call in calls for part in range(PARTS)]
    count = sum(job.result() for job in found)
    print(f"compiled {count} kernels in {time.time() - start:.0f} s", flush=True)


def check_all(only: str, workers: int, keep) -> None:
    cases = [c for c in CASES if only in c[0]]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        compile_all(pool, [(dict(fields), shape, T, dtype, True) for _, fields, shape, T, dtype in cases
                           if dtype != FULL])  # fmt: skip
        for row in pool.map(safely, cases):
            print(json.dumps({k: f"{v:.1e}" if isinstance(v, float) else v for k, v in row.items()}), flush=True)
            if "error" in row:
                print(row["error"], flush=True)
            keep(row)


# --- time ---------------------------------------------------------------------------------------------------


def milliseconds(f, budget: float = 0.4) -> float:
    """Median over calls, by device events, after a warm-up."""
    for _ in range(3):
        f()
    torch.cuda.synchronize()
    times, begin = [], time.time()
    while len(times) < 5 or (time.time() - begin < budget and len(times) < 100):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        f()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def graphed(f):
    """f as a CUDA graph: what remains without the host."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return graph.replay


SHAPE = (1, 32, 8, 128)  # of what `time` measures: B, H, Hk, D


# what stands for a policy, where more than that is asked for
NAMED = {"gated delta": {"policy": "attention", "rule": "gated_delta", "decay": "gated"}}


def fields_of(policy: str, slots: int) -> dict:
    return {**LLAMA, "slots": slots, **NAMED.get(policy, {"policy": policy})}


def ours(policy: str, slots: int, T: int, shape=SHAPE):
    B, H, Hk, D = shape
    attention = layer(KernelSpec(**fields_of(policy, slots)), H, Hk, D)
    return attention, tokens(B, H, Hk, D, T, BFLOAT)


def time_forward(row: dict, policy: str, slots: int, T: int, shape: tuple) -> dict:
    attention, qkv = ours(policy, slots, T, shape)
    kernel = attention.kernel(shape[3] ** -0.5)

    @torch.no_grad()
    def call(keep=False):
        return fused.attend(*qkv, kernel, branches=False, keep=keep)

    row["ms"] = milliseconds(call)
    row["ms with state"] = milliseconds(lambda: call(keep=True))
    if T <= 32768:
        row["ms graph"] = milliseconds(graphed(call))
    return row


def time_training(row: dict, policy: str, slots: int, T: int, shape: tuple) -> dict:
    attention, qkv = ours(policy, slots, T, shape)
    leaves = [x.requires_grad_() for x in qkv]
    up = torch.randn_like(qkv[0])

    def call():
        one_call(attention, leaves, up, True)

    row["ms fwd+bwd"] = milliseconds(call)
    row["ms fwd+bwd graph"] = milliseconds(graphed(call))
    return row


def softmax(backend: str, T: int, shape: tuple, train: bool):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.requires_grad_(train) for x in tokens(*shape, T, BFLOAT))
    up = torch.randn_like(q)

    def call():
        with sdpa_kernel([getattr(SDPBackend, backend)]):
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if train:
            torch.autograd.grad(y, (q, k, v), up)

    return call


def linear(T: int, shape: tuple, train: bool):
    from fla.ops.linear_attn import chunk_linear_attn

    q, k, v = (x.transpose(1, 2).contiguous() for x in tokens(*shape, T, BFLOAT))
    k, v = (x.repeat_interleave(shape[1] // shape[2], 2) for x in (k, v))  # it has no grouped heads
    q, k, v = (x.requires_grad_(train) for x in (q, k, v))
    up = torch.randn_like(q)

    def call():
        y, _ = chunk_linear_attn(q, k, v, normalize=False)
        if train:
            torch.autograd.grad(y, (q, k, v), up)

    return call


def peer(row: dict, make, *arguments) -> dict:
    key = "ms fwd+bwd" if arguments[-1] else "ms"
    try:
        row[key] = milliseconds(make(*arguments))
    except Exception as error:  # a missing or refusing peer is a row
        row["error"] = f"{type(error).__name__}: {error}"[:160]
    return row


def time_all(lengths: list[int], peers: bool, shape: tuple, keep) -> None:
    def add(row: dict) -> None:
        row |= {"features": LLAMA["feature_dim"], "shape": shape}
        torch.cuda.empty_cache()
        keep(row)
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)

    for T in lengths:
        for policy, slots in (("attention", 128), ("mixed", 128), ("mixed", 176), ("value", 0), ("gated delta", 128)):
            if T in (2048, 32768, 131072) or (policy, slots) == ("attention", 128):
                add(time_forward({"what": f"kernelize {policy} {slots}", "T": T}, policy, slots, T, shape))
        if peers:
            add(peer({"what": "fla chunk_linear_attn", "T": T}, linear, T, shape, False))
            if T <= 32768:
                add(peer({"what": "sdpa flash", "T": T}, softmax, "FLASH_ATTENTION", T, shape, False))
                add(peer({"what": "sdpa cudnn", "T": T}, softmax, "CUDNN_ATTENTION", T, shape, False))
    for T in [t for t in lengths if t in (2048, 32768)]:
        for policy, slots in (("attention", 128), ("mixed", 128), ("gated delta", 128)):
            add(time_training({"what": f"kernelize {policy} {slots}", "T": T}, policy, slots, T, shape))
        if peers:
            add(peer({"what": "fla chunk_linear_attn", "T": T}, linear, T, shape, True))
            add(peer({"what": "sdpa cudnn", "T": T}, softmax, "CUDNN_ATTENTION", T, shape, True))


# (module, kernel) -> what to try instead of its row of LAUNCH
FREE = {"registers": None}
FORWARD = {
    ("fused_exact", "exact"): [
        {"near": 0}, {"near": 64}, {"near": 64, "registers": 168}, {"tile": 64, "heads": 2, "warps": 4, "near": 0},
        {"tile": 64, "heads": 2, "warps": 4, "near": 64}, {"warps": 1, **FREE}, {"near": 0, "stages": 2},
        {"near": 0, "chunk": 32},
    ],
    ("fused_select", "mass"): [FREE, {"registers": 128}, {"tile": 64, "heads": 2, "warps": 2, **FREE},
                               {"warps": 2, **FREE}, {"tile": 64, "heads": 1, "warps": 4}],
    ("fused_memory", "states"): [FREE, {"chunk": 4096}, {"chunk": 16384, "warps": 8, "registers": 128},
                                 {"stages": 2}, {"stages": 4}],
}  # fmt: skip
MEMORY = {
    ("fused_memory", "mapped_memory"): [
        {"stages": 1}, {"stages": 1, "split": False}, {"stages": 1, "registers": 168}, {"stages": 3}, {"warps": 8},
        {"chunk": 4096},
    ],
}  # fmt: skip
RECALL = {("fused_memory", "recall"): [{"warps": 8}, {"chunk": 8192}, {"stages": 1}]}
TRAINING = {
    ("fused_exact", "query_grad"): [
        {"stages": 3}, {"stages": 1}, FREE, {"heads": 4, "registers": 128}, {"heads": 4, "registers": 128, "stages": 3},
        {"heads": 4, "warps": 1, **FREE}, {"tile": 64, "heads": 2, "warps": 4, "registers": 128},
        {"tile": 64, "heads": 1, "warps": 4, "stages": 3}, {"tile": 64, "heads": 1, "warps": 4},
    ],
    ("fused_exact", "window_grad"): [{"stages": 2}, {"stages": 3}, {"warps": 8}],
    ("fused_exact", "held_grad"): [{"chunk": 64, "warps": 4}, {"stages": 1}, {"stages": 3}, {"chunk": 32, "warps": 4}],
    ("fused_exact", "sink_grad"): [{"stages": 2}, {"stages": 4}, {"warps": 8}, {"warps": 2}],
    ("fused_memory", "phi_q_grad"): [{"warps": 8}, {"chunk": 8192}, {"stages": 1}, {"stages": 2}, {"stages": 3},
                                     {"stages": 1, "registers": 168}],
    ("fused_memory", "reverse_states"): [{"chunk": 4096}, {"registers": 168}, {"stages": 3},
                                         {"chunk": 16384, "warps": 8}],
    ("fused_memory", "key_grads"): [{"chunk": 4096}, {"stages": 1}, {"stages": 3}, {"warps": 8}],
    ("fused_memory", "phi_k_grad"): [{"warps": 8}, {"chunk": 8192}, {"stages": 1}],
    ("fused_memory", "value_grad"): [{"warps": 8}, {"chunk": 8192}, {"stages": 1}],
    ("fused_map", "hedgehog"): [{"chunk": 128}, {"chunk": 128, "warps": 8}, {"stages": 1}],
    ("fused_map", "matrix_grad"): [{"stages": 2}, {"stages": 4}, {"warps": 8}, {"chunk": 128}, {"chunk": 32}],
}  # fmt: skip
# what is tuned: as `time` measures it, and as a distillation of SmolLM2 trains
TUNED = {
    "prefill": (FORWARD | MEMORY, ("attention", 128, 131072, SHAPE), False),
    "training": (MEMORY | TRAINING, ("attention", 128, 32768, SHAPE), True),
    "small": (FORWARD | MEMORY | RECALL | TRAINING, ("mixed", 176, 2048, (16, 9, 3, 64)), True),
}


class Trial(NamedTuple):
    """One change of one kernel's launch."""

    what: str
    module: str
    name: str
    change: dict

    @contextmanager
    def applied(self):
        tables = vars(import_module(f"kernelize.runtime.{self.module}"))
        rows = [(tables[x], tables[x][self.name]) for x in ("LAUNCH", "SMALL", "MEDIUM") if x in tables]
        for table, before in rows:  # one of them is the one that is looked at
            table[self.name] = before._replace(**self.change)
        try:
            yield
        finally:
            for table, before in rows:
                table[self.name] = before


def tune(what: str, only: str, workers: int, keep) -> None:
    """Every kernel's launch: its registers and milliseconds, and by how much y and the gradients then differ."""
    variants, given, train = TUNED[what]
    trials = [Trial(what, module, name, change) for (module, name), others in variants.items() if only in name
              for change in ({}, *others)]  # fmt: skip
    features = LLAMA["feature_dim"]
    with ProcessPoolExecutor(workers, get_context("spawn"), take_features, (features,)) as pool:  # compiling is slow
        compiled = list(pool.map(compile_trial, trials))
    attention, qkv = ours(*given)
    leaves = [x.requires_grad_(train) for x in qkv]
    up = torch.randn_like(qkv[0])

    def call() -> list[torch.Tensor]:
        return one_call(attention, leaves, up, train)

    expected = call()
    for trial, found in zip(trials, compiled, strict=True):
        row = {
            "tune": what,
            "features": features,
            "kernel": trial.name,
            **trial.change,
            **found,
            **timed(trial, call, expected),
        }
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
        keep(row)


def take_features(features: int) -> None:
    LLAMA["feature_dim"] = features


def timed(trial: Trial, call, expected: list[torch.Tensor]) -> dict:
    try:
        with trial.applied():
            off = max(map(relative_there, call(), expected))
            return {"ms": kernel_ms(call, f"{trial.name}_kernel"), "off": off}
    except Exception as error:  # too much shared memory is a row
        return {"error": f"{type(error).__name__} {error}"[:120]}


def relative_there(got: torch.Tensor, expected: torch.Tensor) -> float:
    """`relative`, on the device and in float32."""
    return float((got.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))


def compile_trial(trial: Trial) -> dict:
    """Compiles its kernel as `tune` will launch it, into Triton's cache: registers, bytes spilled, programs at once."""
    from compiled import launches_of, layer_call, residents, resources

    _, (policy, slots, T, shape), train = TUNED[trial.what]
    try:
        with trial.applied():
            launches, _ = launches_of(layer_call(fields_of(policy, slots), shape, T, train))
            found = resources(next(x for x in launches if x.name == f"{trial.name}_kernel"))
        return {"registers used": found["registers"], "spilled": found["spilled"], "at once": residents(found)}
    except Exception as error:
        return {"compiled": f"{type(error).__name__} {error}"[:120]}


def one_call(attention, leaves, up, train: bool) -> list[torch.Tensor]:
    """y, and in training the gradients."""
    D = leaves[0].shape[-1]
    with torch.set_grad_enabled(train):
        y = fused.attend(*leaves, attention.kernel(D**-0.5), branches=False, keep=False)[0].y
    grads = torch.autograd.grad(y, [*leaves, *attention.parameters()], up) if train else ()
    return [y.detach(), *grads]


def kernels(call, calls: int) -> list:
    """The profiler's events of so many calls on the device, the longest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    return sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)


def kernel_ms(call, name: str) -> float:
    """Device milliseconds of the kernel in one call."""
    return sum(e.self_device_time_total for e in kernels(call, 5) if e.key == name) / 5000


def profile(policy: str, slots: int, T: int, shape, train: bool, top: int = 24) -> None:
    attention, qkv = ours(policy, slots, T, shape)
    leaves = [x.requires_grad_(train) for x in qkv]
    up = torch.randn_like(qkv[0])

    def call():
        one_call(attention, leaves, up, train)

    for _ in range(2):
        call()
    events = kernels(call, 3)
    total = sum(e.self_device_time_total for e in events) / 3000
    print(f"# {policy} {slots}, {shape}, T={T}, {'fwd+bwd' if train else 'fwd'}: {total:.3f} ms on the device")
    for e in events[:top]:
        print(f"{e.self_device_time_total / 3000:8.4f} ms {e.count // 3:4d}×  {e.key[:90]}", flush=True)


def profile_all(workers: int) -> None:
    calls = [(("mixed", 128, 131072, SHAPE), False), (("attention", 128, 2048, SHAPE), False),
             (("gated delta", 128, 131072, SHAPE), False), (("gated delta", 128, 32768, SHAPE), True),
             *(row[1:] for row in TUNED.values())]  # fmt: skip
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        compile_all(pool, [(fields_of(policy, slots), shape, T, BFLOAT, train)
                           for (policy, slots, T, shape), train in calls])  # fmt: skip
    for call, train in calls:
        profile(*call, train)


def stamp() -> dict:
    import triton

    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
            "date": datetime.date.today().isoformat()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["check", "time", "profile", "tune"], help="in this order")
    parser.add_argument("--only", default="", help="cases of `check`, or kernels of `tune`, whose name contains this")
    parser.add_argument("--workers", type=int, default=7, help="processes that compile, which takes longest, and check")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768, 131072, 262144])
    parser.add_argument("--tuned", nargs="+", choices=TUNED, help="what `tune` looks at")
    parser.add_argument("--features", type=int, default=KernelSpec().feature_dim, help="of the memory; not of `check`")
    parser.add_argument("--shape", type=int, nargs=4, default=SHAPE, metavar=("B", "H", "Hk", "D"), help="of `time`")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    take_features(given.features)

    def keep(row: dict) -> None:  # at once: a run that is cut short has measured something, too
        if given.out:
            with given.out.open("a") as file:
                file.write(json.dumps({**stamp(), **row}) + "\n")

    for what in given.what:
        run(what, given, keep)


def run(what: str, given: argparse.Namespace, keep) -> None:
    if what == "check":
        check_all(given.only, given.workers, keep)
    elif what == "time":
        time_all(given.lengths, not given.no_peers, tuple(given.shape), keep)
    elif what == "tune":
        for call in given.tuned or TUNED:
            tune(call, given.only, given.workers, keep)
    else:
        profile_all(given.workers)


if __name__ == "__main__":
    main()
