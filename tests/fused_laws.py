"""The laws of the fused kernels, run by test_fused.py in a process where Triton interprets them (TRITON_INTERPRET=1).

python fused_laws.py LAW ...: prints each law and the exit status of its process; without one it reads their names.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext

import contract
import interpreted  # noqa: F401  repairs the interpreter
import pytest
import torch
import triton.language as tl
from tiny import tiny_llama
from tolerances import GRADIENT_TOLERANCE, assert_same
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction

from kernelize import fused_losses, losses
from kernelize.data import Row
from kernelize.objectives import NEW, Distil, Forecast, Objective, Transfer
from kernelize.recipe import DistilWeights, TransferWeights
from kernelize.runtime import (
    chunked,
    fused,
    fused_exact,
    fused_memory,
    fused_select,
    fused_step,
    fused_triton,
    reference,
)
from kernelize.runtime.fused_triton import constexpr
from kernelize.runtime.kept import holding
from kernelize.runtime.layout import whole_rows
from kernelize.runtime.modeling import kernelize_model
from kernelize.runtime.ops import attend, force, implementation
from kernelize.runtime.spec import KernelSpec, SpecError, mean_slots
from kernelize.runtime.state import Kernel, Rotation, cells, moved, unpacked
from kernelize.train import _means

FULL, HALF = torch.float32, torch.bfloat16
SIZES = (4, 2, 8)  # heads, key heads, head size
# exact sets and what they are for: shares of one and two scores, a window over several tiles, the smallest block
SMALL = {"feature_dim": 8, "sinks": 2, "slots": 6, "block": 8, "window": 9}
SPECS = (
    KernelSpec(**SMALL, decay="gated"),
    KernelSpec(**{**SMALL, "policy": "attention", "decay": "none"}),
    KernelSpec(**{**SMALL, "policy": "value", "window": 70, "block": 16, "sinks": 5}),
    KernelSpec(**{**SMALL, "policy": "recall", "feature_map": "elu", "feature_dim": 6}),
    KernelSpec(**{**SMALL, "slots": 0, "block": 4, "window": 1}),
    KernelSpec(**{**SMALL, "feature_map": "none", "policy": "attention"}),
    KernelSpec(**{**SMALL, "policy": "attention+forecast", "aging": 32}),
    KernelSpec(**{**SMALL, "policy": "value", "rule": "delta", "decay": "none"}),
    KernelSpec(**{**SMALL, "policy": "attention", "rule": "gated_delta", "decay": "gated"}),
)
SOME = SPECS[0], SPECS[8]
FAR = (  # beyond reach, by neighbouring pairs of channels, or by halves of some of them
    (SPECS[0].replace(reach=SPECS[0].least_reach), Rotation(torch.tensor([1.0, 0.3, 0.1, 0.02]), True)),
    (SPECS[5].replace(reach=SPECS[5].least_reach), Rotation(torch.tensor([1.0, 0.3]), False)),
)


def kernel_of(spec: KernelSpec, dtype=FULL, rotation: Rotation | None = None, **heads):
    return turning(contract.layer(spec, dtype, SIZES).kernel(0.5, **heads)._replace(rotation=rotation))


def turning(kernel: Kernel) -> Kernel:
    """Where a forecast asks for it, keys that carry their positions, in the first half of their channels."""
    spec = kernel.spec
    turns = Rotation(torch.tensor([1.3, 0.2]), spec.policy == "forecast") if spec.scores_by("forecast") else None
    return kernel._replace(key_rotation=turns)


def same_output(got, expected, what: str) -> None:
    for name, a, b in zip(expected._fields, expected, got, strict=True):
        assert_same(b.exp() if name == "memory_lse" else b, a.exp() if name == "memory_lse" else a, f"{what}: {name}")


def same_state(got, expected, what: str) -> None:
    """Slots may stand in another order: compared as sums over the position axis."""
    for name, a, b in zip(expected._fields, expected, got, strict=True):
        summed = name in ("keys", "values", "pos", "decay", "mass", "score")
        a, b = (x.sum(2) if summed else x for x in (a, b))
        assert_same(b.float(), a.float(), f"{what}: state {name}")


@torch.no_grad()
def forward() -> None:
    """fused = chunked: outputs, branches, state."""
    for spec in SPECS:
        kernel, (q, k, v) = kernel_of(spec), contract.tokens(1, 120, FULL, sizes=SIZES)
        out, state = fused.attend(q, k, v, kernel)
        expected, after = chunked.attend(q, k, v, kernel)
        same_output(out, expected, contract.name_of(spec))
        same_state(state, after, contract.name_of(spec))


@torch.no_grad()
def streams() -> None:
    """Any split of a padded batch; what is padding does not matter."""
    lengths, valid = [50, 3, 40], torch.rand(2, 93, generator=torch.Generator().manual_seed(3)) > 0.3
    valid[0] = True
    heads = {"softcap": 3.0, "sink_logits": torch.linspace(-1, 2, SIZES[0])}
    for spec in SOME:
        kernel, (q, k, v) = kernel_of(spec, **heads), contract.tokens(2, 93, FULL, sizes=SIZES)
        got = []
        for module in (fused, chunked):
            state, parts, start = None, [], 0
            for n in lengths:
                now = slice(start, start + n)
                piece = (x[:, :, now] for x in (q, k, v))
                out, state = module.attend(*piece, kernel, state, valid[:, now])
                parts.append(out.y)
                start += n
            got.append((torch.cat(parts, 2).transpose(1, 2)[valid], state))
        assert_same(got[0][0], got[1][0], "split")
        same_state(got[0][1], got[1][1], "split")


@torch.no_grad()
def prefill() -> None:
    """Without branches y equals chunked's; also in pieces, with softcap, sinks and odd groups."""
    cases = (
        (SPECS[0], SIZES, {"softcap": 3.0, "sink_logits": torch.linspace(-1, 2, 4)}, [70, 33]),
        (SPECS[2], (3, 1, 8), {}, [103]),
        (KernelSpec(**{**SMALL, "feature_dim": 12, "policy": "attention", "decay": "none"}), (5, 1, 8), {}, [103]),
        (SPECS[4], SIZES, {}, [103]),
    )
    for spec, sizes, heads, lengths in cases:
        kernel = contract.layer(spec, FULL, sizes).kernel(0.5, **heads)
        got, state, after = [], None, None
        for piece in zip(*(x.split(lengths, 2) for x in contract.tokens(1, 103, FULL, sizes=sizes)), strict=True):
            out, state = fused.attend(*piece, kernel, state, branches=False)
            expected, after = chunked.attend(*piece, kernel, after)
            assert out.memory.numel() == 0
            assert_same(out.y, expected.y, f"{contract.name_of(spec)} {sizes}")
            got.append(out.y)
        same_state(state, after, contract.name_of(spec))


