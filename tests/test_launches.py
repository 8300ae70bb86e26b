"""How much one layer launches: a count, so that it can be asserted without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from compiled import launches_of, layer_call, standing_in, warmed

from kernelize.runtime import fused, fused_step
from kernelize.runtime.attention import KernelAttention
from kernelize.runtime.spec import KernelSpec
from kernelize.runtime.state import Rotation, empty_state

SPEC = {"feature_dim": 16, "window": 64, "sinks": 4, "block": 16, "slots": 32}
SHAPE = (1, 4, 2, 16)


@pytest.mark.parametrize(
    ("policy", "length", "train", "keep", "kernels", "operations"),
    [("attention", 2048, False, False, 12, 0), ("attention", 65536, False, False, 17, 0),
     ("attention", 131072, False, False, 18, 0),
     ("attention", 2048, False, True, 12, 29), ("mixed", 2048, False, False, 19, 2),
     ("attention", 2048, True, False, 26, 9), ("mixed", 2048, True, False, 33, 11)],
)  # fmt: skip
def test_a_layer_launches_no_more_than_this(policy, length, train, keep, kernels, operations):
    """Triton kernels and torch operations of the second call; longer sequences have lists in more than one group, and
    segments of the memory that are more than tiles."""
    launches, found = launches_of(layer_call({**SPEC, "policy": policy}, SHAPE, length, train, keep))
    assert len(launches) <= kernels, [launch.name for launch in launches]
    assert sum(found.values()) <= operations, found


def test_layers_of_different_budgets_share_their_bookkeeping():
    """As many layers as a model has, each with slots of its own: the second pass computes none of it anew."""
    calls = [layer_call({**SPEC, "policy": "attention", "slots": 20 + i}, SHAPE, 512, False) for i in range(12)]

    def model() -> None:
        for call in calls:
            call()

    _, one = launches_of(calls[0])
    _, all_layers = launches_of(model)
    assert sum(all_layers.values()) == len(calls) * sum(one.values())


def constants(launch) -> tuple:
    """What a launch is compiled for."""
    fixed = [p.name for p in launch.kernel.params if p.is_constexpr]
    return launch.name, *((name, launch.options[name]) for name in fixed if name in launch.options)


def step_call(slots: int, shape=SHAPE, dtype=torch.bfloat16, **fields):
    spec, (B, H, Hk, D) = KernelSpec(**{**SPEC, "slots": slots, **fields}), shape
    kernel, rotation = KernelAttention(spec, H, Hk, D).to("meta").kernel(D**-0.5), torch.empty(D // 2, device="meta")
    if spec.scores_by("forecast"):
        kernel = kernel._replace(key_rotation=Rotation(rotation, False))
    if spec.reach:
        kernel = kernel._replace(rotation=Rotation(rotation, False))
    q, k, v = (torch.empty(B, h, 1, D, device="meta", dtype=dtype) for h in (H, Hk, Hk))
    state = empty_state(spec, k, v)
    return lambda: fused_step.step(q, k, v, kernel, state, in_place=True)


@pytest.mark.parametrize(
    "call",
    [lambda slots: layer_call({**SPEC, "slots": slots}, SHAPE, 512, False),
     lambda slots: layer_call({**SPEC, "slots": slots}, SHAPE, 512, True), step_call],
    ids=["prefill", "training", "step"],
)  # fmt: skip
def test_layers_of_different_budgets_share_their_code(call):
    """Compiling takes seconds a kernel, and each of thirty layers may have slots of its own."""
    few, many = ({constants(launch) for launch in launches_of(call(slots))[0]} for slots in (72, 120))
    assert few == many


def test_a_step_compiles_for_a_gpu(tmp_path, monkeypatch):
    """What only the compiler refuses, such as constants that are called like lengths, the interpreter runs."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = launches_of(step_call(32, policy="attention+forecast", aging=64))[0]
    assert {launch.name for launch in launches} == {"leave_kernel", "read_kernel"}
    assert warmed(launches, 0, 1) == 2
    for launch in launches:
        assert not any(p.is_constexpr and p.do_not_specialize for p in launch.kernel.params)


HOPPER, LEAST = 227 * 1024, 99 * 1024  # bytes of shared memory that a program may take


