"""The functions that are exported equal the checkpoint for every policy and rule; the rest is refused by name."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tiny import byte_tokenizer, tiny_llama
from tolerances import assert_same

from kernelize.cli.app import main
from kernelize.convert import convert, save
from kernelize.errors import InputError
from kernelize.export import check_request, refuse
from kernelize.graphs import StateLayout, Tokens, shapes_of
from kernelize.leaving import Leave
from kernelize.onnx_files import BLOCKS, in_blocks
from kernelize.plan import ConversionPlan
from kernelize.quantize import quantize_model
from kernelize.runtime.spec import KernelSpec, mean_slots

SPEC = KernelSpec(feature_dim=16, window=16, sinks=2, slots=8, block=8)
CHOICES = {
    "default": {},
    "reach": {"reach": 144},
    "learned and recall": {"policy": "learned+recall"},
    "keydiff": {"policy": "keydiff"},
    "gated delta": {"policy": "attention", "rule": "gated_delta"},
    "forecast and gated decay": {"policy": "forecast", "decay": "gated"},
    "aging and sink logits": {"aging": 100, "sink_logits": True, "feature_map": "favor"},
    "no memory": {"policy": "attention", "feature_map": "none", "decay": "none"},
    "no slots": {"slots": 0, "policy": "attention"},
    "single tokens": {"block": 1},
}


def converted(*specs):
    text = torch.randint(1, 257, (1, 64), generator=torch.Generator().manual_seed(0))
    model = tiny_llama(num_hidden_layers=len(specs), max_position_embeddings=4096)
    return convert(model, ConversionPlan(specs), calibration=[text])


def run(model, ids: torch.Tensor, sizes: tuple[int, ...]):
    """(tokens read, logits [B, V]) after every span of ids [B, T], of at most these sizes in turn."""
    layout = StateLayout(shapes_of(model))
    inside, between, state = Tokens(model, layout), Leave(model, layout), layout.empty(len(ids))
    blocks, at = [layer.spec.block for layer in layout.layers], 0
    for size in itertools.cycle(sizes):
        if at == ids.shape[1]:
            return
        n = min(size, ids.shape[1] - at, *(block - at % block for block in blocks))
        state |= between(state)
        out = inside(ids[:, at : at + n], torch.full((len(ids),), n), state)
        at += n
        yield at, out.pop("logits")
        state |= out


@pytest.mark.parametrize("name", CHOICES)
@torch.no_grad()
def test_what_is_traced_is_what_the_checkpoint_computes(name):
    spec = SPEC.replace(**CHOICES[name])
    model = converted(spec, spec.replace(slots=13 if spec.slots else 0))
    ids = torch.randint(1, 257, (2, 170), generator=torch.Generator().manual_seed(1))
    wanted = model(ids).logits
    for at, logits in run(model, ids, (3, 1, 8)):
        assert_same(logits, wanted[:, at - 1], f"{name}, after {at} tokens")


@pytest.mark.parametrize("policy", ["mixed", "learned+recall", "attention+forecast"])
@torch.no_grad()
def test_kv_heads_may_have_slots_of_their_own_number(policy):
    spec = SPEC.replace(policy=policy, reach=144)
    by_head = ((3, 14), (0, 8), (8, 8))  # the second has places that no head owns
    model = converted(*(spec.replace(slots=mean_slots(each), head_slots=each) for each in by_head), spec)
    ids = torch.randint(1, 257, (2, 170), generator=torch.Generator().manual_seed(1))
    wanted = model(ids).logits
    for at, logits in run(model, ids, (3, 1, 8)):
        assert_same(logits, wanted[:, at - 1], f"after {at} tokens")


@torch.no_grad()
def test_layers_of_different_blocks_and_windows_keep_their_own_time():
    model = converted(SPEC, SPEC.replace(block=4, window=30, slots=5))
    ids = torch.randint(1, 257, (1, 120), generator=torch.Generator().manual_seed(2))
    wanted = model(ids).logits
    for at, logits in run(model, ids, (5, 8)):
        assert_same(logits, wanted[:, at - 1], f"after {at} tokens")


@torch.no_grad()
def test_between_blocks_nothing_changes_twice():
    model = converted(SPEC, SPEC)
    layout = StateLayout(shapes_of(model))
    inside, between, state = Tokens(model, layout), Leave(model, layout), layout.empty(1)
    for ids in torch.randint(1, 257, (1, 48), generator=torch.Generator().manual_seed(3)).split(8, 1):
        state |= between(state)
        state |= inside(ids, torch.tensor([8]), state)
    once = state | between(state)
    twice = once | between(once)
    assert any(not torch.equal(state[name], once[name]) for name in layout.shapes)
    for name in layout.shapes:
        assert torch.equal(once[name], twice[name]), name


def widened(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """What a runtime makes of `in_blocks`, [N, K]."""
    parts, K = in_blocks(rows, bits, BLOCKS[bits]), rows.shape[1]
    steps = parts.packed.numpy()
    if bits == 4:
        steps = np.stack([steps & 15, steps >> 4], -1).reshape(*steps.shape[:2], -1)
    numbers = torch.from_numpy(steps.astype(np.float32)) - (1 << bits - 1)
    offsets = torch.zeros(()) if parts.offsets is None else parts.offsets[..., None].float()
    return (numbers * parts.scales[..., None].float() + offsets).flatten(1)[:, :K]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_weight_is_within_a_step_of_the_weight(bits):
    rows = torch.randn(5, 200, generator=torch.Generator().manual_seed(0)) * 0.02
    assert in_blocks(rows, bits, BLOCKS[bits]).packed.shape == (5, -(-200 // BLOCKS[bits]), BLOCKS[bits] * bits // 8)
    error = widened(rows, bits) - rows
    assert error.abs().median() <= in_blocks(rows, bits, BLOCKS[bits]).scales.abs().max() / 2
    assert error.norm() < rows.norm() * (0.01 if bits == 8 else 0.08)
    assert not widened(torch.zeros(1, 70), bits).any()


def test_int4_keeps_weights_that_have_sixteen_even_levels_in_a_block():
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 16, (3, 4, 32), generator=generator).float()
    levels[..., 0], levels[..., 1] = 0, 15
    scale, low = (torch.rand(3, 4, 1, generator=generator).half().float() * 1e-2 for _ in range(2))
    rows = (levels * scale - low).flatten(1)
    assert ((widened(rows, 4) - rows).view(3, 4, 32).abs() < 0.02 * scale).all()


# --- refused by name ----------------------------------------------------------------------------------------


def test_what_has_no_constant_state_is_refused_by_name():
    with pytest.raises(InputError, match=r"not kernelized \(llama\)"):
        refuse(tiny_llama())
    with pytest.raises(InputError, match="layers 1 keep softmax attention, which an exported graph does not support"):
        refuse(convert(tiny_llama(), ConversionPlan((SPEC, None))))
    quantised = convert(tiny_llama(hidden_size=64), ConversionPlan((SPEC, SPEC)))
    quantize_model(quantised, 8)
    with pytest.raises(InputError, match="the model is quantised; export the checkpoint with full weights"):
        refuse(quantised)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(InputError, match="rope_type='dynamic'"):
        refuse(convert(tiny_llama(rope_parameters=rope), ConversionPlan((SPEC, SPEC))))


def test_targets_and_precisions_that_are_not_known_are_refused():
    with pytest.raises(InputError, match="to='coreml' is not one of onnx, executorch"):
        check_request("coreml", "fp32")
    with pytest.raises(InputError, match="precision='int3' is not one of fp32"):
        check_request("onnx", "int3")


def test_the_command_refuses_with_one_line_and_writes_nothing(tmp_path, capsys):
    save(tiny_llama(), byte_tokenizer(), tmp_path / "plain")
    capsys.readouterr()
    assert main(["export", str(tmp_path / "plain"), "-o", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: the model is not kernelized (llama)")
    assert not (tmp_path / "out").exists()
