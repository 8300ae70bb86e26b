"""Every law of `contract`, over the registries: maps, rules, decays, policies and exact sets that the spec admits."""

from __future__ import annotations

import subprocess
import sys

import contract
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import MEMORY_FACTOR

from kernelize.runtime import chunked, reference
from kernelize.runtime import spec as spec_module
from kernelize.runtime.ops import attend
from kernelize.runtime.spec import POLICIES, KernelSpec, SpecError
from kernelize.runtime.state import Rotation, State, Turned, forecast, unpacked

CORE, MAPS, FEW = contract.core_specs(), contract.map_specs(), contract.few_specs()


def over(specs: list[KernelSpec]):
    return pytest.mark.parametrize("spec", specs, ids=contract.name_of)


@over(CORE)
def test_definition_is_reference_is_chunked(spec):
    contract.law_definition(spec)


def test_definition_with_softcap_and_sink_logits():
    heads = {"softcap": 3.0, "sink_logits": torch.linspace(-1, 2, contract.HEADS, dtype=torch.float64)}
    contract.law_definition(CORE[0], **heads)


HOLES = torch.rand(3, contract.LENGTH, generator=torch.Generator().manual_seed(3)) > 0.3
HOLES[0], HOLES[1, :17] = True, False


@pytest.fixture
def small_tiles(monkeypatch):
    """A reach that a few tokens exceed: it may be no shorter than what is read together."""
    for module in (spec_module, chunked):
        monkeypatch.setattr(module, "TILE", 4)


def reaching(exact: dict) -> KernelSpec:
    spec = KernelSpec(feature_dim=8, **exact)
    return spec.replace(reach=spec.least_reach)


def rotation(interleaved: bool) -> Rotation:
    """Of the first two of a head's four channels, or of all."""
    return Rotation(torch.tensor([1.3, 0.2])[: 1 + interleaved], interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("exact", contract.EXACT_SETS)
def test_sinks_and_slots_beyond_reach_are_seen_at_reach(small_tiles, exact, interleaved):
    spec = reaching(exact)
    contract.law_definition(spec, rotation=rotation(interleaved))
    plain, moved = (
        chunked.attend(*contract.tokens(1, contract.LENGTH), contract.kernel_of(contract.layer(spec), **heads))[0].y
        for heads in ({}, {"rotation": rotation(interleaved)})
    )
    assert torch.equal(plain[:, :, : spec.reach], moved[:, :, : spec.reach])
    assert not torch.allclose(plain[:, :, spec.reach + spec.block :], moved[:, :, spec.reach + spec.block :])


FORECAST = KernelSpec(feature_dim=8, **{**contract.EXACT_SETS[0], "policy": "attention+forecast"})


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_forecast_sees_keys_without_their_positions(interleaved):
    contract.law_definition(FORECAST, rotation=rotation(interleaved))
    contract.law_streams(FORECAST, [7, 1, 1, 20, 12], HOLES, rotation=rotation(interleaved))


@torch.no_grad()
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_forecast_is_the_same_wherever_a_token_stands(interleaved):
    """What has learned on short texts serves long ones."""
    kernel = contract.kernel_of(contract.layer(FORECAST), rotation=rotation(interleaved))
    _, key, value = contract.tokens(1, 6)
    pos = torch.tensor([[[0, 1, 9, 300, 12_000, 30_000]]])
    statistics = {name: value.norm(dim=-1) for name in FORECAST.statistics("forecast")}
    expected = forecast(kernel._replace(key_rotation=None), statistics, key, value, None)
    moved = kernel.key_rotation.turn(key, -pos, 0)
    assert not torch.allclose(moved, key)
    assert torch.allclose(forecast(kernel, statistics, moved, value, pos), expected)
    assert not torch.allclose(forecast(kernel._replace(key_rotation=None), statistics, moved, value, pos), expected)


@pytest.mark.parametrize("exact", contract.EXACT_SETS)
def test_any_split_of_a_padded_batch_beyond_reach(small_tiles, exact):
    contract.law_streams(reaching(exact), [7, 1, 1, 20, 12], HOLES, rotation=rotation(True))


@torch.no_grad()
@pytest.mark.parametrize("in_place", [False, True])
def test_a_step_beyond_reach_turns_what_a_block_has_changed_and_nothing_else(small_tiles, monkeypatch, in_place):
    spec = reaching(contract.EXACT_SETS[0])
    plain = contract.kernel_of(contract.layer(spec), rotation=rotation(True))
    kernel, turned, turn = plain._replace(turned=Turned()), [], Rotation.turn
    before = spec.reach + 2 * spec.block
    texts = [contract.tokens(1, before + 4 * spec.block, seed=seed) for seed in (0, 1)]
    states = [chunked.attend(*(x[:, :, :before] for x in text), plain)[1].map(torch.clone) for text in texts]
    monkeypatch.setattr(Rotation, "turn", lambda self, x, pos, to: turned.append(to) or turn(self, x, pos, to))

    def read(i: int, steps: int, state: State) -> State:
        for _ in range(steps):
            t = int(state.seen)
            now = [x[:, :, t : t + 1] for x in texts[i]]
            expected = reference.step(*now, plain, state)[0].y
            turned.remove(0)
            out, state = reference.step(*now, kernel, state, None, in_place)
            assert torch.equal(out.y, expected)
        return state

    state = read(0, 3 * spec.block, states[0])
    assert 1 <= turned.count(0) <= 3  # blocks
    for old, new in zip(state, states[1], strict=True):
        old.copy_(new)  # as a roll-back does
    read(1, 2, state)


def test_gradients_beyond_reach(small_tiles):
    contract.law_gradients(reaching(contract.EXACT_SETS[0]), [18, 1, 22], rotation=rotation(False))


@over(list(dict.fromkeys(CORE + MAPS)))
def test_any_split_of_a_padded_batch(spec):
    contract.law_streams(spec, [7, 1, 1, 20, 12], HOLES)


@pytest.mark.slow
@over([s for s in contract.all_specs() if s not in CORE + MAPS])
def test_any_split_of_a_padded_batch_for_every_combination(spec):
    contract.law_streams(spec, [7, 1, 1, 20, 12], HOLES)


@st.composite
def padded_pieces(draw) -> tuple[list[int], torch.Tensor]:
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    rows = st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths))
    return lengths, torch.tensor(draw(st.lists(rows, min_size=1, max_size=3)))


