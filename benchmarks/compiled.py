"""What the compiler makes of the kernels, and how much a layer launches: for sm_90, on a machine without a GPU.

    python benchmarks/compiled.py                       # forward at 2,048 tokens: launches, and each kernel's registers
    python benchmarks/compiled.py --train --length 32768
    python benchmarks/compiled.py --count               # launches only: nothing is compiled

Tensors are meta tensors, so nothing is computed; Triton compiles for compute capability 9.0 and ptxas, which is part of
Triton, says what a thread takes. Times need a GPU: `layer.py`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kernelize.runtime import fused
from kernelize.runtime.attention import KernelAttention
from kernelize.runtime.spec import KernelSpec, mean_slots
from kernelize.runtime.state import Rotation

TARGET = GPUTarget("cuda", 90, 32)
ALLOCATIONS = {"empty", "empty_strided", "empty_like", "new_empty", "detach", "lift_fresh", "alias"}


class NoDevice:
    """Stands in for Triton's driver: compiles for TARGET, launches nothing."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


class Launch(NamedTuple):
    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: tuple
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__


class Count(TorchDispatchMode):
    """The torch operations that are launches of their own: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.overloadpacket.__name__ not in ALLOCATIONS:
            self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded() -> Iterator[tuple[list[Launch], Counter[str]]]:
    """(Triton launches, torch operations) of what runs inside, on meta tensors; nothing is launched."""
    launches: list[Launch] = []

    def note(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        launches.append(Launch(self, grid, args, options))

    before, JITFunction.run = JITFunction.run, note
    try:
        with Count() as count:
            yield launches, count.found
    finally:
        JITFunction.run = before


def warmed(launches: list[Launch], part: int, parts: int) -> int:
    """Compiles every `parts`-th of the kernels into Triton's cache, for a GPU like TARGET that need not be there."""
    distinct = {(x.name, *sorted((k, v) for k, v in x.options.items() if isinstance(v, bool))): x for x in launches}
    mine = list(distinct.values())[part::parts]
    with standing_in():
        for launch in mine:
            launch.kernel.run(*launch.arguments, grid=launch.grid, warmup=True, **launch.options)
    return len(mine)


@contextmanager
def standing_in() -> Iterator[None]:
    """Triton compiles for TARGET; afterwards for the device that is there."""
    driver.set_active(NoDevice())
    try:
        yield
    finally:
        driver._active = None  # reset_active() needs a device


def resources(launch: Launch) -> dict[str, Any]:
    """Registers, bytes spilled, shared memory and matrix instructions of the kernel as launched here."""
    with standing_in():
        compiled = launch.kernel.run(*launch.arguments, grid=launch.grid, warmup=True, **launch.options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(compiled.asm["ptx"])
        binary.write_bytes(compiled.asm["cubin"])
        said = subprocess.run([tools / "ptxas", "-v", "--gpu-name=sm_90a", source, "-o", Path(folder) / "out"],
                              capture_output=True, text=True, check=True).stderr  # fmt: skip
        code = subprocess.run([tools / "cuobjdump", "-sass", binary], capture_output=True, text=True, check=True).stdout
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert spilled is not None
    assert registers is not None
    return {
        "registers": int(registers[1]), "spilled": int(spilled[1]), "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps, "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.M)),
        "wgmma": len(re.findall(r"\bHGMMA", code)), "mma": len(re.findall(r"\bHMMA", code)),
        "copies 16B": len(re.findall(r"LDGSTS\S*\.128|LDG\S*\.128", code)),
        "copies less": len(re.findall(r"LDGSTS(?!\S*\.128)|LDG(?!\S*\.128)", code)),
    }  # fmt: skip


def residents(found: dict[str, Any]) -> int:
    """Programs that fit on a multiprocessor: 65,536 registers, 228 KB of shared memory, 64 warps."""
    warps = found["warps"]
    registers = 65536 // (-(-found["registers"] // 8) * 8 * 32 * warps)
    return min(registers, 64 // warps, 228 * 1024 // (found["shared"] + 1024))


def layer_call(
    fields: dict[str, Any], shape: tuple[int, int, int, int], length: int, train: bool, keep: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Callable[[], None]:  # fmt: skip
    """One layer's forward, or forward and backward, over meta tensors laid out as a model makes them."""
    B, H, Hk, D = shape
    attention = KernelAttention(KernelSpec(**fields), H, Hk, D).to("meta")
    q, k, v = (torch.empty(B, length, h, D, device="meta", dtype=dtype).transpose(1, 2) for h in (H, Hk, Hk))
    leaves = [x.requires_grad_(train) for x in (q, k, v)]

    def call() -> None:
        with torch.set_grad_enabled(train):
            kernel = attention.kernel(D**-0.5)
            if kernel.spec.reach:
                kernel = kernel._replace(rotation=Rotation(torch.empty(D // 2, device="meta"), False))
            kernel = kernel._replace(spec=kernel.spec.spread) if kernel.spec.is_packed else kernel
            y = fused.attend_plainly(*leaves, kernel, None, None, branches=False, keep=keep)[0].y
        if train:
            torch.autograd.grad(y, [*leaves, *attention.parameters()], torch.empty_like(y), allow_unused=True)

    return call


def launches_of(call: Callable[[], None]) -> tuple[list[Launch], Counter[str]]:
    """Of the second call: what is kept from one call to the next is there."""
    with recorded():
        call()
    with recorded() as found:
        call()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--policy", default="attention")
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--features", type=int, default=KernelSpec().feature_dim)
    parser.add_argument(
        "--head-slots", type=int, nargs="+", default=(), help="one number a KV head, instead of --slots"
    )
    parser.add_argument("--shape", type=int, nargs=4, default=(1, 32, 8, 128), metavar=("B", "H", "Hk", "D"))
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--keep", action="store_true", help="the state afterwards, too")
    parser.add_argument("--count", action="store_true", help="count launches, compile nothing")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    given = parser.parse_args()
    fields = {"feature_dim": given.features, "slots": given.slots, "policy": given.policy}
    fields |= {"window": 64, "sinks": 4, "block": 16}
    if given.head_slots:
        fields |= {"slots": mean_slots(given.head_slots), "head_slots": tuple(given.head_slots)}
    call = layer_call(fields, tuple(given.shape), given.length, given.train, given.keep)
    launches, operations = launches_of(call)
    print(f"{len(launches)} kernels, {sum(operations.values())} torch operations")
    print("torch:", ", ".join(f"{name} {n}" for name, n in operations.most_common()))
    for name, n in Counter(x.name for x in launches).items():
        print(f"{n:4d}× {name}")
    if given.count:
        return
    first = {x.name: x for x in reversed(launches) if given.only in x.name}
    for name, launch in first.items():
        found = resources(launch)
        print(json.dumps({"kernel": name, "grid": launch.grid, **found, "a multiprocessor": residents(found)}))


if __name__ == "__main__":
    main()