def test_what_does_not_fit_a_gpu_is_named():
    """A small GPU reads with heads of 128, and trains those of 64; the rest runs on chunked code there. A Hopper does
    all but heads of 256 in float32."""
    assert all(needed <= HOPPER for of, both in fused.SHARED.items() for needed in both if of != (4, 256))
    assert "float32 takes 393216 bytes" in fused.too_large(256, torch.float32, True, HOPPER)
    fits = [fused.too_large(D, torch.bfloat16, trains, LEAST) for D, trains in ((64, True), (80, False), (128, False))]
    assert fits == [None] * 3
    assert "takes 122880 bytes of shared memory, the GPU has 101376" in fused.too_large(128, torch.float16, True, LEAST)
    assert "float32" in fused.too_large(64, torch.float32, False, LEAST)
    assert fused.too_large(128, torch.bfloat16, True, HOPPER, is_delta=True) is None
    assert "a delta rule with heads of 64" in fused.too_large(64, torch.bfloat16, True, 164 * 1024, is_delta=True)
    plain = KernelSpec(**{**SPEC, "feature_dim": 256, "policy": "attention"})
    delta = plain.replace(rule="gated_delta")
    assert fused.too_wide(plain, 256, torch.bfloat16) is None
    assert fused.too_wide(delta, 128, torch.bfloat16).startswith("rule='gated_delta'")
    assert fused.too_wide(delta.replace(feature_dim=128), 128, torch.bfloat16) is None


@pytest.mark.parametrize(
    ("fields", "largest"),
    [({}, False), ({"feature_map": "none"}, False), ({"feature_map": "elu"}, True), ({"rule": "gated_delta"}, True)],
)
def test_a_prefill_that_is_handed_features_takes_more(fields, largest):
    spec = KernelSpec(**{**SPEC, "policy": "attention", **fields})
    assert fused.reads_features(KernelAttention(spec, 4, 2, 16).kernel(0.25)) is largest


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["prefill", "training"])
@pytest.mark.parametrize("features", [64, 128])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_programs_take_no_more_than_is_said(tmp_path, monkeypatch, width, dtype, features, train):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    others = {"policy": "attention", "rule": "gated_delta"}, {"policy": "attention", "feature_map": "elu"}
    for fields in ({"policy": "mixed"}, *(x for x in others if features == width or "rule" in x)):
        call = layer_call({**SPEC, "feature_dim": features, **fields}, (1, 4, 2, width), 512, train, dtype=dtype)
        with standing_in():
            for launch in launches_of(call)[0]:
                found = launch.kernel.run(*launch.arguments, grid=launch.grid, warmup=True, **launch.options)
                largest = train or fields["policy"] == "attention"
                allowed = fused.largest_program(width, dtype, largest, "rule" in fields)
                assert found.metadata.shared <= allowed, launch.name


STEPS = [
    ((1, 32, 8, 128), torch.bfloat16, {"feature_dim": 128, "window": 512}),
    ((1, 9, 3, 64), torch.float32, {"feature_dim": 128, "window": 512}),
    pytest.param((1, 4, 1, 256), torch.bfloat16, {"feature_dim": 128, "reach": 300}, marks=pytest.mark.slow),
    pytest.param((1, 4, 1, 256), torch.float32, {"feature_dim": 64, "reach": 300}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("shape", "dtype", "fields"), STEPS)
@pytest.mark.parametrize("has", [LEAST, HOPPER], ids=["least", "Hopper"])
def test_a_step_fits_into_shared_memory(tmp_path, monkeypatch, shape, dtype, fields, has):
    """Of the GPUs with the least, and of Hopper, where loads are further ahead."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(fused_step, "shared_memory", lambda device: has)
    launches = launches_of(step_call(128, shape, dtype, **fields))[0]
    with standing_in():
        for launch in launches:
            compiled = launch.kernel.run(*launch.arguments, grid=launch.grid, warmup=True, **launch.options)
            assert compiled.metadata.shared <= has, launch.name


@pytest.mark.parametrize("train", [False, True], ids=["prefill", "training"])
@pytest.mark.parametrize(
    "fields", [{"policy": "mixed"}, {"policy": "attention+forecast"}, {"policy": "attention", "reach": 300},
               {"policy": "attention", "rule": "gated_delta", "decay": "gated"}],
    ids=["mixed", "attention+forecast", "beyond reach", "delta rule"],
)  # fmt: skip
def test_a_layer_compiles_for_a_gpu(tmp_path, monkeypatch, fields, train):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = launches_of(layer_call({**SPEC, **fields}, SHAPE, 512, train))[0]
    assert warmed(launches, 0, 1) == len({(x.name, *sorted((k, v) for k, v in x.options.items() if isinstance(v, bool)))
                                          for x in launches})  # fmt: skip


@pytest.mark.parametrize(("width", "dtype"), [(64, torch.bfloat16), (256, torch.bfloat16), (64, torch.float32)])
def test_the_exact_branch_has_four_warps_for_a_head(width, dtype):
    """Triton 3.6 reads beyond a program's shared memory with eight: seen on Hopper alone (docs/performance.md)."""
    call = layer_call({**SPEC, "feature_dim": width}, (1, 4, 2, width), 512, True, dtype=dtype)
    exact = [x for x in launches_of(call)[0] if x.kernel.__module__.endswith("fused_exact") and "HP" in x.options]
    products = {"exact_kernel", "query_grad_kernel", "held_grad_kernel", "sink_grad_kernel", "window_grad_kernel"}
    assert {launch.name for launch in exact} == products
    for launch in exact:
        assert launch.options["num_warps"] == 4 * launch.options["HP"], launch.name
