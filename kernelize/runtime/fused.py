"""The operation in Triton kernels: same signature as `reference.attend` and `chunked.attend`.

The stages are those of chunked.py, each over the whole length at once:

1. rows on their own block grid: nothing to do for a new sequence without padding (`fresh`), else `chunked.align`;
2. scores of the tokens that leave, and from them every token's lifetime (fused_select.py);
3. the exact branch over sinks, window and slot holders (fused_exact.py);
4. the memory over the tokens in the order of their deaths, merged with it (fused_memory.py);

`supports` says what the kernels cannot do; `ops` then takes chunked.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .chunked import Grid, align
from .fused_delta import Tokens, corrected
from .fused_exact import Exact, ExactFunction, parts_of_tile
from .fused_map import fits, mapped, plain
from .fused_memory import ClockFunction, MemoryFunction, Order, holds_halves, order_of, recall_errors
from .fused_select import TILE, Lives, lifetimes, received
from .fused_triton import interpreted, power_of_two, rows_first, shared_memory, triton
from .kept import kept
from .reference import take
from .spec import KernelSpec
from .state import (
    EMPTY,
    AttentionOutput,
    Kernel,
    State,
    add_sink_logits,
    betas,
    by_head,
    empty_state,
    log_decays,
    merge,
    scores_from,
    weigh_answers,
    within_reach,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 256  # channels or features of a head
WIDEST_FULL = 256, 128  # in float32 on a GPU: more features need more shared memory than any has
WIDEST_DELTA = 128, 128  # of a delta rule, whose memory is read in float32
# bytes of shared memory by bytes of a channel and padded head size: of the largest program of a prefill, and of
# training or of a prefill that `reads_features`, compiled for sm_90 with 128 features (256 where heads are 256 in 16
# bits)
SHARED = {
    (2, 64): (57_344, 82_180), (2, 128): (98_304, 122_880), (2, 256): (147_456, 204_800),
    (4, 64): (147_456, 172_288), (4, 128): (180_224, 196_608), (4, 256): (245_760, 393_216),
}  # fmt: skip
SHARED_DELTA = 172_544  # of a delta rule with WIDEST_DELTA: of the kernel that finds the gradient of keys' features
POLICIES = ("attention", "recall", "value", "forecast")
MOST_SLOTS = 1024
MASS = 16  # channels of a pass over the memory that is for its normaliser


def supports(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the fused kernels cannot compute this, or None if they can; q [B, H, T, D], k and v [B, Hk, T, D]."""
    spec = kernel.spec
    if triton is None:
        return "Triton is not installed"
    if not q.is_cuda and not interpreted():
        return f"the tensors are on {q.device.type}, not on a GPU"
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype} are not one of bfloat16, float16, float32"
    if q.shape[-1] > WIDEST or q.shape[-1] != v.shape[-1]:
        return f"heads of {q.shape[-1]} with values of {v.shape[-1]} channels: only equal sizes up to {WIDEST}"
    if q.is_cuda and (lack := too_wide(spec, q.shape[-1], q.dtype)):
        return lack
    largest = torch.is_grad_enabled() or reads_features(kernel)
    if q.is_cuda and (lack := too_large(q.shape[-1], q.dtype, largest, shared_memory(q.device), spec.is_delta)):
        return lack
    return unsupported(spec)


def reads_features(kernel: Kernel) -> bool:
    """Whether queries' features come to a prefill's memory from elsewhere: a program of that takes as much as one of
    training."""
    return kernel.spec.has_memory and (kernel.spec.is_delta or not fits(kernel.map_q))


