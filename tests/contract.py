"""The laws of the operation, for any spec: what every map, rule, decay and policy inherits.

A law takes a spec (and what it varies) and asserts. Specs come from the registries, so a new entry is tested at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import definition
import torch
from tolerances import GRADIENT_TOLERANCE, TOLERANCE, UNTRAINED_TOLERANCE, assert_same
from torch import Tensor

from kernelize.runtime import chunked, reference
from kernelize.runtime.attention import KernelAttention
from kernelize.runtime.feature_maps import FEATURE_MAPS
from kernelize.runtime.layout import layout_of
from kernelize.runtime.ops import attend
from kernelize.runtime.spec import DECAYS, NO_MEMORY, POLICIES, RULES, KernelSpec, SpecError
from kernelize.runtime.state import Kernel, Rotation, Seen

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 4
LENGTH = 41
PAIRS = ("learned+recall", "keydiff+learned")  # beside the policies that have a name

EXACT_SETS: tuple[dict, ...] = (
    {"window": 4, "block": 4, "sinks": 2, "slots": 5},
    {"window": 5, "block": 4, "sinks": 5, "slots": 6, "aging": 9},
    {"window": 3, "block": 1, "sinks": 0, "slots": 3},
    {"window": 8, "block": 8, "sinks": 1, "slots": 2, "aging": 40},
    {"window": 6, "block": 2, "sinks": 3, "slots": 0},
    {"window": 5, "block": 2, "sinks": 1, "slots": 4, "head_slots": (7, 0)},
)


# --- specs --------------------------------------------------------------------------------------------------


def feature_dim(feature_map: str) -> int:
    """The size nearest above 8 that a map takes."""
    for size in itertools.chain(range(8, 65), range(7, 0, -1)):
        try:
            return KernelSpec(feature_map=feature_map, feature_dim=size, policy="value").feature_dim
        except SpecError:
            continue
    raise AssertionError(f"{feature_map} takes no size up to 64")


def admitted(**fields) -> list[KernelSpec]:
    """The spec of these fields, or nothing where it is refused."""
    try:
        return [KernelSpec(**fields)]
    except SpecError:
        return []


def choices() -> list[dict]:
    """Every map × rule × decay × policy that the spec admits with slots, and every policy without a memory."""
    names = itertools.product(FEATURE_MAPS, RULES, DECAYS, POLICIES + PAIRS)
    fields = ("feature_map", "rule", "decay", "policy")
    found = [dict(zip(fields, c, strict=True), feature_dim=feature_dim(c[0])) for c in names]
    found += [{"feature_map": NO_MEMORY, "policy": policy} for policy in POLICIES + PAIRS]
    return [c for c in found if admitted(**c)]


def all_specs() -> list[KernelSpec]:
    """Every choice with every exact set that the spec admits."""
    return [s for c, exact in itertools.product(choices(), EXACT_SETS) for s in admitted(**c, **exact)]


def core_specs() -> list[KernelSpec]:
    """Every rule × decay × policy with one map, the exact sets in turn: for laws that a map cannot break."""
    name = next(iter(FEATURE_MAPS))
    mine = [c for c in choices() if c["feature_map"] in (name, NO_MEMORY)]
    return in_turn(mine)


def map_specs() -> list[KernelSpec]:
    """Every map with every rule × decay; policies and exact sets in turn."""
    return in_turn(one_of_each(choices(), "feature_map", "rule", "decay"))


def few_specs() -> list[KernelSpec]:
    """Every rule × decay and every policy, each once."""
    mine = [c for c in choices() if c["feature_map"] in (next(iter(FEATURE_MAPS)), NO_MEMORY)]
    return list(dict.fromkeys(in_turn(one_of_each(mine, "rule", "decay") + one_of_each(mine, "policy"))))


def one_of_each(found: list[dict], *fields: str) -> list[dict]:
    """A choice for each combination of these fields; the others in turn."""
    groups: dict[tuple, list[dict]] = {}
    for c in found:
        groups.setdefault(tuple(c.get(f) for f in fields), []).append(c)
    return [g[i % len(g)] for i, g in enumerate(groups.values())]


def in_turn(found: list[dict]) -> list[KernelSpec]:
    turns = itertools.cycle(EXACT_SETS)
    return [s for c, exact in zip(found, turns, strict=False) for s in admitted(**c, **exact)]


def name_of(spec: KernelSpec) -> str:
    slots = "_".join(map(str, spec.head_slots)) or spec.slots
    exact = f"w{spec.window}b{spec.block}s{spec.sinks}c{slots}"
    return f"{spec.feature_map}-{spec.rule}-{spec.decay}-{spec.policy}-{exact}"


# --- layers and inputs --------------------------------------------------------------------------------------


def layer(
    spec: KernelSpec, dtype: torch.dtype = torch.float64, sizes=(HEADS, KV_HEADS, HEAD_DIM), spread: float = 0.3
) -> KernelAttention:
    """A layer with random parameters, a memory that matters, and a decay that shows within a few tokens.

    With a `spread` of 0 everything but these two is as it is before training.
    """
    generator = torch.Generator().manual_seed(1)
    attention = KernelAttention(spec, *sizes)
    with torch.no_grad():
        for module in attention.modules():
            if module is attention or type(module) in FEATURE_MAPS.values():
                module.reset()
        for name, p in attention.named_parameters():
            p += spread * torch.randn(p.shape, generator=generator) + {"log_gate": 4.0, "log_rate": 4.0}.get(name, 0.0)
    return attention.to(dtype)


def kernel_of(attention: KernelAttention, rotation: Rotation | None = None, **heads) -> Kernel:
    scaling = attention.map_q.head_dim**-0.5 if attention.spec.has_memory else 0.5
    forecasts = attention.spec.scores_by("forecast")
    return attention.kernel(scaling, **heads)._replace(rotation=rotation, key_rotation=rotation if forecasts else None)


def tokens(batch: int, length: int, dtype: torch.dtype = torch.float64, seed: int = 0, sizes=None, scale: float = 1.0):
    """Random q [B, H, T, D], k and v [B, Hk, T, D]."""
    heads, kv_heads, head_dim = sizes or (HEADS, KV_HEADS, HEAD_DIM)
    generator = torch.Generator().manual_seed(seed)

    def draw(h: int, by: float) -> Tensor:
        return (by * torch.randn(batch, h, length, head_dim, generator=generator, dtype=torch.float64)).to(dtype)

    return draw(heads, 2 * scale), draw(kv_heads, scale), draw(kv_heads, 1.0)


def softmax(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=kernel.scaling)


def by_pieces(q, k, v, kernel: Kernel, lengths: list[int], valid: Tensor | None = None) -> Tensor:
    """y of consecutive calls on pieces of these lengths, each continuing from the state before."""
    state, parts = None, []
    for piece in zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True):
        start = sum(p.shape[2] for p in parts)
        keep = None if valid is None else valid[:, start : start + piece[0].shape[2]]
        out, state = attend(*piece, kernel, state, keep)
        parts.append(out.y)
    return torch.cat(parts, 2)


# --- laws ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def law_definition(spec: KernelSpec, **heads) -> None:
    """definition = reference = chunked."""
    kernel = kernel_of(layer(spec), **heads)
    q, k, v = tokens(1, LENGTH)
    expected = definition.attend(q[0], k[0], v[0], kernel)[None]
    assert_same(reference.attend(q, k, v, kernel)[0].y, expected, "reference")
    assert_same(chunked.attend(q, k, v, kernel)[0].y, expected, "chunked")


@torch.no_grad()
def law_branches(spec: KernelSpec) -> None:
    """Both implementations return the same branches, and the branches make y."""
    kernel, (q, k, v) = kernel_of(layer(spec)), tokens(1, LENGTH)
    one, other = (f(q, k, v, kernel)[0] for f in (reference.attend, chunked.attend))
    for name, a, b in zip(one._fields, one, other, strict=True):
        assert_same(b.exp() if name == "memory_lse" else b, a.exp() if name == "memory_lse" else a, name)
    weight = torch.sigmoid(one.exact_lse - one.memory_lse)[..., None]
    assert_same(weight * one.exact + (1 - weight) * one.memory, one.y, "y from its branches")


@torch.no_grad()
def law_streams(spec: KernelSpec, lengths: list[int], valid: Tensor, **heads) -> None:
    """Any split of any padded batch [B, T] gives what each row gives alone, one token at a time."""
    kernel, (q, k, v) = kernel_of(layer(spec), **heads), tokens(*valid.shape)
    got = by_pieces(q, k, v, kernel, lengths, valid)
    for row, keep in enumerate(valid):
        if keep.any():
            alone = (x[row : row + 1, :, keep] for x in (q, k, v))
            assert_same(got[row : row + 1, :, keep], reference.attend(*alone, kernel)[0].y, f"row {row}")


@torch.no_grad()
def law_causal(spec: KernelSpec, changed: int) -> None:
    """Changing a token changes nothing before it, in either implementation, and does change its own output."""
    kernel, (q, k, v) = kernel_of(layer(spec)), tokens(1, LENGTH)
    others = tokens(1, LENGTH, seed=1)
    new = [x.clone() for x in (q, k, v)]
    for x, other in zip(new, others, strict=True):
        x[:, :, changed] = 10 * other[:, :, changed]
    for implementation in (reference, chunked):
        before, after = (implementation.attend(*x, kernel)[0].y for x in ((q, k, v), new))
        assert_same(after[:, :, :changed], before[:, :, :changed], f"before token {changed}")
        assert not torch.equal(after[:, :, changed], before[:, :, changed])


@torch.no_grad()
def law_softmax(spec: KernelSpec) -> None:
    """Where every token is seen exactly, the operation is softmax attention."""
    kernel, (q, k, v) = kernel_of(layer(spec)), tokens(2, LENGTH)
    if kernel.score_bias is not None:
        kernel = kernel._replace(score_bias=kernel.score_bias + 60)  # a learned score weighs its slots, unless certain
    expected = softmax(q, k, v, kernel)
    for implementation in (reference, chunked):
        assert_same(implementation.attend(q, k, v, kernel)[0].y, expected, implementation.__name__)


@torch.no_grad()
def law_untrained(spec: KernelSpec, default: KernelSpec) -> None:
    """With its initial parameters, `spec` computes what `default` does."""
    outputs = []
    for each in (spec, default):
        attention = layer(each, torch.float32, spread=0.0)
        outputs.append(chunked.attend(*tokens(2, LENGTH, torch.float32), kernel_of(attention))[0].y)
    weighs = spec.sink_logits or spec.learned_share is not None
    allowed = UNTRAINED_TOLERANCE if weighs else TOLERANCE
    assert_same(*outputs, "untrained", allowed)


def gradients(run: Callable[..., Tensor], attention: KernelAttention, inputs, weight: Tensor, **heads) -> list[Tensor]:
    """Of Σ weight·y with y = run(q, k, v, kernel): for q, k, v and every parameter."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = run(*leaves, kernel_of(attention, **heads))
    wanted = leaves + list(attention.parameters())
    found = torch.autograd.grad((y * weight).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]