@pytest.mark.parametrize("exact", contract.EXACT_SETS)
@settings(deadline=None, derandomize=True, max_examples=5)
@given(pieces=padded_pieces())
def test_any_length_split_batch_and_padding(exact, pieces):
    contract.law_streams(KernelSpec(feature_dim=8, **exact), *pieces)


@over(FEW)
def test_branches_are_the_same_and_make_y(spec):
    contract.law_branches(spec)


@over(FEW)
def test_no_look_into_the_future(spec):
    contract.law_causal(spec, changed=23)


@over(CORE)
def test_gradients_are_the_same(spec):
    contract.law_gradients(spec, [18, 1, 22])


@over(MAPS)
def test_float32_is_near_float64(spec):
    contract.law_float32(spec)


@over(MAPS)
def test_finite_for_large_queries_and_keys(spec):
    for dtype in (torch.float32, torch.bfloat16):
        contract.law_finite(spec, dtype, scale=30.0)


@over(FEW)
def test_documents_do_not_see_each_other(spec):
    contract.law_documents(spec)


@over(FEW)
def test_a_window_over_everything_is_softmax(spec):
    contract.law_softmax(spec.replace(window=contract.LENGTH))


@over([s for s in CORE if s.slots])
def test_slots_for_everything_are_softmax(spec):
    contract.law_softmax(spec.replace(slots=2 * contract.LENGTH, head_slots=()))


FIRST_POLICY = next(iter(POLICIES))
UNTRAINED = [
    ({"decay": "gated"}, {"decay": "fixed"}),
    ({"policy": "learned+recall"}, {"policy": "mixed"}),
    ({"policy": "learned"}, {"policy": "attention"}),
    ({"policy": "attention+recall"}, {"policy": "mixed"}),
    ({"sink_logits": True}, {}),
]


@pytest.mark.parametrize(("option", "default"), UNTRAINED, ids=str)
def test_an_untrained_option_is_the_default(option, default):
    exact = contract.EXACT_SETS[0]
    contract.law_untrained(KernelSpec(**exact, **option), KernelSpec(**exact, **default))


SMALL = {"feature_dim": 4, "window": 2, "block": 1, "sinks": 1, "slots": 2, "head_slots": ()}


@over([s.replace(**SMALL) for s in CORE if s.slots and s.has_memory and s.policy == FIRST_POLICY])
def test_gradient_is_the_derivative(spec):
    contract.law_gradcheck(spec)


