"""What this release knows by name."""

from __future__ import annotations

from .recipe import recipes
from .runtime.feature_maps import FEATURE_MAPS, FeatureMap
from .runtime.modeling import FAMILIES, Family
from .runtime.spec import DECAYS, POLICIES, RULES

DECAY_MEANING = {
    "none": "nothing fades",
    "fixed": "one learned half-life a key-value head",
    "gated": "every token sets its own, from its key and value",
}
RULE_MEANING = {
    "additive": "S + φ(k) vᵀ, under one normaliser with the exact part",
    "delta": "S + φ(k) β(v − Sᵀφ(k))ᵀ: corrects what the memory answers; weighted by the additive mass",
    "gated_delta": "the same on a memory that decays",
}
POLICY_MEANING = {
    "attention": "slots go to the tokens that received most attention in the window",
    "recall": "slots go to the tokens that the memory recalls worst",
    "value": "slots go to the tokens with the longest values",
    "keydiff": "slots go to the tokens whose keys are least like the mean key",
    "learned": "slots go by a trained read-out of those four, key and value; starts as attention",
    "forecast": "slots go by a small network's forecast of the attention still to come; starts as recall",
    "mixed": "half by attention, half by recall; any two are joined as in 'learned+recall'",
}


def catalogue() -> dict[str, dict[str, str]]:
    """Group -> name -> meaning: feature maps, rules, decays, policies, model families, shipped recipes."""
    return {
        "feature maps": {name: _describe(kind) for name, kind in sorted(FEATURE_MAPS.items())},
        "rules": {name: RULE_MEANING[name] for name in RULES},
        "decays": {name: DECAY_MEANING[name] for name in DECAYS},
        "policies": {name: POLICY_MEANING[name] for name in POLICIES},
        "model families": {name: _family(family) for name, family in sorted(FAMILIES.items())},
        "recipes": {recipe["name"]: recipe["description"] for recipe in recipes()},
    }


def _family(family: Family) -> str:
    return f"refused: {family.refused}" if family.refused else family.note


def _describe(kind: type[FeatureMap]) -> str:
    first = (kind.__doc__ or "").strip().splitlines()[0].rstrip(".")
    return f"{first} ({kind.paper})"