def by_reference(*given) -> Tensor:
    return reference.attend(*given)[0].y


def by_chunks(*given) -> Tensor:
    return chunked.attend(*given)[0].y


def law_gradients(spec: KernelSpec, lengths: list[int], **heads) -> None:
    """reference = chunked = chunked through the states of a split, for the gradients of inputs and all parameters."""
    attention, inputs = layer(spec), tokens(2, LENGTH)
    weight = tokens(2, LENGTH, seed=2)[0]
    runs = (by_reference, by_chunks, lambda *given: by_pieces(*given, lengths))
    found = [gradients(run, attention, inputs, weight, **heads) for run in runs]
    names = ["q", "k", "v", *(name for name, _ in attention.named_parameters())]
    for name, one, other, split in zip(names, *found, strict=True):
        assert_same(other, one, f"gradient of {name}", GRADIENT_TOLERANCE)
        assert_same(split, one, f"gradient of {name} through a split", GRADIENT_TOLERANCE)
        trained_by_itself = name.startswith("forecast_")
        assert one.any() != trained_by_itself, f"{name} has no gradient, or should have none"


def law_gradcheck(spec: KernelSpec) -> None:
    """The gradient of chunked is the derivative of its output."""
    sizes = (2, 1, 2)
    attention = layer(spec, sizes=sizes)
    inputs = [x.requires_grad_() for x in tokens(1, 9, sizes=sizes)]
    assert torch.autograd.gradcheck(lambda *x: chunked.attend(*x, kernel_of(attention))[0].y, inputs)


