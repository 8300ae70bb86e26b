"""KernelSpec: everything that one converted layer's arithmetic depends on, as frozen, self-checking data."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from functools import cached_property, lru_cache

RULES = ("additive", "delta", "gated_delta")
DECAYS = ("none", "fixed", "gated")
STATISTICS = ("attention", "recall", "value", "keydiff")  # what a token's score may be made of
TRAINED = ("learned", "forecast")  # scores that training shapes
SCORES = (*STATISTICS, *TRAINED)
POLICIES = (*SCORES, "mixed")  # and any two scores, "attention+value"
MIXED = "attention+recall"
NO_MEMORY = "none"
TILE = 64  # tokens: what the parallel implementations take together, the side of their score matrices


class SpecError(ValueError):
    """A choice that makes no sense; the message names the field, its value and what is allowed."""


MOST_LAYERS = 10_000  # that a model can have, and a plan may speak of
LARGEST = 2**31 - 1  # of tokens, slots and features: sizes of tensors stay numbers that torch can hold


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

    A `policy` is one score, or two joined by "+": the first then decides over `share` of the slots, the second, among
    those that the first rejects, over the rest. "mixed" stands for "attention+recall". `sink_logits` gives every query
    head a learned logit that only the normaliser sees. With `aging`, attention received long ago counts less: by a
    factor e every so many tokens; 0: it counts for ever.

    With `head_slots`, a number for each KV head, the heads share the layer's slots unequally; `slots` is then their
    mean, rounded up, and the state takes no more bytes than with `slots` for every head.

    Of the trained scores "learned" weighs what its slots hold, so that a model's own loss trains it; "forecast" is
    fitted by itself, to the attention that softmax pays to a token once it has left the window.

    With a `reach`, sinks and slots that stand further back than so many tokens are seen as if they stood there: where
    positions are rotary, no query meets a distance that the original was never trained for. 0: true distances.
    """

    feature_map: str = "hedgehog"
    feature_dim: int = 64
    window: int = 64
    sinks: int = 4
    slots: int = 176
    policy: str = "mixed"
    block: int = 16
    decay: str = "fixed"
    rule: str = "additive"
    share: float = 0.5
    sink_logits: bool = False
    aging: int = 0
    head_slots: tuple[int, ...] = ()
    reach: int = 0

    def __post_init__(self) -> None:
        for field in ("feature_dim", "window", "sinks", "slots", "block", "aging", "reach"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int):
                raise SpecError(f"{field}={value!r} is not a whole number")
        least = {"feature_dim": 1, "window": 1, "sinks": 0, "slots": 0, "block": 1, "aging": 0, "reach": 0}
        for field, low in least.items():
            if not low <= getattr(self, field) <= LARGEST:
                problem = f"below {low}" if getattr(self, field) < low else f"above {LARGEST}"
                raise SpecError(f"{field}={getattr(self, field)} is {problem}")
        if 0 < self.reach < self.least_reach:
            raise SpecError(f"reach={self.reach} is neither 0 nor at least {self.least_reach}: the window is not moved")
        choose("rule", self.rule, RULES)
        choose("decay", self.decay, DECAYS)
        if self.feature_map != NO_MEMORY:
            from .feature_maps import FEATURE_MAPS

            choose("feature_map", self.feature_map, (*FEATURE_MAPS, NO_MEMORY))
            FEATURE_MAPS[self.feature_map].check(self.feature_dim)
        self._check_rule()
        self._check_policy()
        self._check_heads()
        if not isinstance(self.sink_logits, bool):
            raise SpecError(f"sink_logits={self.sink_logits!r} is neither true nor false")

    def _check_rule(self) -> None:
        if self.is_delta and not self.has_memory:
            raise SpecError(f"rule={self.rule!r} corrects the memory, but feature_map='none' has no memory")
        if self.rule == "delta" and self.decay != "none":
            raise SpecError(f"decay={self.decay!r}, but rule='delta' does not decay; use 'none' or rule='gated_delta'")
        if self.rule == "gated_delta" and self.decay == "none":
            raise SpecError("rule='gated_delta' decays; use decay='fixed' or 'gated', or rule='delta'")

    def _check_policy(self) -> None:
        names = self._score_names()
        if len(names) > 2 or (len(names) == 2 and (set(names) - set(SCORES) or names[0] == names[1])):
            raise SpecError(
                f"policy={self.policy!r} is not two different scores of {', '.join(SCORES)} joined by '+', "
                "as in 'attention+recall'"
            )
        if len(names) == 1:
            choose("policy", self.policy, POLICIES)
        if isinstance(self.share, bool) or not isinstance(self.share, float) or not 0 < self.share < 1:
            raise SpecError(f"share={self.share!r} is not a number between 0 and 1")
        if len(names) == 1 and self.share != 0.5:
            raise SpecError(f"share={self.share} divides slots between two scores; policy={self.policy!r} is one")
        if self.slots and "recall" in names and not self.has_recall:
            why = "feature_map='none' has no memory"
            if self.has_memory:
                why = f"under rule={self.rule!r} what the memory answers depends on who holds the slots"
            raise SpecError(
                f"policy={self.policy!r} ranks tokens by the error of the memory, but {why}; "
                "use policy='attention', 'value', 'keydiff', 'learned' or 'forecast'"
            )

    def _check_heads(self) -> None:
        given = self.head_slots
        whole = isinstance(given, (tuple, list)) and all(isinstance(n, int) and not isinstance(n, bool) for n in given)
        if not whole or any(n < 0 for n in given):
            raise SpecError(f"head_slots={given!r} is not a list of whole numbers, 0 or more, one for each KV head")
        object.__setattr__(self, "head_slots", tuple(given))
        if given and self.slots != (mean := mean_slots(given)):
            raise SpecError(f"slots={self.slots} is not {mean}, the mean of head_slots={list(given)} rounded up")

    def _score_names(self) -> tuple[str, ...]:
        return tuple((MIXED if self.policy == "mixed" else str(self.policy)).split("+"))

    # --- sizes, in tokens -----------------------------------------------------------------------------------

    @property
    def has_memory(self) -> bool:
        return self.feature_map != NO_MEMORY

    @property
    def is_delta(self) -> bool:
        return self.rule != "additive"

    @property
    def has_recall(self) -> bool:
        """Whether a token's recall error is defined before it is known who holds the slots."""
        return self.has_memory and not self.is_delta

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
    def least_reach(self) -> int:
        """Distance at which kernels that read whole tiles of queries take no token for one of the window any more."""
        return self.back * self.block + 2 * max(self.block, TILE)

    @property
    def shares(self) -> tuple[tuple[str, int], ...]:
        """The slots as (score, capacity) in the order in which a token applies for them."""
        return self.divided(self.slots)

    def shares_of(self, head: int) -> tuple[tuple[str, int], ...]:
        """`shares` of one KV head."""
        return self.divided(self.head_slots[head] if self.head_slots else self.slots)

    def divided(self, slots: int) -> tuple[tuple[str, int], ...]:
        """`shares` of so many slots."""
        names = self._score_names()
        if len(names) == 1:
            return ((names[0], slots),)
        second = int(slots * (1 - self.share) + 1e-9)
        return ((names[0], slots - second), (names[1], second))

    @property
    def is_packed(self) -> bool:
        """Whether heads with few slots lend the places they do not need to heads with many."""
        return bool(self.head_slots)

    @property
    def spread(self) -> Spread:
        """The same choice with room for the largest budget in every head: what an implementation works with."""
        return spread(self)

    def statistics(self, score: str) -> tuple[str, ...]:
        """What a trained score reads, besides keys and values: what streams, and for the forecast in any kernel."""
        without = {"keydiff"} if score == "forecast" else set()
        without |= set() if self.has_recall else {"recall"}
        return tuple(s for s in STATISTICS if s not in without)

    def scores_by(self, score: str) -> bool:
        """Whether slots go by this score."""
        return bool(self.slots) and score in self._score_names()

    def measures(self, statistic: str) -> bool:
        """Whether some score needs `statistic` of every token."""
        return statistic in self._measured

    @cached_property  # asked several times in every step
    def _measured(self) -> frozenset[str]:
        scores = filter(self.scores_by, SCORES)
        return frozenset(s for score in scores for s in (self.statistics(score) if score in TRAINED else (score,)))

    @property
    def learned_share(self) -> int | None:
        """The index in `shares` of the learned score, if the policy has it."""
        return self._score_names().index("learned") if self.scores_by("learned") else None

    # --- data -----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict:
        return dataclasses.asdict(self) | {"head_slots": list(self.head_slots)}

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


class Spread(KernelSpec):
    """A spec whose `slots` are the largest of `head_slots`: each head uses as many of them as its own number says."""

    @property
    def is_packed(self) -> bool:
        return False

    def _check_heads(self) -> None:
        pass


@lru_cache(maxsize=512)  # layers may differ
def spread(spec: KernelSpec) -> Spread:
    return Spread(**{**dataclasses.asdict(spec), "slots": max(spec.head_slots)})


def mean_slots(head_slots: tuple[int, ...] | list[int]) -> int:
    """The places a head that all heads together need."""
    return -(-sum(head_slots) // len(head_slots))
