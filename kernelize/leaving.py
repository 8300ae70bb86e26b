"""What is between two blocks, as a function of the state, to be traced: a block leaves the window.

It computes what `reference.evict` does, and touches no more than it must: who keeps a slot stays where it is, so at
most a block of tokens moves in each share and a block is folded. Layers that differ in nothing but how many slots they
have are one computation, heads side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .graphs import LayerShape, StateLayout, scalings
from .runtime.attention import KernelAttention
from .runtime.modeling import kernelized_layers
from .runtime.reference import fold_delta, ranks, self_recall, spread, take
from .runtime.spec import KernelSpec
from .runtime.state import EMPTY, Kernel, Rotation, features, novelty, scores_from, with_ones

NOBODY = -1  # the share that an entry gets a slot of, if it gets none


@dataclass(frozen=True)
class Places:
    """Where the slots of a group's heads lie; every head has a row of as many as the largest, S.

    `entry` counts on the layer's own position axis, the others through the packed fields of the whole state. What a
    head does not have points behind their end.
    """

    real: Tensor  # [heads, S] whether the head has this slot
    room: list[Tensor]  # of each share, [heads, 1]: slots that the head has of it
    share: Tensor  # [S] the share that a slot belongs to
    entry: Tensor  # [heads, S]
    packed: Tensor  # [heads, S], in `pos`, `decay` and `mass`
    score: Tensor  # [heads, S, shares], in `score`
    first: Tensor  # [heads] where a head's positions begin in `pos`, `decay` and `mass`


def places(layout: StateLayout, members: list[int], joint: KernelSpec) -> Places:
    heads = [(i, layout.layers[i].spec, head) for i in members for head in range(layout.layers[i].kv_heads)]
    own = torch.tensor([layout.layers[i].rooms(head) for i, _, head in heads])  # [heads, shares]
    row = torch.tensor([[room for _, room in spec.shares] for _, spec, _ in heads])  # of each share, in a head's row
    share = torch.cat([torch.full((room,), s) for s, (_, room) in enumerate(joint.shares)])
    within = torch.cat([torch.arange(room) for _, room in joint.shares])
    real = within < own[:, share]
    slot = (row.cumsum(1) - row)[:, share] + within
    front = torch.tensor([spec.sinks + spec.ring for _, spec, _ in heads])[:, None]
    before, scores = layout.starts("pos"), layout.starts("score")
    first = torch.tensor([before[i] + head * spec.positions for i, spec, head in heads])
    first_score = torch.tensor([scores[i] + head * spec.slots * len(spec.shares) for i, spec, head in heads])
    score = first_score[:, None, None] + slot[..., None] * own.shape[1] + torch.arange(own.shape[1])
    return Places(
        real=real,
        room=list(own.T[..., None]),
        share=share,
        entry=torch.where(real, front + slot, 0),
        packed=torch.where(real, first[:, None] + front + slot, sum(layout.widths("pos"))),
        score=torch.where(real[..., None], score, sum(layout.widths("score"))),
        first=first,
    )


@dataclass
class Block:
    """The slots' tokens and, behind them, the block that leaves: X = S + block entries of every head of a group."""

    leaving: Tensor  # [B, 1, block] where the block lies on a layer's position axis
    begins: Tensor  # [B, 1, 1] whether a block leaves at all
    pos: Tensor  # [B, heads, X], EMPTY where no token is
    held: Tensor  # [B, heads, X] log decay, once the block is folded
    passed: Tensor  # [B, heads, 1] log decay that the block puts on all before it
    before: Tensor  # [B, heads, X] log decay of slot holders up to now; 0 for the block
    clock: Tensor  # [B, heads, X] log decay that has passed in the block when an entry's turn comes


@dataclass
class Moves:
    """Who comes to another place, to which slot, and who is folded; all [B, heads, n] entries.

    What is not `meant` is an entry of the block, and stays there; what is not `gone` is one too, and is not folded.
    """

    source: Tensor
    target: Tensor
    meant: Tensor
    lost: Tensor
    gone: Tensor