@torch.no_grad()
def law_documents(spec: KernelSpec) -> None:
    """Packed documents do not see each other."""
    attention, (q, k, v) = layer(spec), tokens(2, LENGTH)
    lengths = ((9, 1, 31), (25, 16))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    layout = layout_of(LENGTH, None, positions, 2, has_cache=False)
    got = attention(Seen(q, k, v, kernel_of(attention).scaling, layout=layout), None)
    for row, pieces in enumerate(lengths):
        alone = [x[row : row + 1].split(pieces, 2) for x in (q, k, v)]
        parts = [reference.attend(*piece, kernel_of(attention))[0].y for piece in zip(*alone, strict=True)]
        assert_same(got[row : row + 1], torch.cat(parts, 2), f"row {row}")


def law_finite(spec: KernelSpec, dtype: torch.dtype, scale: float) -> None:
    """Outputs and gradients are finite for large q and k, in the dtypes that models run in."""
    attention = layer(spec, torch.float32)
    inputs = tokens(1, LENGTH, dtype, scale=scale)
    y = by_pieces(*inputs, kernel_of(attention), [20, 1, 20])
    assert y.dtype == dtype
    assert y.isfinite().all()
    found = gradients(by_chunks, attention, inputs, tokens(1, LENGTH, dtype, seed=2)[0])
    assert all(g.isfinite().all() for g in found)


@torch.no_grad()
def law_float32(spec: KernelSpec) -> None:
    """float32 is near float64, in both implementations."""
    expected = reference.attend(*tokens(1, LENGTH), kernel_of(layer(spec)))[0].y
    kernel = kernel_of(layer(spec, torch.float32))
    for implementation in (reference, chunked):
        y = implementation.attend(*tokens(1, LENGTH, torch.float32), kernel)[0].y
        assert_same(y, expected, implementation.__name__)