@torch.no_grad()
def ahead() -> None:
    """Where many programs read the queries' matrices, these are split before: that is no other y, and training's."""
    few = fused_memory.MANY
    cases = (
        (SPECS[0], SIZES, HALF, [66, 9]),
        (KernelSpec(**{**SMALL, "feature_dim": 12, "policy": "attention", "decay": "none"}), (5, 1, 8), HALF, [66]),
        (KernelSpec(**{**SMALL, "feature_dim": 40, "policy": "attention"}), (2, 1, 20), torch.float16, [70]),
    )
    for spec, sizes, dtype, lengths in cases:
        attention = contract.layer(spec, FULL, sizes)
        attention.map_q.weight *= 3.0  # so that what rounding leaves of it matters
        tokens = [x.to(dtype).split(lengths, 2) for x in contract.tokens(1, sum(lengths), FULL, sizes=sizes)]
        found = []
        for many, branches in ((few, False), (0, spec is not SPECS[0])):
            fused_memory.MANY, state, parts = many, None, []
            for piece in zip(*tokens, strict=True):
                out, state = fused.attend(*piece, attention.kernel(0.5), state, branches=branches)
                parts.append(out.y.float())
            found.append(torch.cat(parts, 2))
        fused_memory.MANY = few
        for other in found[1:]:
            assert (found[0] - other).norm() < 1e-4 * found[0].norm(), (found[0] - other).norm() / found[0].norm()


@torch.no_grad()
def segments() -> None:
    """Segments of more than one tile: what a segment brought is added to its start."""
    fused_memory.PROGRAMS = 4
    kernel, (q, k, v) = kernel_of(SPECS[0]), contract.tokens(1, 170, FULL, sizes=SIZES)
    expected = chunked.attend(q, k, v, kernel)[0].y
    assert_same(fused.attend(q, k, v, kernel, branches=False)[0].y, expected, "y")


def short_tiles() -> None:
    """All by programs of several heads and short tiles, which elsewhere only wide heads of 16 bits have."""
    fused_select.WIDE = fused_select.LAUNCH
    forward, backward = (fused_exact.LAUNCH[name] for name in ("exact", "query_grad"))
    fused_exact.WIDE = fused_exact.WIDE | {"exact": forward}
    in_short_tiles()
    forward, backward = forward._replace(heads=2), backward._replace(heads=2)
    fused_exact.WIDE = fused_exact.WIDE | {"exact": forward, "query_grad": backward}
    same_gradients(SPECS[0], [70, 20])
    same_gradients(SPECS[2], [80])
    same_gradients(FAR[0][0], [FAR[0][0].reach + 20], FAR[0][1])