class Group(nn.Module):
    """Layers whose blocks leave in one computation: they differ in nothing but how many slots they have."""

    def __init__(self, layout: StateLayout, members: list[int], attentions: list[KernelAttention], scaling: float):
        super().__init__()
        layers = [layout.layers[i] for i in members]
        self.members, self.layers, self.scaling = members, layers, scaling
        self.joint = layers[0].spec.replace(slots=max(layer.spec.slots for layer in layers))
        self.heads = [layer.kv_heads for layer in layers]
        self.attention = KernelAttention(
            self.joint, sum(layer.heads for layer in layers), sum(self.heads), layers[0].head_dim
        ).float()
        own = [attention.state_dict() for attention in attentions]
        self.attention.load_state_dict({name: torch.cat([state[name] for state in own]) for name in own[0]})
        self.attention.rotary = attentions[0].rotary
        self.places = places(layout, members, self.joint)
        self.key_sums = [layout.starts("key_sum")[i] for i in members]

    def forward(self, flat: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
        """The members' own tensors; and what is new of the packed ones, as (numbers [B, n], where [n])."""
        spec, kernel = self.joint, self.attention.kernel(self.scaling)
        block = self.block(flat)
        front = torch.arange(spec.sinks).expand(block.leaving.shape[0], 1, -1)
        first = self.rows(flat, "keys", [torch.cat([front, block.leaving], 2)] * len(self.members))
        key, value = first[:, :, spec.sinks :], self.rows(flat, "values", [block.leaving] * len(self.members))
        fresh = block.pos[..., spec.slots :]
        phi = None if kernel.map_k is None else features(kernel, kernel.map_k, key, fresh)
        score = self.scores(kernel, flat, block, phi, key, value)
        won = self.choose(score, block)
        moves = self.moves(won, block)
        origin = self.entries(torch.cat([moves.source, moves.lost], 2), block)
        sizes = [moves.source.shape[2], spec.block]
        keys, lost_key = self.rows(flat, "keys", origin).split(sizes, 2)
        values, lost_value = self.rows(flat, "values", origin).split(sizes, 2)
        goal = self.entries(moves.target, block)
        new = self.put(flat, "keys", goal, keys) | self.put(flat, "values", goal, values)
        if kernel.rotation is not None:
            new |= self.turned(flat, block, kernel.rotation, first, moves, goal)
        if phi is not None:
            new |= self.folded(flat, block, kernel, moves, lost_key, lost_value)
        if spec.measures("recall"):
            assert phi is not None
            weight = (fresh != EMPTY) * block.held[..., spec.slots :].exp()
            new |= self.split("all", fold(self.whole(flat, "all"), block, phi, weight, value))
        return new, self.refilled(score, block, won, moves)

    # --- what is there --------------------------------------------------------------------------------------

    def block(self, flat: dict[str, Tensor]) -> Block:
        spec, seen = self.joint, flat["seen"]
        begins = ((seen % spec.block == 0) & (seen >= spec.ring))[:, None, None]
        leaving = spec.sinks + (seen[:, None, None] + torch.arange(spec.block)) % spec.ring  # [B, 1, block]
        held_pos, before = self.of_slots(flat["pos"], EMPTY), self.of_slots(flat["decay"], 0.0)
        fresh = torch.where(begins, self.of_block(flat["pos"], leaving), EMPTY)
        own = torch.where(fresh == EMPTY, 0.0, self.of_block(flat["decay"], leaving))
        passed, clock = own.sum(-1, keepdim=True), own.cumsum(-1)
        return Block(
            leaving=leaving,
            begins=begins,
            pos=torch.cat([held_pos, fresh], -1),
            held=torch.cat([before + passed, passed - clock], -1),
            passed=passed,
            before=torch.cat([before, torch.zeros_like(own)], -1),
            clock=torch.cat([torch.zeros_like(before), clock], -1),
        )

    def of_slots(self, packed: Tensor, blank: float) -> Tensor:
        """Of a packed field [B, N] what the slots have, [B, heads, S]."""
        padded = torch.nn.functional.pad(packed, (0, 1), value=blank)
        return padded.index_select(1, self.places.packed.flatten()).unflatten(1, self.places.packed.shape)

    def of_block(self, packed: Tensor, leaving: Tensor) -> Tensor:
        """Of a packed field [B, N] what the block has, [B, heads, block]."""
        index = leaving + self.places.first[:, None]
        return packed.gather(1, index.flatten(1)).view_as(index)

    def rows(self, flat: dict[str, Tensor], name: str, entries: list[Tensor]) -> Tensor:
        """Of the members' tensors `name` the rows at `entries` [B, 1 or Hk, n] of each, [B, heads, n, D]."""
        found = [
            take(flat[f"{name}.{i}"], entry.expand(-1, Hk, -1))
            for i, Hk, entry in zip(self.members, self.heads, entries, strict=True)
        ]
        return torch.cat(found, 1)

    def whole(self, flat: dict[str, Tensor], name: str) -> Tensor:
        return torch.cat([flat[f"{name}.{i}"] for i in self.members], 1)

    def split(self, name: str, joint: Tensor) -> dict[str, Tensor]:
        return {f"{name}.{i}": part for i, part in zip(self.members, joint.split(self.heads, 1), strict=True)}

    # --- who gets a slot ------------------------------------------------------------------------------------

    def scores(
        self, kernel: Kernel, flat: dict[str, Tensor], block: Block, phi: Tensor | None, key: Tensor, value: Tensor
    ) -> Tensor:
        """What decides over the slots, [B, heads, X, shares]: fixed for holders, computed for the block."""
        spec, found = self.joint, {}
        if not spec.slots:
            return key.new_zeros(*key.shape[:3], len(spec.shares))
        if spec.measures("attention"):
            found["attention"] = self.of_block(flat["mass"], block.leaving)
        if spec.measures("recall"):
            assert phi is not None
            found["recall"] = self_recall(phi @ self.whole(flat, "all"), value)
        if spec.measures("value"):
            found["value"] = value.norm(dim=-1)
        if spec.measures("keydiff"):
            found["keydiff"] = novelty(key, self.key_sum(flat["key_sum"])[:, :, None])
        fresh = torch.stack(scores_from(kernel, found, key, value, block.pos[..., spec.slots :]), -1)
        at = self.places.score
        held = torch.nn.functional.pad(flat["score"], (0, 1)).index_select(1, at.flatten()).unflatten(1, at.shape)
        return torch.cat([held, fresh], 2)

    def key_sum(self, packed: Tensor) -> Tensor:
        """Of the packed field [B, N] that of the group's heads, [B, heads, D]."""
        D = self.layers[0].head_dim
        own = [packed[:, start : start + Hk * D] for start, Hk in zip(self.key_sums, self.heads, strict=True)]
        return torch.cat(own, 1).unflatten(1, (-1, D))

    def choose(self, score: Tensor, block: Block) -> Tensor:
        """The share that each entry gets a slot of, [B, heads, X], or NOBODY. As `reference.choose_slots`."""
        there = block.pos != EMPTY
        own = torch.cat([self.places.share, torch.zeros(self.joint.block, dtype=torch.int64)])  # applies there first
        won, applies = torch.full_like(block.pos, NOBODY), torch.zeros_like(there)
        for s, room in enumerate(self.places.room):
            applies = (applies | (own == s)) & there
            rank = ranks(
                torch.where(applies, score[..., s], -torch.inf),
                torch.where(applies, block.pos, torch.iinfo(block.pos.dtype).max),
            )
            wins = applies & (rank < room)
            won, applies = torch.where(wins, s, won), applies & ~wins
        return won

    def stays(self, won: Tensor) -> Tensor:
        """Whether the holder of a slot keeps it, [B, heads, S]."""
        return won[..., : self.joint.slots] == self.places.share

    def moves(self, won: Tensor, block: Block) -> Moves:
        spec, stay = self.joint, self.stays(won)
        moving = torch.nn.functional.pad(~stay, (0, spec.block), value=True)
        source, target, meant = [won[..., :0]], [won[..., :0]], [moving[..., :0]]
        for s, (_, room) in enumerate(spec.shares):
            if most := min(room, spec.block):
                who, there = first_of((won == s) & moving, most, spec.slots)
                where, _ = first_of(~stay & self.places.real & (self.places.share == s), most, spec.slots)
                source, meant, target = [*source, who], [*meant, there], [*target, torch.where(there, where, who)]
        lost, gone = first_of((won == NOBODY) & (block.pos != EMPTY), spec.block, spec.slots)
        return Moves(torch.cat(source, -1), torch.cat(target, -1), torch.cat(meant, -1), lost, gone)

    # --- the state afterwards -------------------------------------------------------------------------------

    def entries(self, index: Tensor, block: Block) -> list[Tensor]:
        """Entries [B, heads, n] of a group as those of its members' own position axes, [B, Hk, n] each."""
        rows, heads = index.shape[:2]
        table = torch.cat([self.places.entry.expand(rows, -1, -1), block.leaving.expand(-1, heads, -1)], -1)
        return list(table.gather(2, index).split(self.heads, 1))

    def turned(
        self, flat: dict[str, Tensor], block: Block, rotation: Rotation, first: Tensor, moves: Moves, goal: list[Tensor]
    ) -> dict[str, Tensor]:
        """The keys at position 0 with the sinks', and with those of `moves` at their `goal`.

        `first` [B, heads, sinks + block, D] are the keys of the sinks and of the block.
        """
        spec, heads = self.joint, self.places.first[:, None]
        sinks = torch.arange(spec.sinks)
        sink_pos = flat["pos"].index_select(1, (sinks + heads).flatten()).unflatten(1, (-1, spec.sinks))
        pos = torch.cat([sink_pos, block.pos[..., spec.slots :]], 2)
        sink, fresh = rotation.turn(first, pos, 0).split([spec.sinks, spec.block], 2)
        arriving = take(fresh, (moves.source - spec.slots).clamp(min=0))
        mine = (moves.meant & (moves.source >= spec.slots))[..., None]
        held = self.rows(flat, "turned", self.entries(moves.source, block))
        places = [torch.cat([sinks.expand(*entry.shape[:2], -1), entry], 2) for entry in goal]
        return self.put(flat, "turned", places, torch.cat([sink, torch.where(mine, arriving, held)], 2))

    def put(self, flat: dict[str, Tensor], name: str, entries: list[Tensor], rows: Tensor) -> dict[str, Tensor]:
        """The members' tensors `name` with `rows` [B, heads, n, D] at `entries` [B, Hk, n]."""
        found = {}
        for i, entry, part in zip(self.members, entries, rows.split(self.heads, 1), strict=True):
            old = flat[f"{name}.{i}"]
            found[f"{name}.{i}"] = old.scatter(2, spread(entry, old), part)
        return found

    def folded(
        self, flat: dict[str, Tensor], block: Block, kernel: Kernel, moves: Moves, key: Tensor, value: Tensor
    ) -> dict[str, Tensor]:
        """The memory with those in it that are gone; key and value [B, heads, block, D] are those of `moves.lost`."""
        assert kernel.map_k is not None
        lost, before = moves.lost, self.whole(flat, "memory")
        phi = features(kernel, kernel.map_k, key, block.pos.gather(2, lost))
        memory = fold(before, block, phi, moves.gone * block.held.gather(2, lost).exp(), value)
        if self.joint.is_delta:
            answers = self.corrected(before, block, kernel, moves, phi, key, value)
            memory = torch.cat([answers, memory[..., -1:]], -1)
        return self.split("memory", memory)

    def corrected(
        self, memory: Tensor, block: Block, kernel: Kernel, moves: Moves, phi: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """`fold_delta` of what is gone; a last entry that is none carries the clock's end."""
        pad, lost = torch.nn.functional.pad, moves.lost
        phi, key, value = (pad(x, (0, 0, 0, 1)) for x in (phi, key, value))
        clock = torch.cat([block.clock.gather(2, lost), block.passed], -1)
        weight, pos = pad(block.before.gather(2, lost).exp(), (0, 1)), pad(block.pos.gather(2, lost), (0, 1))
        return fold_delta(kernel, memory[..., :-1], pad(moves.gone, (0, 1)), phi, key, value, pos, weight, clock)

    def refilled(self, score: Tensor, block: Block, won: Tensor, moves: Moves) -> dict[str, tuple[Tensor, Tensor]]:
        """What the slots have now of the packed fields, and where that belongs."""
        S, X = self.joint.slots, won.shape[-1]
        slot = torch.where(self.stays(won), torch.arange(S), S)
        slot = torch.nn.functional.pad(slot, (0, X + 1 - S), value=S)  # [B, heads, X + 1], the last for nobody
        meant = moves.meant
        slot = slot.scatter(2, torch.where(meant, moves.source, X), torch.where(meant, moves.target, S))[..., :X]

        def table(new: Tensor, blank: float) -> Tensor:  # [B, heads, X, ...] -> [B, heads, S, ...]
            empty = torch.full_like(new[:, :, : S + 1], blank)
            return empty.scatter(2, spread(slot, new), new)[:, :, :S]

        return {
            "pos": (table(block.pos, EMPTY).flatten(1), self.places.packed.flatten()),
            "decay": (table(block.held, 0.0).flatten(1), self.places.packed.flatten()),
            "score": (table(score, 0.0).flatten(1), self.places.score.flatten()),
        }


def fold(memory: Tensor, block: Block, phi: Tensor, weight: Tensor, value: Tensor) -> Tensor:
    """memory [B, heads, F, D + 1] a block later, with n tokens of features phi [B, heads, n, F] folded into it."""
    new = (phi * weight[..., None]).transpose(-1, -2) @ with_ones(value.to(phi.dtype))
    return memory * block.passed.exp()[..., None] + new


def first_of(mask: Tensor, most: int, instead: int) -> tuple[Tensor, Tensor]:
    """Indices [..., most] of the first True in mask [..., X], and whether there is one; else `instead` + 0, 1, …"""
    X = mask.shape[-1]
    value = torch.where(mask, X - torch.arange(X), 0).topk(most).values
    return torch.where(value > 0, X - value, instead + torch.arange(most)), value > 0


class Leave(nn.Module):
    """The block that leaves the window when one begins; rows where none begins stay as they are."""

    def __init__(self, model: Any, layout: StateLayout):
        super().__init__()
        self.layout, modules, scaling = layout, list(kernelized_layers(model).values()), scalings(model, layout)
        alike: dict[Any, list[int]] = {}
        for i, layer in enumerate(layout.layers):
            alike.setdefault((kind(layer), scaling[i], turning(modules[i].kernelize)), []).append(i)
        self.groups = [
            Group(layout, members, [modules[i].kernelize for i in members], key[1]) for key, members in alike.items()
        ]
        self.registered = nn.ModuleList(self.groups)

    def forward(self, flat: dict[str, Tensor]) -> dict[str, Tensor]:
        own: dict[str, Tensor] = {}
        packed: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for group in self.groups:
            new, fields = group(flat)
            own |= new
            for name, part in fields.items():
                packed.setdefault(name, []).append(part)
        emptied = self.emptied(flat)
        own |= {name: replaced(emptied.get(name, flat[name]), parts) for name, parts in packed.items() if name in flat}
        own |= {name: x for name, x in emptied.items() if name not in own}
        return {name: own[name] for name in self.layout.shapes if name in own}

    def emptied(self, flat: dict[str, Tensor]) -> dict[str, Tensor]:
        """`pos` and `mass` with nothing where a block has left."""
        found = {"pos": flat["pos"], "mass": flat["mass"]}
        index, begins = [], []
        for group in self.groups:
            block = group.block(flat)
            at = block.leaving + group.places.first[:, None]
            index.append(at.flatten(1))
            begins.append(block.begins.expand_as(at).flatten(1))
        at, there = torch.cat(index, 1), torch.cat(begins, 1)
        for name, x in found.items():
            blank = torch.full_like(x[:, :1], self.layout.fill(name))
            found[name] = x.scatter(1, at, torch.where(there, blank, x.gather(1, at)))
        return found


def replaced(packed: Tensor, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """A packed field [B, N] with numbers [B, n] where they belong, [n]; what belongs behind its end is left out."""
    N = packed.shape[1]
    where, start = torch.arange(N + 1), N
    for _, at in parts:
        where = where.scatter(0, at, start + torch.arange(len(at)))
        start += len(at)
    return torch.cat([packed, *(numbers for numbers, _ in parts)], 1).index_select(1, where[:N])


def kind(layer: LayerShape) -> Any:
    """Layers of one kind differ in nothing but their slots, and in those by less than a factor of four."""
    return (layer.spec.replace(slots=size_class(layer.spec.slots)), layer.heads, layer.kv_heads, layer.head_dim)


def turning(attention: KernelAttention) -> Any:
    """What tells one layer's rotary positions from another's."""
    if attention.rotary is None:
        return None
    rotation = attention.rotary.rotation()
    return tuple(rotation.frequencies.tolist()), rotation.interleaved


def size_class(slots: int) -> int:
    """16, 64, 256 …: budgets of one class are computed together; little goes to places that are not there."""
    size = 16
    while size < slots:
        size *= 4
    return size if slots else 0