def too_wide(spec: KernelSpec, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why no GPU has the shared memory for what is computed in float32, or None."""
    if not spec.has_memory or not (spec.is_delta or dtype == torch.float32):
        return None
    channels, features = WIDEST_DELTA if spec.is_delta else WIDEST_FULL
    if head_dim <= channels and spec.feature_dim <= features:
        return None
    what = f"rule={spec.rule!r}" if spec.is_delta else "float32"
    return f"{what} on a GPU: only heads of up to {channels} channels with {features} features"


def largest_program(head_dim: int, dtype: torch.dtype, largest: bool, is_delta: bool) -> int:
    """Its bytes of shared memory; `largest`: of training, or of a prefill that `reads_features`."""
    needed = SHARED[dtype.itemsize, power_of_two(head_dim, 64)][largest]
    return max(needed, SHARED_DELTA) if is_delta else needed


def too_large(head_dim: int, dtype: torch.dtype, largest: bool, has: int, is_delta: bool = False) -> str | None:
    """Why programs do not fit into a GPU that `has` so many bytes of shared memory for each, or None; see
    `largest_program`."""
    needed = largest_program(head_dim, dtype, largest, is_delta)
    if needed <= has:
        return None
    doing = "training, or reading by other features than hedgehog's," if largest else "reading"
    if is_delta:
        doing = "a delta rule"
    return (
        f"{doing} with heads of {head_dim} in {str(dtype)[6:]} takes {needed} bytes of shared memory, the GPU has {has}"
    )


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors in autocast's dtype where it is on, as torch's own attention takes them (rotary positions widen)."""
    if not torch.is_autocast_enabled(q.device.type) or not (q.is_cuda or interpreted()):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def unsupported(spec: KernelSpec) -> str | None:
    """What the kernels lack for a spec, whatever the tensors."""
    if spec.block > TILE or spec.block & (spec.block - 1):
        return f"block={spec.block} is not a power of two up to {TILE}"
    if (most := max(spec.head_slots, default=spec.slots)) > MOST_SLOTS:
        return f"slots={most} are more than {MOST_SLOTS}"
    if spec.has_memory and spec.feature_dim > WIDEST:
        return f"feature_dim={spec.feature_dim} is above {WIDEST}"
    others = [name for name, _ in spec.shares if spec.slots and name not in POLICIES]
    return f"policy={spec.policy!r} scores by {others[0]!r}" if others else None


@by_head
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Kernel,
    state: State | None = None,
    valid: Tensor | None = None,
    branches: bool = True,
    keep: bool = True,
) -> tuple[AttentionOutput, State]:
    """q [B, H, T, D], k and v [B, Hk, T, D], valid [B, T] bool -> (AttentionOutput over T, state after T).

    Without `branches` all but the output's `y` may be empty. Without `keep` the
    state is not computed: the one before the call comes back.
    """
    # what is added up over a sequence stays float32; Triton launches on the current device
    with torch.autocast(q.device.type, enabled=False), torch.cuda.device_of(q):
        return attend_plainly(q, k, v, kernel, state, valid, branches, keep)


def attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, state: State | None, valid: Tensor | None, branches: bool,
    keep: bool,
) -> tuple[AttentionOutput, State]:  # fmt: skip
    """`attend` outside of autocast."""
    kernel = within_reach(kernel, state, q.shape[2])
    store = fresh(q, k, v, kernel) if state is None and valid is None else resumed(q, k, v, kernel, state, valid)
    matrices = matrices_of(store, kernel)
    phi_k, k = key_features(store, kernel, alone=matrices is not None)
    store = store._replace(k=k)  # a map with a backward of its own hands on to its gradient what the others say
    clock, clock_end = clocks(store, kernel)
    far = turned(store, kernel)
    lives, scores = select(store, kernel, far, phi_k, clock, clock_end)
    heads = kernel.scaling, kernel.softcap
    given = Exact(kernel.spec, lives.table, lives.death, store.bounds, store.front, *heads, far.pos, matrices)
    out, total = read_branches(store, kernel, given, far, lives, phi_k, clock, clock_end, branches)
    state = final_state(store, kernel, lives, scores, clock, clock_end, total) if keep else store.state
    return store.unalign(out), state


