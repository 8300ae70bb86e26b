"""The exact branch's forward in CUDA for Hopper, beside the Triton kernel that ships: an experiment, used by nothing.

    python benchmarks/hopper.py --lengths 2048 32768 131072   # needs a Hopper GPU and nvcc

Compiles hopper.cu, compares its output with the Triton kernel's on fresh random input and times both; `--out FILE`
appends the rows as JSON lines. docs/performance.md has what it taught.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import subprocess
import tempfile
from pathlib import Path

import torch
from layer import milliseconds, ours, relative_there, stamp

from kernelize.runtime import fused, fused_exact

HERE = Path(__file__).parent
SHARED, THREADS = 224768, 512  # hopper.cu's SMEM and 128 (GROUPS + 1)
LARGEST_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


def wrapper(name: str, columns: int, left: list[str], kind: str, transposed: str) -> str:
    """A C function around one matrix instruction of 64 rows; `left` are the operands of the left matrix."""
    count, n = columns // 2, len(left)
    results = ", ".join(f"%{i}" for i in range(count))
    first = ", ".join(f"%{count + i}" for i in range(n))
    first = first if n == 1 else "{" + first + "}"
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    code = (
        f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 "
        f"{{{results}}}, {first}, %{count + n}, p, 1, 1{transposed};"
    )
    return f"""__device__ __forceinline__ void {name}(float (&d)[{count}], {kind} a, uint64_t b, int keep) {{
  asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{count + n + 1}, 0; {code} }}"
    : {outputs} : {", ".join(left)}, "l"(b), "r"(keep));
}}
"""


def wrappers() -> str:
    """What hopper.cu includes: products of two matrices in shared memory, and of one in registers."""
    parts = [wrapper(f"wgmma_ss_n{n}", n, ['"l"(a)'], "uint64_t", ", 0, 0") for n in (48, 64, 80)]
    held = [f'"r"(a[{i}])' for i in range(4)]
    return "".join([*parts, wrapper("wgmma_rs_n128", 128, held, "const uint32_t*", ", 1")])


def compiled() -> bytes:
    """hopper.cu for sm_90a."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "wgmma.inc").write_text(wrappers())
        target = ["-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-I", folder, "-o", f"{folder}/hopper.cubin"]
        subprocess.run(["nvcc", *target, str(HERE / "hopper.cu")], check=True)
        return (Path(folder) / "hopper.cubin").read_bytes()


class Given(ctypes.Structure):
    """hopper.cu's P."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "table", "death", "bounds", "out", "lse")),
        *((name, ctypes.c_longlong) for name in ("sqb", "sqh", "sqt", "skb", "skh", "skt", "svb", "svh", "svt")),
        *((name, ctypes.c_int) for name in ("W", "X", "front", "n", "kv_heads", "width", "sinks", "items")),
        ("unit", ctypes.c_float),
    ]


class Program:
    """A kernel of a compiled module, by CUDA's driver."""

    def __init__(self, binary: bytes, name: str):
        torch.zeros(1, device="cuda")  # makes the context
        self.cuda, self.module, self.function = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(self.module), binary)
        self.call("cuModuleGetFunction", ctypes.byref(self.function), self.module, name.encode())
        self.call("cuFuncSetAttribute", self.function, LARGEST_SHARED, SHARED)

    def call(self, name: str, *arguments) -> None:
        if error := getattr(self.cuda, name)(*arguments):
            raise RuntimeError(f"{name} gave CUDA's error {error}")

    def launch(self, programs: int, given: Given) -> None:
        arguments = (ctypes.c_void_p * 1)(ctypes.cast(ctypes.byref(given), ctypes.c_void_p))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.call("cuLaunchKernel", self.function, programs, 1, 1, THREADS, 1, 1, SHARED, stream, arguments, None)


def captured(T: int) -> tuple:
    """What a layer of Llama-3-8B's shape hands its exact branch, and gets."""
    attention, qkv = ours("attention", 128, T)
    seen: list[tuple] = []
    forward = fused_exact.ExactFunction.forward

    def watched(ctx, *arguments):
        seen.append((arguments, forward(ctx, *arguments)))
        return seen[0][1]

    fused_exact.ExactFunction.forward = staticmethod(watched)
    try:
        with torch.no_grad():
            fused.attend(*qkv, attention.kernel(128**-0.5), branches=False, keep=False)
    finally:
        fused_exact.ExactFunction.forward = staticmethod(forward)
    return seen[0]


def given_of(q, k, v, exact, out, lse) -> Given:
    (B, _, W, _), (Hk, X), n = q.shape, k.shape[1:3], -(-q.shape[2] // 64)
    tensors = (q, k, v, exact.table, exact.death, exact.bounds, out, lse)
    sizes = (W, X, exact.front, n, Hk, exact.spec.slots, exact.spec.sinks, B * Hk * n)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    return Given(*(x.data_ptr() for x in tensors), *strides, *sizes, exact.scaling * math.log2(math.e))


def row_of(program: Program, T: int) -> dict:
    (q, k, v, *far, exact), (expected, expected_lse, *_) = captured(T)
    out, lse = torch.full_like(expected, float("nan")), torch.full_like(expected_lse, float("nan"))
    given = given_of(q, k, v, exact, out, lse)
    programs = min(torch.cuda.get_device_properties(0).multi_processor_count, given.items)
    program.launch(programs, given)

    @torch.no_grad()
    def shipped():
        fused_exact.ExactFunction.apply(q, k, v, *far, exact)

    return {
        "what": "exact branch, CUDA", "T": T, "differs": relative_there(out, expected),
        "lse differs": float((lse - expected_lse).abs().max()),
        "ms": milliseconds(lambda: program.launch(programs, given)), "ms shipped": milliseconds(shipped),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 2048, 32768, 131072])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    program = Program(compiled(), "exact_hopper")
    for T in arguments.lengths:
        row = {**stamp(), **row_of(program, T)}
        print(row, flush=True)
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