MEASURE = """
import resource, torch
from kernelize.runtime import chunked
from kernelize.runtime.attention import KernelAttention
from kernelize.runtime.ops import attend
from kernelize.runtime.spec import KernelSpec

torch.set_num_threads(1)
torch.set_grad_enabled(False)
T, D = 131072, 32
attention = KernelAttention(KernelSpec(feature_dim=64), 2, 1, D)
for m in (attention.map_q, attention.map_k, attention):
    m.reset()
kernel = attention.kernel(D**-0.5)
q, k, v = (torch.randn(1, h, T, D).bfloat16() for h in (2, 1, 1))
chunked.attend(q[:, :, :8192], k[:, :, :8192], v[:, :, :8192], kernel)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out, _ = chunked.attend(q, k, v, kernel)
added = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
print(added / sum(x.nbytes for x in (q, k, v, out.y)))
"""


def test_memory_is_linear_in_the_length():
    """131,072 tokens of one layer add less than three times the bytes of q, k, v and y."""
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert float(run.stdout) < MEMORY_FACTOR


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"window": 0}, "window"),
        ({"slots": -1}, "slots"),
        ({"block": True}, "block"),
        ({"feature_map": "hedgehogs"}, "hedgehog"),
        ({"policy": "atention"}, "attention"),
        ({"rule": "deltas"}, "rule"),
        ({"decay": "gate"}, "decay"),
        ({"feature_map": "none"}, "memory"),
        ({"feature_dim": 7}, "feature_dim"),
        ({"rule": "delta", "decay": "fixed"}, "gated_delta"),
        ({"rule": "gated_delta", "decay": "none"}, "decays"),
        ({"rule": "delta", "decay": "none", "feature_map": "none", "policy": "value"}, "no memory"),
        ({"rule": "gated_delta", "policy": "value+recall"}, "who holds the slots"),
        ({"policy": "recall+recall"}, "different"),
        ({"policy": "recall+valu"}, "valu"),
        ({"policy": "mixed+value"}, "mixed"),
        ({"policy": "value", "share": 0.25}, "share"),
        ({"share": 1.0}, "share"),
        ({"sink_logits": 1}, "sink_logits"),
        ({"head_slots": (9, 2)}, "slots=176 is not 6"),
        ({"head_slots": (9, -2)}, "head_slots"),
        ({"head_slots": 9}, "head_slots"),
    ],
    ids=str,
)
def test_refuses_nonsense_by_name(fields, named):
    with pytest.raises(SpecError, match=named):
        KernelSpec(**fields)


def test_heads_that_share_slots_unequally_take_no_more_bytes_and_each_uses_its_own_number():
    fields = {"window": 4, "block": 2, "sinks": 1, "slots": 6, "feature_dim": 8}
    inputs = contract.tokens(2, contract.LENGTH)
    states = {}
    for heads in ((), (10, 1)):
        kernel = contract.kernel_of(contract.layer(KernelSpec(**fields, head_slots=heads)))
        _, states[heads] = attend(*inputs, kernel)
        held = (unpacked(kernel, states[heads])[1].pos[:, :, 1 + kernel.spec.ring :] >= 0).sum(-1)  # [B, Hk]
        assert held.tolist() == [list(heads or (6, 6))] * 2
    assert states[10, 1].nbytes == states[()].nbytes


def test_heads_without_any_slot_and_learning_after_inference():
    fields = {"window": 4, "block": 2, "sinks": 1, "feature_dim": 8}
    for slots, heads in ((0, (0, 0)), (6, (9, 2))):
        kernel = contract.kernel_of(contract.layer(KernelSpec(**fields, slots=slots, head_slots=heads)))
        with torch.inference_mode():
            _, state = attend(*contract.tokens(2, contract.LENGTH), kernel)
        assert state.score.shape[2] == slots
        q, k, v = (x.requires_grad_() for x in contract.tokens(2, contract.LENGTH))
        attend(q, k, v, kernel)[0].y.sum().backward()
        assert k.grad.isfinite().all()
        assert k.grad.any()


def test_a_layer_refuses_budgets_for_other_heads_than_it_has():
    with pytest.raises(SpecError, match="3 numbers for 2 KV heads"):
        contract.layer(KernelSpec(slots=4, head_slots=(4, 4, 4)))


def test_share_divides_the_slots():
    for slots in range(12):
        for tenths in range(1, 10):
            (_, first), (_, second) = KernelSpec(slots=slots, share=tenths / 10).shares
            assert first + second == slots
            assert second == slots * (10 - tenths) // 10


def test_spec_survives_its_data():
    for spec in CORE + MAPS:
        assert KernelSpec.from_dict(spec.to_dict()) == spec