@torch.no_grad()
def in_short_tiles() -> None:
    small = {**SMALL, "policy": "attention"}
    for fields, sizes, heads, lengths in (
        ({"block": 16, "window": 64}, (4, 1, 8), {}, [150, 41]),
        ({"block": 16, "window": 80}, (8, 2, 8), {"softcap": 3.0}, [131]),
        ({"block": 1, "window": 30}, (3, 1, 8), {}, [70, 3]),
        ({"block": 32, "window": 1, "sinks": 0, "slots": 40}, (4, 1, 8), {}, [170]),
    ):
        spec, state, after = KernelSpec(**{**small, **fields}), None, None
        kernel = contract.layer(spec, FULL, sizes).kernel(0.5, **heads)
        tokens = (x.split(lengths, 2) for x in contract.tokens(1, sum(lengths), FULL, sizes=sizes))
        for piece in zip(*tokens, strict=True):
            out, state = fused.attend(*piece, kernel, state)
            expected, after = chunked.attend(*piece, kernel, after)
            same_output(out, expected, f"{fields} {sizes}")
        same_state(state, after, f"{fields} {sizes}")


def far() -> None:
    """Beyond reach: fused = chunked, whole and in pieces, and it matters."""
    length = 180
    for spec, rotation in FAR:
        kernel, (q, k, v) = kernel_of(spec, rotation=rotation), contract.tokens(1, length, FULL, sizes=SIZES)
        out, state = fused.attend(q, k, v, kernel)
        expected, after = chunked.attend(q, k, v, kernel)
        same_output(out, expected, contract.name_of(spec))
        same_state(state, after, contract.name_of(spec))
        near = chunked.attend(q, k, v, kernel._replace(rotation=None))[0]
        assert not torch.allclose(near.y[:, :, spec.reach + 8 :], out.y[:, :, spec.reach + 8 :])
        parts, state = [], None
        for piece in zip(*(x.split([140, 1, 39], 2) for x in (q, k, v)), strict=True):
            part, state = fused.attend(*piece, kernel, state)
            parts.append(part.y)
        assert_same(torch.cat(parts, 2), expected.y, "pieces")
        same_state(state, after, "pieces")


