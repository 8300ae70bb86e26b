"""KernelSpec: everything that one converted layer's arithmetic depends on, as frozen, self-checking data."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass

RULES = ("additive",)
DECAYS = ("none", "fixed")
POLICIES = ("attention", "recall", "value", "mixed")
NO_MEMORY = "none"


class SpecError(ValueError):
    """A choice that makes no sense; the message names the field, its value and what is allowed."""


def choose(field: str, value: object, allowed) -> None:
    """Raises SpecError unless `value` is one of `allowed`, with the nearest allowed name as a suggestion."""
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), list(allowed), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise SpecError(f"{field}={value!r} is not one of {', '.join(map(str, allowed))}{hint}")


@dataclass(frozen=True)
class KernelSpec:
    """One layer's choice.

    A query sees, exactly: the first `sinks` tokens of its sequence, at least its `window` last tokens (itself
    included), and `slots` further tokens that won the competition of `policy`. Everything else is in the
    memory, a linear attention with `feature_map` of `feature_dim` features a head.

    Positions are cut into blocks of `block` tokens, counted from the first token of the sequence; tokens leave
    the window a whole block at a time. `block=1` is the classical sliding window.
    """

    feature_map: str = "hedgehog"
    feature_dim: int = 128
    window: int = 64
    sinks: int = 4
    slots: int = 176
    policy: str = "mixed"
    block: int = 16
    decay: str = "fixed"
    rule: str = "additive"

    def __post_init__(self) -> None:
        for field in ("feature_dim", "window", "sinks", "slots", "block"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int):
                raise SpecError(f"{field}={value!r} is not a whole number")
        least = {"feature_dim": 1, "window": 1, "sinks": 0, "slots": 0, "block": 1}
        for field, low in least.items():
            if getattr(self, field) < low:
                raise SpecError(f"{field}={getattr(self, field)} is below {low}")
        choose("rule", self.rule, RULES)
        choose("decay", self.decay, DECAYS)
        choose("policy", self.policy, POLICIES)
        if self.feature_map != NO_MEMORY:
            from .feature_maps import FEATURE_MAPS

            choose("feature_map", self.feature_map, (*FEATURE_MAPS, NO_MEMORY))
            FEATURE_MAPS[self.feature_map].check(self.feature_dim)
        if self.slots and self.policy in ("recall", "mixed") and not self.has_memory:
            raise SpecError(
                f"policy={self.policy!r} ranks tokens by the error of the memory, but feature_map='none' has no "
                "memory; use policy='attention' or 'value'"
            )

    # --- sizes, in tokens -----------------------------------------------------------------------------------

    @property
    def has_memory(self) -> bool:
        return self.feature_map != NO_MEMORY

    @property
    def back(self) -> int:
        """Blocks before the current one that every query of a block still sees."""
        return -(-(self.window - 1) // self.block)

    @property
    def ring(self) -> int:
        """Positions that the window's buffer holds: the current block and the `back` blocks before it."""
        return (self.back + 1) * self.block

    @property
    def positions(self) -> int:
        """Key-value pairs held exactly, a KV head: ring + sinks + slots. What a state budget counts."""
        return self.ring + self.sinks + self.slots

    @property
    def shares(self) -> tuple[tuple[str, int], ...]:
        """The slots as (score, capacity) in the order in which a token applies for them."""
        if self.policy == "mixed":
            half = self.slots // 2
            return (("attention", self.slots - half), ("recall", half))
        return ((self.policy, self.slots),)

    # --- data -----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> KernelSpec:
        """Strict: an unknown field is an error with a suggestion."""
        if not isinstance(data, dict):
            raise SpecError(f"a kernel spec is a mapping of fields, not {type(data).__name__}")
        for field in data:
            choose("field", field, [f.name for f in dataclasses.fields(cls)])
        return cls(**data)

    def replace(self, **changes) -> KernelSpec:
        return dataclasses.replace(self, **changes)