def read_branches(
    store: Store, kernel: Kernel, given: Exact, far: Far, lives: Lives, phi_k: Tensor, clock: Tensor,
    clock_end: Tensor, branches: bool,
) -> tuple[AttentionOutput, Tensor]:  # fmt: skip
    """(the output with its parts, the memory at the end)."""
    exact, lse, q, v, *merges = ExactFunction.apply(store.q, store.k, store.v, far.q, far.k, given)
    store = store._replace(q=q, v=v)  # what the memory says about them is added in the exact branch's backward
    if kernel.sink_logits is not None:
        exact, lse = add_sink_logits(exact, lse, kernel)
        exact, merges = exact.to(store.q.dtype), [*merges[:2], None, None, None]
    if not kernel.spec.has_memory:
        empty = torch.zeros_like(exact), torch.full_like(lse, -torch.inf)
        return AttentionOutput(exact, exact, lse, *empty), store.state.memory
    if kernel.spec.is_delta:
        return read_corrected(store, kernel, lives, phi_k, clock, clock_end, exact, lse, branches)
    return read_memory(store, kernel, lives, phi_k, clock, clock_end, exact, lse, given.matrices, merges, branches)


def read_memory(
    store: Store, kernel: Kernel, lives: Lives, phi_k: Tensor, clock: Tensor, clock_end: Tensor,
    exact: Tensor, lse: Tensor, matrices: tuple[Tensor, Tensor] | None, merges: list, branches: bool,
) -> tuple[AttentionOutput, Tensor]:  # fmt: skip
    """(the output of both branches merged, the memory at the end)."""
    assert kernel.log_gate is not None
    order, gate = order_of(lives.order, kernel.spec.block, decays(store, kernel)), kernel.log_gate.float()
    given = phi_k, store.v, clock, clock_end, store.state.memory, exact, lse, gate
    queries = query_features(store, kernel) if matrices is None else store.q
    y, memory, memory_lse, total = MemoryFunction.apply(
        queries, store.k, *(matrices or (None, None)), *given, *merges, order, kernel.scaling**0.5, branches,
        torch.is_grad_enabled(),
    )  # fmt: skip
    return AttentionOutput(y, exact, lse, memory, memory_lse), total