def derivatives(
    implementation, spec: KernelSpec, lengths: list[int], rotation: Rotation | None = None, alone: bool = False,
    logits: bool = True,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Gradients of something that depends on every branch and on the state at the end; `alone`: on y, as models do.

    Without sink `logits` both branches are one softmax, and so is their backward.
    """
    attention, generator = contract.layer(spec, FULL, SIZES), torch.Generator().manual_seed(5)
    leaves = dict(
        zip("qkv", (x.requires_grad_() for x in contract.tokens(1, sum(lengths), FULL, sizes=SIZES)), strict=True)
    )
    sink = torch.linspace(-1, 2, SIZES[0]).requires_grad_() if logits else None
    kernel, state, loss = attention.kernel(0.5, softcap=4.0, sink_logits=sink), None, torch.zeros(())
    kernel = kernel._replace(rotation=rotation)
    given = [x.transpose(1, 2).contiguous().transpose(1, 2) if alone else x for x in leaves.values()]
    for piece in zip(*(x.split(lengths, 2) for x in given), strict=True):
        out, state = implementation.attend(*piece, kernel, state)
        if alone:  # all is laid out by token
            y = out.y.transpose(1, 2)
            loss = loss + (y * torch.randn(y.shape, generator=generator)).sum()
            continue
        finite = torch.where(out.memory_lse > -torch.inf, out.memory_lse, 0.0)
        for x in (out.y, out.exact, out.exact_lse, out.memory, finite):
            loss = loss + (x * torch.randn(x.shape, generator=generator)).sum()
    if not alone:
        loss = loss + (state.memory * torch.randn(state.memory.shape, generator=generator)).sum() + state.decay.sum()
    loss.backward()
    given = [*leaves.items(), *attention.named_parameters(), *([("sink", sink)] if logits else [])]
    return {name: x.grad for name, x in given}


def gradients() -> None:
    """Of q, k, v, maps, gate, decay, sinks; also through the state of an earlier call and over several segments."""
    torch.use_deterministic_algorithms(True)  # what no kernel has written is NaN
    fused_memory.PROGRAMS = fused_exact.PROGRAMS = 4  # segments of more than one tile
    fused_exact.WALKS = 1
    # the first has two tiles in each of two segments: what decays from tile to tile counts in the second alone
    for spec, lengths in ((SPECS[0], [200]), (SPECS[2], [130]), (SPECS[4], [70, 40]), (SPECS[8], [150, 20])):
        same_gradients(spec, lengths)
    same_gradients(SPECS[0], [90], alone=True)
    same_gradients(SPECS[0], [70, 20], alone=True, logits=False)
    same_gradients(SPECS[1], [70], logits=False)
    same_gradients(SPECS[7], [140], alone=True, logits=False)
    fused_memory.WIDE = fused_memory.WIDE._replace(chunk=256)  # several programs for the features of a tile
    same_gradients(SPECS[2].replace(feature_dim=40), [70], alone=True, logits=False)
    out, _ = fused.attend(*contract.tokens(1, 90, FULL, sizes=SIZES), kernel_of(SPECS[2]))
    assert out.y.requires_grad
    assert not out.exact.requires_grad  # of the maps alone: the exact branch has no backward


def far_gradients() -> None:
    """The same beyond reach."""
    spec, rotation = FAR[0]
    for given in (spec, spec.replace(sinks=0, slots=0)):
        same_gradients(given, [spec.reach + 40], rotation)
    same_gradients(spec, [spec.reach + 40], rotation, alone=True, logits=False)


def some_gradients() -> None:
    """Of what is trained alone: maps without their tokens, one map, tokens without maps."""
    torch.use_deterministic_algorithms(True)
    spec = KernelSpec(**SMALL, policy="attention")

    def asked(implementation, tokens: str, weights: tuple[str, ...]) -> dict[str, torch.Tensor]:
        attention = contract.layer(spec, FULL, SIZES)
        given = dict(zip("qkv", contract.tokens(1, 80, FULL, sizes=SIZES), strict=True))
        named = given | dict(attention.named_parameters())
        wanted = {name: x.requires_grad_() for name, x in named.items() if name in (*tokens, *weights)}
        for name in named.keys() - wanted.keys():
            named[name].requires_grad_(False)
        y = implementation.attend(*given.values(), attention.kernel(0.5))[0].y
        up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        return dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), up), strict=True))

    both = "map_q.weight", "map_k.weight"
    for tokens, weights in (("", both), ("", both[:1]), ("q", ()), ("kv", both[1:]), ("v", ())):
        expected = asked(chunked, tokens, weights)
        for name, got in asked(fused, tokens, weights).items():
            assert_same(got, expected[name], f"{name} of {tokens!r} and {weights}", GRADIENT_TOLERANCE)


def same_gradients(
    spec: KernelSpec, lengths: list[int], rotation: Rotation | None = None, alone: bool = False, logits: bool = True
) -> None:
    expected = derivatives(chunked, spec, lengths, rotation, alone, logits)
    for name, got in derivatives(fused, spec, lengths, rotation, alone, logits).items():
        what = f"{contract.name_of(spec)}: gradient of {name}"
        assert_same(got, expected[name], what, GRADIENT_TOLERANCE)


def by_head(spec: KernelSpec, head_slots: tuple[int, ...]) -> KernelSpec:
    """The spec as implementations see it when each KV head has its own slots."""
    return spec.replace(slots=mean_slots(head_slots), head_slots=head_slots).spread


@torch.no_grad()
def lifetimes() -> None:
    """The same deaths as chunked's, also with ties: any capacities, several segments, groups in several levels."""
    fused_select.SEGMENT = 64
    for given, policy, group, n in (
        (1, "mixed", 16, 192), (5, "value", 2, 448), (12, "mixed", 4, 192), (40, "mixed", 2, 448),
        ((0, 40), "mixed", 2, 192),
    ):  # fmt: skip
        fused_select.ALONE = fused_select.GROUP = group
        spec = KernelSpec(feature_dim=8, sinks=0, slots=1, policy=policy, block=8, window=1)
        spec = by_head(spec, given) if isinstance(given, tuple) else spec.replace(slots=given)
        slots = spec.slots
        X = n - 8
        score = torch.randint(0, 9, (2, X, len(spec.shares))).float()
        arrive = (torch.arange(X) // 8 + 1).expand(1, 2, -1)
        pad = (0, 0, slots, 0)  # chunked's store begins with places for the state's holders
        expected = chunked.lifetimes(
            spec,
            torch.nn.functional.pad(score, pad)[None],
            torch.nn.functional.pad(arrive, (slots, 0), value=n // 8),
            n // 8,
        )[-1][0, :, slots:]
        applicants = torch.cat([torch.full((8,), -1), torch.arange(X)]).int().expand(2, -1).contiguous()
        scores = [s.contiguous() for s in score.unbind(-1)]
        lives = fused_select.lifetimes(spec, applicants, scores, applicants[:, :0])
        assert torch.equal(lives.death.long(), expected), f"{given} slots by {policy}"
        holds = (expected >= n // 8).sum(1)
        assert torch.equal((lives.holders >= 0).sum(1), holds), f"{given} slots by {policy}: holders"


BY_HEAD = (  # the second has a place that no head owns
    SPECS[0].replace(slots=11, head_slots=(3, 19)),
    SPECS[1].replace(slots=4, head_slots=(7, 0), aging=32),
)


def heads() -> None:
    """Slots by KV head: outputs, states and gradients, whole and in padded pieces; the state stays packed."""
    fused_select.SEGMENT = 64  # less work than with one for all
    same_outputs_by_head()
    same_gradients(BY_HEAD[0], [70, 20])


@torch.no_grad()
def same_outputs_by_head() -> None:
    lengths, valid = [33, 37], torch.rand(2, 70, generator=torch.Generator().manual_seed(3)) > 0.3
    valid[0] = True
    for spec in BY_HEAD:
        assert fused.unsupported(spec) is None
        kernel, tokens = kernel_of(spec), contract.tokens(2, 70, FULL, sizes=SIZES)
        first = [x[:1] for x in tokens]
        out, state = fused.attend(*first, kernel)
        expected, after = chunked.attend(*first, kernel)
        same_output(out, expected, contract.name_of(spec))
        assert state.pos.shape[2] == spec.positions
        same_state(*(unpacked(kernel, x)[1] for x in (state, after)), contract.name_of(spec))
        state = after = None
        for *piece, keep in zip(*(x.split(lengths, 2) for x in tokens), valid.split(lengths, 1), strict=True):
            out, state = fused.attend(*piece, kernel, state, keep, branches=False)
            expected, after = chunked.attend(*piece, kernel, after, keep)
            assert_same(out.y.transpose(1, 2)[keep], expected.y.transpose(1, 2)[keep], "pieces")
            same_state(*(unpacked(kernel, x)[1] for x in (state, after)), "pieces")


def in_order(spec: KernelSpec, state):
    """The state with the holders of each share by position: kernels put them elsewhere than the reference."""
    if spec.is_packed:
        spec, state = spec.spread, moved(state, spec, cells(spec)[0])
    first, parts = spec.sinks + spec.ring, [torch.arange(spec.sinks + spec.ring).expand(*state.pos.shape[:2], -1)]
    for _, capacity in spec.shares if spec.slots else ():
        parts.append(first + state.pos[:, :, first : first + capacity].argsort(-1))
        first += capacity
    index, count = torch.cat(parts, -1), spec.sinks + spec.ring

    def take(x, at):
        return x.gather(2, reference.spread(at, x))

    sorted_by = {name: take(getattr(state, name), index) for name in ("keys", "values", "pos", "decay", "mass")}
    return state._replace(**sorted_by, score=take(state.score, index[:, :, count:] - count))


CAPPED = {"softcap": 3.0, "sink_logits": torch.linspace(-1, 2, 4)}
STEP_SPECS = (  # spec, (heads, key heads, head size), the rest of the head
    (KernelSpec(**{**SMALL, "aging": 20, "share": 0.7}, decay="gated"), (4, 2, 8), {}),
    (KernelSpec(**{**SMALL, "policy": "value+recall", "block": 2, "window": 4, "sinks": 0, "slots": 3}), (2, 1, 8), {}),
    (KernelSpec(**{**SMALL, "policy": "attention", "decay": "none", "slots": 20, "block": 4}), (3, 1, 8), CAPPED),
    (KernelSpec(**{**SMALL, "feature_map": "none", "policy": "attention+value"}), (2, 1, 8), {}),
    (KernelSpec(**{**SMALL, "slots": 5, "head_slots": (4, 9, 0), "block": 4}, decay="gated"), (3, 3, 8), {}),
    (KernelSpec(**{**SMALL, "policy": "attention+forecast", "aging": 32, "block": 4}), (2, 1, 8), {}),
    (KernelSpec(**{**SMALL, "policy": "forecast", "feature_map": "none", "decay": "none"}), (2, 2, 8), {}),
)


@torch.no_grad()
def steps() -> None:
    """Each step in place gives the reference's output and state, also in a batch where rows wait."""
    length = 34
    valid = torch.rand(2, length, generator=torch.Generator().manual_seed(4)) > 0.25
    valid[0] = True
    for spec, sizes, heads in STEP_SPECS:
        attention = contract.layer(spec, FULL, sizes)
        extra = {name: value[: sizes[0]] if isinstance(value, torch.Tensor) else value for name, value in heads.items()}
        kernel, (q, k, v) = turning(attention.kernel(0.5, **extra)), contract.tokens(2, length, FULL, sizes=sizes)
        v[:, :, 1::2] = v[:, :, ::2]  # ties between scores by value
        state = reference.empty_state(spec, k, v)
        mine = state.map(torch.clone)
        for t in range(length):
            now, keep = [x[:, :, t : t + 1] for x in (q, k, v)], valid[:, t]
            what = f"{contract.name_of(spec)}, token {t}"
            assert fused_step.supports(kernel, *now, mine) is None
            got, mine = fused_step.step(*now, kernel, mine, keep, in_place=True)
            expected, state = reference.step(*now, kernel, state, keep)
            assert_same(got.y[keep], expected.y[keep], what)
            for name, a, b in zip(state._fields, in_order(spec, mine), in_order(spec, state), strict=True):
                assert_same(a.float(), b.float(), f"{what}: {name}")


def steps_of_many_rows() -> None:
    """The same where a program takes all of a key head."""
    fused_step.FEW = 0
    steps()
    steps_in_low_precision()


@torch.no_grad()
def far_steps() -> None:
    """The same beyond reach, from a state that was read before."""
    for spec, rotation in FAR:
        kernel, length = kernel_of(spec, rotation=rotation), spec.reach + 6
        q, k, v = contract.tokens(1, length, FULL, sizes=SIZES)
        before = spec.reach - 6
        state = chunked.attend(*(x[:, :, :before] for x in (q, k, v)), kernel)[1]
        mine = state.map(lambda x: x.clone(memory_format=torch.contiguous_format))
        for t in range(before, length):
            now = [x[:, :, t : t + 1] for x in (q, k, v)]
            got, mine = fused_step.step(*now, kernel, mine, in_place=True)
            expected, state = reference.step(*now, kernel, state)
            assert_same(got.y, expected.y, f"{contract.name_of(spec)}, token {t}")
            for name, a, b in zip(state._fields, in_order(spec, mine), in_order(spec, state), strict=True):
                assert_same(a.float(), b.float(), f"{contract.name_of(spec)}, token {t}: {name}")


@torch.no_grad()
def steps_in_low_precision() -> None:
    """16-bit states stay near the reference on the same state, with a head size that is no power of two."""
    for dtype, sizes in ((HALF, (3, 1, 24)), (torch.float16, (2, 1, 16))):
        spec = KernelSpec(**{**SMALL, "aging": 30})
        attention = contract.layer(spec, FULL, sizes)
        kernel, (q, k, v) = attention.kernel(0.5), contract.tokens(1, 34, dtype, sizes=sizes)
        state = reference.empty_state(spec, k, v)
        for t in range(34):
            now = [x[:, :, t : t + 1] for x in (q, k, v)]
            got, after = fused_step.step(*now, kernel, state)
            expected, state = reference.step(*now, kernel, state)
            assert got.y.dtype == after.keys.dtype == dtype
            assert_same(got.y.to(HALF), expected.y.to(HALF), f"{dtype}, token {t}")
            assert_same(after.memory, state.memory, f"{dtype}, token {t}: memory")


@torch.no_grad()
def low_precision() -> None:
    """bfloat16 stays near float32 on the same tokens, whoever holds the slots."""
    for spec in (SPECS[2], SPECS[7]):
        kernel, (q, k, v) = kernel_of(spec), contract.tokens(1, 120, HALF, sizes=SIZES)
        out, state = fused.attend(q, k, v, kernel, branches=False)
        expected, _ = fused.attend(*(x.float() for x in (q, k, v)), kernel)
        assert out.y.dtype == state.keys.dtype == HALF
        assert state.memory.dtype == FULL
        assert out.memory.numel() == 0
        assert_same(out.y, expected.y, f"bfloat16, {spec.rule}")


def weights_in_low_precision() -> None:
    """What the delta rules add cancels out: all parameters' gradients stay near float64's in bfloat16 all the same."""
    for spec in SPECS[7:9]:
        given = spec.replace(policy="value", feature_dim=64, block=16)
        found = [weight_gradients(fused, given, HALF), weight_gradients(chunked, given, torch.float64)]
        for name, got in found[0].items():
            assert_same(got.to(HALF), found[1][name], f"{spec.rule}: gradient of {name}", GRADIENT_TOLERANCE)


def weight_gradients(implementation, spec: KernelSpec, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Of a layer's parameters, for the same tokens in bfloat16 whatever the dtype."""
    sizes = (4, 2, 32)
    attention = contract.layer(spec, torch.promote_types(dtype, FULL), sizes)
    tokens = (x.to(HALF).to(dtype) for x in contract.tokens(1, 260, FULL, sizes=sizes))
    y = implementation.attend(*tokens, attention.kernel(32**-0.5))[0].y
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return {name: x.grad for name, x in attention.named_parameters()}


def mixed_precision() -> None:
    """Under autocast float32 queries and keys join bfloat16 values; sums stay float32, gradients reach the leaves."""
    fused_exact.CAST = 0  # as for many rows
    spec = SPECS[2]
    attention = contract.layer(spec, FULL, SIZES)
    q, k, v = (x.requires_grad_() for x in contract.tokens(1, 90, FULL, sizes=SIZES))
    with torch.autocast("cpu", torch.bfloat16):
        out, state = attend(q, k, v.to(HALF), attention.kernel(0.5))
    expected = fused.attend(*(x.to(HALF) for x in (q, k, v)), attention.kernel(0.5))[0]
    assert out.y.dtype == HALF
    assert state.memory.dtype == FULL
    assert torch.equal(out.y, expected.y)
    out.y.float().square().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == FULL and x.grad.isfinite().all() for x in (q, k, v))


def choice() -> None:
    """Supported tensors go to the kernels, others to chunked with a reason; forcing what cannot be is an error."""
    kernel, (q, k, v) = kernel_of(SPECS[0]), contract.tokens(1, 5, FULL, sizes=SIZES)
    assert implementation(kernel, q, k, v) == "fused"
    with force("chunked"):
        assert implementation(kernel, q, k, v) == "chunked"
    refused = {
        "block": kernel._replace(spec=SPECS[0].replace(block=24)),
        "feature_dim": kernel._replace(spec=SPECS[0].replace(feature_dim=512)),
        "slots": kernel._replace(spec=SPECS[0].replace(slots=1001, head_slots=(2000, 2))),
        "policy": kernel._replace(spec=SPECS[0].replace(policy="keydiff")),
    }
    for word, other in refused.items():
        reason = fused.supports(other, q, k, v)
        assert reason is not None
        assert reason.startswith(word)
        assert implementation(other, q, k, v) == "chunked"
    assert "float64" in fused.supports(kernel, *(x.double() for x in (q, k, v)))
    with force("fused"), pytest.raises(SpecError, match="block=24"):
        implementation(refused["block"], q, k, v)


@fused_triton.jit
def beyond_kernel(X, SIZE: constexpr):
    at = tl.arange(0, SIZE)
    tl.store(X + at, tl.load(X + at, mask=at < SIZE - 1, other=0.0), mask=at < SIZE)


def bounds() -> None:
    """Float32 gradients of heads without padding touch nothing but their tensors, and the interpreter would notice."""
    with pytest.raises(InterpreterError, match="none of its tensors"):
        beyond_kernel[(1,)](torch.zeros(15), SIZE=16)
    beyond_kernel[(1,)](torch.zeros(16), SIZE=16)
    spec, sizes = KernelSpec(feature_dim=64, window=64, sinks=4, slots=20, block=16), (3, 1, 64)
    for given in (spec, spec.replace(rule="gated_delta", policy="attention", window=16)):
        q, k, v = (x.requires_grad_() for x in contract.tokens(1, 140, FULL, sizes=sizes))
        kernel = contract.layer(given, FULL, sizes).kernel(0.125)
        y = fused.attend(q, k, v, kernel)[0].y
        assert_same(y, chunked.attend(q, k, v, kernel)[0].y, given.rule)
        y.sum().backward()
        assert all(x.grad.isfinite().all() for x in (q, k, v))


def divergence() -> None:
    """Of two LM heads: kernels = dense, with gradients, for vocabularies of one and of several steps."""
    generator = torch.Generator().manual_seed(0)
    fused_losses.COLUMNS = 16
    elsewhere = torch.nn.Linear(6, 19, bias=False)  # as ZeRO-3 leaves it between two calls of the module
    elsewhere.weight.data = torch.empty(0)
    assert fused_losses.head_weight(elsewhere) is None
    weights = torch.tensor([0.3, 0.0, 1e-7])
    assert 0.3 <= fused_losses.unit_of(weights) == fused_losses.unit_of(weights).bfloat16() < 0.6
    nothing = (
        torch.zeros(0, 6, requires_grad=True),
        torch.zeros(0, 5),
        torch.zeros(0).long(),
        *(torch.zeros(0) > 0,) * 2,
    )
    heads = [torch.nn.Linear(width, 19, bias=False) for width in (6, 5)]
    empty = losses.distillation(*nothing, *heads, DistilWeights(), 19)
    assert empty.loss == 0
    assert not torch.autograd.grad(empty.loss, heads[0].weight)[0].any()
    for V, temperature in ((19, 1.0), (19, 2.0), (70, 1.0), (16, 3.0)):
        heads = [torch.nn.Linear(width, V, bias=False) for width in (6, 5)]
        x, t = torch.randn(13, 6, generator=generator, requires_grad=True), torch.randn(13, 5, generator=generator)
        labels = torch.randint(0, V, (13,), generator=generator).masked_fill(torch.arange(13) % 5 == 2, -100)
        asked, beyond = torch.arange(13) % 3 == 0, torch.arange(13) >= 10
        for weights in (DistilWeights(temperature=temperature),
                        DistilWeights(kl=0.7, ce=0.3, answer=0.2, beyond=0.4, temperature=temperature)):  # fmt: skip
            for held in (1, 4 * V, 1 << 20):
                losses.LOGITS_HELD["cpu"] = held
                found = []
                for given in (heads, [lambda y, head=head: head(y) for head in heads]):
                    assert (fused_losses.head_weight(given[0]) is None) == (given is not heads)
                    got = losses.distillation(
                        x, t, labels, asked, beyond, *given, weights, V, torch.tensor([11.0, 3.0])
                    )
                    grads = torch.autograd.grad(0.3 * got.loss, (x, heads[0].weight))
                    found.append((*got, *grads))
                for a, b in zip(*found, strict=True):
                    assert_same(a, b, f"V={V}, temperature={temperature}, {held} held", GRADIENT_TOLERANCE)


class Unasked(TorchDispatchMode):
    """Refuses what would make a device wait for the host, or let a CUDA graph read the host's memory.

    Tensors on "meta" have no numbers, so a look at one fails by itself; here it is found that the host's come in.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if any(x.device.type != "meta" for x in found):
            raise AssertionError(f"{func} cannot be captured")
        return out


class Handmade(TorchFunctionMode):
    """The same for tensors that are made of Python's numbers, which on "meta" no operation shows."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        index = args[1] if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) else ()
        of_numbers = any(isinstance(part, list) for part in (index if isinstance(index, tuple) else (index,)))
        if of_numbers or func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            raise AssertionError(f"{func} cannot be captured")
        return func(*args, **(kwargs or {}))


def on_meta(model: torch.nn.Module) -> torch.nn.Module:
    return model.to("meta").requires_grad_(True).train()


def objectives_of(spec: KernelSpec, family: Callable[..., PreTrainedModel]) -> list[Objective]:
    """Of all kinds of stages whose micro-steps may be CUDA graphs."""
    teacher, made = on_meta(family()), [Transfer, Distil] if spec.has_memory else [Distil]
    found = []
    for kind in [*made, Forecast] if spec.scores_by("forecast") else made:
        student = on_meta(kernelize_model(family(), [None, spec]))
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(kind is Distil or NEW in name)
        given = {
            Transfer: (TransferWeights(),),
            Forecast: (True,),
            Distil: (teacher.requires_grad_(False), DistilWeights(ce=0.5, answer=0.5, beyond=0.2)),
        }
        found.append(kind(student, *given[kind]))
    return found


def small_gemma() -> PreTrainedModel:
    """Soft caps in attention and after the head, whose logits are then divided in chunks; a window of its own."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 257, "head_dim": 8}
    return Gemma2ForCausalLM(Gemma2Config(**shape, num_attention_heads=4, num_key_value_heads=2, sliding_window=8))


def capturable() -> None:
    """A micro-step of a warm shape asks the device for nothing, forward or backward; what it keeps it has."""
    InterpretedFunction.__getitem__ = lambda self, grid: lambda *_, **__: None  # there is nothing to compute
    torch.is_autocast_enabled, torch.autocast = lambda *_: False, lambda *_, **__: nullcontext()  # unknown there
    new = {"device": "meta", "dtype": torch.int64}
    rows = Row(*(torch.empty(2, 200, **new) for _ in range(3)), torch.empty(2, 200, device="meta").bool())
    counts, packed = torch.ones(2, device="meta"), SPECS[0].replace(slots=6, head_slots=(4, 8))
    for spec, family in [*((spec, tiny_llama) for spec in (*SPECS, packed)), (SPECS[0], small_gemma)]:
        for objective in objectives_of(spec, family):

            def micro(objective: Objective = objective) -> None:
                found = objective(*rows, counts)
                found.loss.backward()
                _means(found, counts, list(objective.terms.values()))

            with force("fused"), whole_rows():
                micro()
                with Unasked(), Handmade(), holding() as held:
                    micro()
            assert held.found
            assert not held.made
            objective.close()
    for looks in (lambda x: x[[0, 1]], lambda x: x.new_tensor([1.0]), lambda x: x + torch.empty(()).cpu()):
        with pytest.raises(AssertionError, match="cannot be captured"), Unasked(), Handmade():
            looks(torch.empty(3, device="meta"))
    for looks in (bool, torch.Tensor.tolist, torch.Tensor.cpu, torch.nonzero, lambda x: x[x > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            looks(torch.empty(1, device="meta"))


LAWS = (
    forward, streams, prefill, ahead, segments, gradients, some_gradients, lifetimes, low_precision,
    weights_in_low_precision, mixed_precision, choice, steps, steps_of_many_rows, steps_in_low_precision, far,
    far_gradients, far_steps, bounds, heads, divergence, capturable, short_tiles,
)  # fmt: skip
LIMIT = 240  # seconds a law, less than pytest's, so that the next one finds nothing in its way


def status(law: str) -> int:
    """Exit status of a law in a process of its own: laws set constants of the kernels."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(LIMIT)
    try:
        torch.manual_seed(0)
        {found.__name__: found for found in LAWS}[law]()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or map(str.strip, sys.stdin):
        print(name, status(name), flush=True)