def read_corrected(
    store: Store, kernel: Kernel, lives: Lives, phi_k: Tensor, clock: Tensor, clock_end: Tensor, exact: Tensor,
    lse: Tensor, branches: bool,
) -> tuple[AttentionOutput, Tensor]:  # fmt: skip
    """`read_memory` by the delta rule: answers of corrected values, weighed as so many tokens as there are."""
    assert kernel.log_gate is not None
    memory, phi_q = store.state.memory, query_features(store, kernel)
    order, gate = order_of(lives.order, kernel.spec.block, decays(store, kernel)), kernel.log_gate.float()
    tokens = Tokens(phi_k, store.v, clock, betas(kernel, store.k), store_pos(store, kernel.spec))
    deaths = corrected(order.tokens, order.block, tokens, clock_end, memory[..., :-1])

    def read(
        order: Order, phi_q: Tensor, phi: Tensor, v: Tensor, when: Tensor, start: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(the memory's answer [B, H, W, D], its normaliser [B, H, W, 1], the memory at the end)."""
        nobody, none = (None,) * 5, lse.new_zeros(*lse.shape, v.shape[-1], dtype=store.q.dtype)
        _, answer, found, end = MemoryFunction.apply(
            phi_q, store.k, None, None, phi, v, when, clock_end, start, none, lse.detach(), gate, *nobody, order,
            kernel.scaling**0.5, True, torch.is_grad_enabled(),
        )  # fmt: skip
        return answer, (found - gate[:, None]).exp()[..., None], end

    wide = phi_q.float()  # what tokens add cancels out: in 16 bits, answers and their gradients would be 1 or 2 % off
    answer, norm, values = read(order._replace(tokens=deaths.order), wide, *deaths[1:], memory)
    few = slice(0, MASS)  # channels, since nobody asks for their values
    of_mass = torch.cat([memory[..., :-1][..., few], memory[..., -1:]], -1)
    _, mass, masses = read(order, phi_q, phi_k, store.v[..., few], clock, of_mass)
    factor, _ = weigh_answers(norm, mass, wide)
    out = merge(exact.float(), lse, (answer * factor, mass), kernel.log_gate)
    end = torch.cat([values[..., :-1], masses[..., -1:]], -1)
    part = out.memory.to(store.q.dtype) if branches else out.memory.new_empty(0)
    return out._replace(y=out.y.to(store.q.dtype), exact=exact, memory=part), end


# --- 1. the store -------------------------------------------------------------------------------------------


class Store(NamedTuple):
    """All keys and values that a call can read, and its queries on their rows' block grid.

    The store is [sinks | old slots | ring | new tokens], coordinate c at front + c; for a new sequence just its tokens.
    """

    q: Tensor  # [B, H, W, D]
    k: Tensor  # [B, Hk, X, D]
    v: Tensor  # [B, Hk, X, D]
    bounds: Tensor  # [B, 4] int32: first and end coordinate of the tokens, first new query, position of coordinate 0
    last: Tensor  # [B] the last block that has begun at the end (−1: none of this call)
    seen: Tensor  # [B] valid tokens at the end
    front: int
    old: int  # slots that the store holds
    state: State  # before the call
    grid: Grid | None  # None: a new sequence without padding

    @property
    def n(self) -> int:
        return -(-self.q.shape[2] // TILE)

    def folded(self, spec: KernelSpec, blocks: int) -> tuple[Tensor, Tensor]:
        """Tokens that have left the window up to each token [B, 1, X], and up to the end of each block."""
        count = fresh_folded if self.grid is None else folded_tokens
        return count(self.bounds, self.last, spec.block, spec.ring, self.k.shape[2], self.front, blocks)

    def applicants(self, spec: KernelSpec) -> Tensor:
        """[R, n·tile] int32: the tokens by the block at which they leave the window, −1 where none does."""
        leaves = fresh_leaving if self.grid is None else leaving
        return leaves(self.bounds, self.last, spec.block, spec.ring, self.k.shape[1], self.front, self.n)

    @property
    def pos(self) -> Tensor:
        """[B, 1, X] positions as far as the feature maps need them; sinks and empty places have any."""
        lead = self.bounds[:, 3:].long() - self.front
        return (lead + torch.arange(self.k.shape[2], device=self.k.device))[:, None]

    def unalign(self, out: AttentionOutput) -> AttentionOutput:
        if self.grid is None:
            return out
        return AttentionOutput(*(self.grid.unalign(x) if x.numel() else x for x in out))


@kept(64)
def fresh_bounds(B: int, sinks: int, T: int, block: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(bounds, last, seen) of new sequences of T tokens."""
    with torch.inference_mode(False):  # they outlive this call
        bounds = torch.tensor([[sinks, T, 0, 0]], dtype=torch.int32).repeat(B, 1)
        last, seen = (torch.full((B,), x, dtype=torch.int64) for x in ((T - 1) // block, T))
        return bounds.to(device), last.to(device), seen.to(device)


@kept(64)
def fresh_slots(rows: int, device: torch.device) -> Tensor:
    """No holders at the start: [rows, 0] int32."""
    with torch.inference_mode(False):
        return torch.empty(rows, 0, dtype=torch.int32, device=device)


@kept(128)  # layers may differ
def nothing_seen(spec: KernelSpec, B: int, kv_heads: int, D: int, dtype: torch.dtype, device: torch.device) -> State:
    """The state before new sequences. It is shared and only read: what a call keeps, it makes anew."""
    with torch.inference_mode(False):
        x = torch.empty(B, kv_heads, 0, D, dtype=dtype, device=device)
        return empty_state(spec, x, x)


def folded_tokens(
    bounds: Tensor, last: Tensor, block: int, ring: int, X: int, front: int, blocks: int
) -> tuple[Tensor, Tensor]:
    """See `Store.folded`; float32, as factors of the log decay."""
    with torch.inference_mode(False):
        low, high = bounds[:, :1].long(), bounds[:, 1:2].long()
        end = torch.minimum(torch.arange(1, blocks + 1, device=low.device), last[:, None] + 1)
        at_end = torch.minimum(end * block - ring, high) - low
        at = torch.minimum(torch.arange(X, device=low.device) - front + 1, high) - low
        return at.clamp(min=0)[:, None].float(), at_end.clamp(min=0)[:, None].float()


def leaving(bounds: Tensor, last: Tensor, block: int, ring: int, kv_heads: int, front: int, n: int) -> Tensor:
    """See `Store.applicants`."""
    with torch.inference_mode(False):
        c = torch.arange(n * TILE, device=bounds.device, dtype=torch.int32)
        at, c = c // block, c - ring
        here = (c >= bounds[:, :1]) & (c < bounds[:, 1:2]) & (at <= last[:, None])
        index = torch.where(here, front + c, EMPTY)  # [B, n·tile]
        return index[:, None].expand(-1, kv_heads, -1).flatten(0, 1).contiguous()


def standing(bounds: Tensor, last: Tensor, seen: Tensor, block: int, sinks: int, ring: int, front: int) -> Tensor:
    """[B, sinks + ring] int32: where the store has what belongs into the state's sinks and ring, EMPTY for nothing."""
    with torch.inference_mode(False):
        low, high, _, base = (x[:, None].long() for x in bounds.unbind(1))
        sink = torch.arange(sinks, device=bounds.device).expand(len(bounds), -1)
        newest = (base // block + last[:, None]) * block + block - 1  # [B, 1]
        # the coordinate that belongs at each entry of the ring
        p = newest - (newest - torch.arange(ring, device=bounds.device)) % ring - base
        inside = torch.where((p >= low) & (p < high) & (p + base >= 0), front + p, EMPTY)
        return torch.cat([torch.where(sink < seen[:, None], sink, EMPTY), inside], 1).int()


# New sequences of one length share their bookkeeping over all layers, whatever their slots: the tensors of
# `fresh_bounds` are its keys.
fresh_folded = kept(64)(folded_tokens)
fresh_leaving = kept(64)(leaving)
fresh_standing = kept(64)(standing)


def fresh(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> Store:
    spec = kernel.spec
    bounds, last, seen = fresh_bounds(q.shape[0], spec.sinks, q.shape[2], spec.block, q.device)
    q, k, v = (rows_first(x) for x in (q, k, v))
    state = nothing_seen(spec, k.shape[0], k.shape[1], k.shape[3], k.dtype, k.device)
    return Store(q, k, v, bounds, last, seen, 0, 0, state, None)


def resumed(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, state: State | None, valid: Tensor | None) -> Store:
    spec = kernel.spec
    state = empty_state(spec, k, v) if state is None else state
    grid = align(q, k, v, kernel, state, valid, aligned=False)
    slots = slice(spec.sinks + spec.ring, spec.positions)
    key = torch.cat([grid.sink_k, state.keys[:, :, slots], grid.k], 2)
    value = torch.cat([grid.sink_v, state.values[:, :, slots], grid.v], 2)
    begun = state.seen % spec.block > 0  # the ring's newest block is the one at coordinate 0
    low = torch.where(begun, -spec.back * spec.block, -spec.ring)
    low = torch.maximum(low, spec.sinks - grid.base).clamp(min=-grid.front)
    bounds = torch.stack([low, grid.seen - grid.base, state.seen - grid.base, grid.base], 1).int()
    front = spec.sinks + spec.slots + grid.front
    key, value = key.to(k.dtype), value.to(v.dtype)  # a state may have been made in another dtype
    return Store(grid.q.contiguous(), key, value, bounds, grid.last, grid.seen, front, spec.slots, state, grid)


def feature_dtype(store: Store) -> torch.dtype:
    return torch.float32 if store.q.dtype == torch.float32 else torch.bfloat16  # features outgrow float16


def matrices_of(store: Store, kernel: Kernel) -> tuple[Tensor, Tensor] | None:
    """The matrices [H, D, C] and [Hk, D, C] of both maps in float32, where kernels of the memory map the queries and
    the backward of both maps is spread over others': for that they need all features at once."""
    if not kernel.spec.has_memory or reads_features(kernel):
        return None
    if torch.is_grad_enabled() and not holds_halves(kernel.spec.feature_dim, store.v.shape[-1], feature_dtype(store)):
        return None
    assert fits(kernel.map_q)
    assert fits(kernel.map_k)
    return plain(kernel.map_q), plain(kernel.map_k)


def query_features(store: Store, kernel: Kernel) -> Tensor:
    """phi of all queries [B, H, W, F]."""
    assert kernel.map_q is not None

    def at() -> Tensor:
        return (store.bounds[:, 3:].long() + torch.arange(store.q.shape[2], device=store.q.device))[:, None]

    return mapped(kernel, kernel.map_q, store.q, at, feature_dtype(store))[0]


def key_features(store: Store, kernel: Kernel, alone: bool = False) -> tuple[Tensor, Tensor]:
    """(phi of the store [B, Hk, X, F]; without a memory, nothing; its keys, for who else reads them); see `mapped`."""
    if kernel.map_k is None:
        return store.k[..., :0], store.k
    return mapped(kernel, kernel.map_k, store.k, lambda: store_pos(store, kernel.spec), feature_dtype(store), alone)


def store_pos(store: Store, spec: KernelSpec) -> Tensor:
    """Positions [B, 1 or Hk, X] of all tokens of the store, as far as the feature maps need them."""
    if store.grid is None:
        return store.pos
    return key_positions(store, spec)


def key_positions(store: Store, spec: KernelSpec) -> Tensor:
    """[B, Hk, X] positions of a resumed store's keys; empty places have any."""
    slots = slice(spec.positions - store.old, spec.positions)
    pos = store.pos.expand(-1, store.k.shape[1], -1).clone()
    pos[:, :, : spec.sinks] = torch.arange(spec.sinks, device=pos.device)
    pos[:, :, spec.sinks : spec.sinks + store.old] = store.state.pos[:, :, slots]
    return pos


class Far(NamedTuple):
    """Queries and keys as sinks and slots are seen from beyond reach; without `pos`, no key is so far back."""

    q: Tensor  # [B, H, W, D], all at position `reach`; or [..., 0]
    k: Tensor  # [B, Hk, X, D], all at position 0; or [..., 0]
    pos: Tensor | None  # [R, X] int32, where the keys really stand


def turned(store: Store, kernel: Kernel) -> Far:
    held = kernel.spec.sinks or kernel.spec.slots  # else no key is so far back
    if kernel.rotation is None or not kernel.spec.reach or not held:
        nothing = store.q.detach()[..., :0]  # else its gradient would be a full tensor of zeros
        return Far(nothing, nothing, None)
    (B, Hk, X, _), base = store.k.shape, store.bounds[:, 3:].long()
    q_pos = base + torch.arange(store.q.shape[2], device=base.device)
    fresh_pos = torch.arange(X, device=base.device).expand(B, Hk, -1)
    k_pos = fresh_pos if store.grid is None else key_positions(store, kernel.spec)
    q = kernel.rotation.turn(store.q, q_pos[:, None], kernel.spec.reach)
    k = kernel.rotation.turn(store.k, k_pos, 0)
    return Far(q.contiguous(), k.contiguous(), k_pos.flatten(0, 1).int().contiguous())


def decays(store: Store, kernel: Kernel) -> bool:
    """Without a decay the clock stands still, also for a state that was made without."""
    return kernel.log_rate is not None


def clocks(store: Store, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """The clock at which each token was folded [B, Hk, X], and that at the end of each block [B, Hk, blocks]."""
    spec, (B, Hk, X, _) = kernel.spec, store.k.shape
    blocks = store.n * TILE // spec.block
    if kernel.log_rate is None:
        return store.k.new_zeros(B, Hk, 1, dtype=torch.float32).expand(-1, -1, X), store.k.new_zeros(
            B, Hk, blocks, dtype=torch.float32
        )
    folded, folded_end = store.folded(spec, blocks)
    if kernel.decay_weight is None:
        clock, clock_end = ClockFunction.apply(kernel.log_rate, folded, folded_end)
    else:
        clock, clock_end = gated_clocks(store, kernel, folded_end)
    if store.old:
        slots = slice(spec.positions - store.old, spec.positions)
        held = -store.state.decay[:, :, slots]
        clock = torch.cat([clock[:, :, : spec.sinks], held, clock[:, :, spec.sinks + store.old :]], 2)
    return clock, clock_end


def gated_clocks(store: Store, kernel: Kernel, folded_end: Tensor) -> tuple[Tensor, Tensor]:
    """The same where every token brings its own decay; folded_end [B, 1, blocks] counts the tokens that have left."""
    own = log_decays(kernel, store.k, store.v)  # [B, Hk, X]
    assert own is not None
    low, high = store.bounds[:, :1].long(), store.bounds[:, 1:2].long()
    c = torch.arange(own.shape[2], device=own.device) - store.front
    clock = (own * ((c >= low) & (c < high))[:, None]).cumsum(2)
    at = store.front + low[:, None] + folded_end.long() - 1  # the last token that has left
    clock_end = clock.gather(2, at.clamp(min=0).expand(-1, own.shape[1], -1)) * (folded_end > 0)
    return clock, clock_end


# --- 2. who holds a slot ------------------------------------------------------------------------------------


class Scores(NamedTuple):
    of_share: list[Tensor]  # a share: [R, X] float32
    mass: Tensor | None  # [B, Hk, X] attention received so far, where a share asks for it


@torch.no_grad()
def select(
    store: Store, kernel: Kernel, far: Far, phi_k: Tensor, clock: Tensor, clock_end: Tensor
) -> tuple[Lives, Scores]:
    spec, applicants = kernel.spec, store.applicants(kernel.spec)
    if not spec.slots:
        return lifetimes(spec, applicants, [], applicants[:, :0]), Scores([], None)
    found = {}
    if spec.measures("attention"):
        found["attention"] = mass_of(store, kernel, far)
    if spec.measures("recall"):
        found["recall"] = errors_of(store, kernel, applicants, phi_k, clock, clock_end)
    if spec.measures("value"):
        found["value"] = torch.linalg.vector_norm(store.v, dim=-1, dtype=torch.float32)
    pos = None
    if spec.aging or kernel.watch is not None or kernel.key_rotation is not None:
        pos = store.pos if kernel.watch is None else leaving_pos(store, applicants)
    new = scores_from(kernel, found, store.k, store.v, pos)
    scores = [with_holders(x, share, store, spec).flatten(0, 1).contiguous() for share, x in enumerate(new)]
    parts = parts_of_tile(store.q, store.k, spec, far.pos is not None)
    return lifetimes(spec, applicants, scores, old_slots(store, spec), parts), Scores(scores, found.get("attention"))


def leaving_pos(store: Store, applicants: Tensor) -> Tensor:
    """[B, Hk, X]: the positions of the tokens that leave the window, EMPTY for all others."""
    B, Hk, X, _ = store.k.shape
    leaves = torch.zeros(B * Hk, X + 1, dtype=torch.bool, device=store.k.device)
    leaves.scatter_(1, torch.where(applicants == EMPTY, X, applicants).long(), True)
    return torch.where(leaves[:, :X].view(B, Hk, X), store.pos, EMPTY)


def with_holders(new: Tensor, share: int, store: Store, spec: KernelSpec) -> Tensor:
    """New scores [B, Hk, X], with those that the holders brought along in their places."""
    if not store.old:
        return new
    held = store.state.score[..., share]
    return torch.cat([new[:, :, : spec.sinks], held, new[:, :, spec.sinks + store.old :]], 2)


def old_slots(store: Store, spec: KernelSpec) -> Tensor:
    """[R, old] int32: where the store has the state's slot holders, −1 for an empty slot."""
    if not store.old:
        return fresh_slots(store.k.shape[0] * store.k.shape[1], store.k.device)
    pos = store.state.pos[:, :, spec.positions - store.old :].flatten(0, 1)
    index = spec.sinks + torch.arange(store.old, device=pos.device)
    return torch.where(pos == EMPTY, EMPTY, index).int()


def mass_of(store: Store, kernel: Kernel, far: Far) -> Tensor:
    mass = received(kernel, store.q, store.k, store.bounds, store.front, None if far.pos is None else (far.q, far.k))
    if store.grid is not None:
        mass[:, :, store.front - store.grid.front :] += store.grid.mass
    return mass


def errors_of(
    store: Store, kernel: Kernel, applicants: Tensor, phi_k: Tensor, clock: Tensor, clock_end: Tensor
) -> Tensor:
    """What the memory of all earlier blocks misses of each leaving token, [B, Hk, X]."""
    spec, memory = kernel.spec, store.state.memory
    if store.old:
        held = slice(spec.sinks, spec.sinks + store.old)
        there = (store.state.pos[:, :, spec.positions - store.old :] != EMPTY)[..., None]
        phi = phi_k[:, :, held].float() * (-clock[:, :, held, None]).exp() * there
        value = store.v[:, :, held].float()
        value = torch.cat([value, torch.ones_like(value[..., :1])], -1)
        memory = memory + phi.mT @ value
    order = order_of(applicants, spec.block, decays(store, kernel))
    return recall_errors(order, phi_k, store.v, clock.contiguous(), clock_end, memory).view(clock.shape)


# --- the state afterwards -----------------------------------------------------------------------------------


def final_state(
    store: Store, kernel: Kernel, lives: Lives, scores: Scores, clock: Tensor, clock_end: Tensor, memory: Tensor
) -> State:
    """The state after the call; slots in the order of their scores."""
    spec, (B, Hk, X, _), device = kernel.spec, store.k.shape, store.k.device
    stands = fresh_standing if store.grid is None else standing
    index = stands(store.bounds, store.last, store.seen, spec.block, spec.sinks, spec.ring, store.front)
    index = torch.cat([index[:, None].expand(-1, Hk, -1), lives.holders.view(B, Hk, -1)], 2).long()  # [B, Hk, P]
    here, at = index != EMPTY, index.clamp(min=0)
    in_ring, slots = at[:, :, spec.sinks : spec.sinks + spec.ring], at[:, :, spec.sinks + spec.ring :]
    decay = torch.zeros(B, Hk, spec.positions, device=device)
    if kernel.log_rate is not None:
        gated = kernel.decay_weight is not None
        kept = (take(x, in_ring) if gated else x for x in (store.k, store.v))  # else they are not looked at
        own = log_decays(kernel, *kept)
        assert own is not None
        rate = own.expand_as(in_ring)
        age = (clock_end[:, :, -1:] - clock.gather(2, slots)).clamp(max=0)
        decay = torch.cat([decay[:, :, : spec.sinks], rate, age], 2) * here
    mass = torch.zeros_like(decay)
    if scores.mass is not None:
        mass[:, :, spec.sinks : spec.sinks + spec.ring] = scores.mass.gather(2, in_ring)
    score = [x.view(B, Hk, X).gather(2, slots) for x in scores.of_share]
    return store.state._replace(
        keys=take(store.k, at) * here[..., None],
        values=take(store.v, at) * here[..., None],
        pos=torch.where(here, positions_at(store, spec, at), EMPTY),
        decay=decay,
        mass=mass * here,
        score=torch.stack(score, -1) * here[:, :, spec.sinks + spec.ring :, None] if score else store.state.score,
        memory=memory,
        seen=store.seen,
    )


def positions_at(store: Store, spec: KernelSpec, at: Tensor) -> Tensor:
    """Positions of the tokens at the indices `at` [B, Hk, P] of the store."""
    pos = at + (store.bounds[:, 3].long() - store.front)[:, None, None]
    if store.grid is None:
        return pos
    held = at - spec.sinks
    if store.old:
        holders = store.state.pos[:, :, spec.positions - store.old :]
        old = holders.gather(2, held.clamp(0, store.old - 1))
        pos = torch.where((held >= 0) & (held < store.old), old, pos)
    return torch.where(held < 0, at, pos)
