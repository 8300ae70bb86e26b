"""Feature maps: phi(q)ᵀphi(k) stands for exp(q·k). One class a map, with its paper; `FEATURE_MAPS` is the registry.

Every map is token-wise: features of a token depend on that token (and its position) alone. Inputs arrive scaled by
the square root of the attention scaling, so that the target is exp(x·y) itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .spec import SpecError

FEATURE_MAPS: dict[str, type[FeatureMap]] = {}


def register(name: str):
    """Class decorator: makes a map known by `name`; a second map of that name is refused."""

    def add(cls: type[FeatureMap]) -> type[FeatureMap]:
        if name in FEATURE_MAPS:
            raise ValueError(f"feature map {name!r} is already registered as {FEATURE_MAPS[name].__name__}")
        FEATURE_MAPS[name] = cls
        cls.name = name
        return cls

    return add


class FeatureMap(nn.Module):
    """x [B, H, T, D], pos [B, 1 or H, T] -> features [B, H, T, F], float32 at least, one map a head.

    Subclasses set `paper`, and override `reset` and `forward`; `check` refuses feature dimensions they cannot have.
    """

    name: str
    paper: str

    def __init__(self, heads: int, head_dim: int, feature_dim: int):
        super().__init__()
        self.heads, self.head_dim, self.feature_dim = heads, head_dim, feature_dim

    @classmethod
    def check(cls, feature_dim: int) -> None:
        """Raises SpecError when the map cannot have `feature_dim` features."""

    def reset(self) -> None:
        """Initialises the parameters; goes through `transformers.initialization`, so that loading can skip it."""

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        raise NotImplementedError


class Projected(FeatureMap):
    """A map with one matrix a head, `weight` [H, D, columns], that starts as (a slice of) the identity."""

    def __init__(self, heads: int, head_dim: int, feature_dim: int):
        super().__init__(heads, head_dim, feature_dim)
        self.weight = nn.Parameter(torch.empty(heads, head_dim, self.columns))

    @property
    def columns(self) -> int:
        return self.feature_dim

    def reset(self) -> None:
        repeats = -(-self.columns // self.head_dim)
        eye = torch.eye(self.head_dim).repeat(1, repeats)[:, : self.columns]
        init.copy_(self.weight, eye.expand_as(self.weight))

    def project(self, x: Tensor) -> Tensor:  # [B, H, T, D] -> [B, H, T, columns]
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.to(wide) @ self.weight.to(wide)


@register("elu")
class Elu(Projected):
    """elu(xW) + 1."""

    paper = "arXiv:2006.16236"

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        return nn.functional.elu(self.project(x)) + 1


@register("relu")
class Relu(Projected):
    """relu(xW), with W at the identity: the plain rectifier."""

    paper = "arXiv:2103.13076"

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        return nn.functional.relu(self.project(x)) + 1e-6  # the normaliser must stay positive


@register("hedgehog")
class Hedgehog(Projected):
    """softmax(xW) ⊕ softmax(−xW): learned, positive and spiky."""

    paper = "arXiv:2402.04347"

    @classmethod
    def check(cls, feature_dim: int) -> None:
        if feature_dim % 2:
            raise SpecError(f"feature_dim={feature_dim} is odd; hedgehog has a positive and a negative half")

    @property
    def columns(self) -> int:
        return self.feature_dim // 2

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        z = self.project(x)
        return torch.cat([z.softmax(-1), (-z).softmax(-1)], -1)


@register("favor")
class Favor(FeatureMap):
    """Positive orthogonal random features: exp(xΩ − |x|²/2) / √F, unbiased for exp(x·y).

    The exponent is used as it is: a stabiliser taken over the sequence would leak the future. `limit` bounds it,
    so that an outlier cannot overflow float32.
    """

    paper = "arXiv:2009.14794"
    limit = 30.0

    def __init__(self, heads: int, head_dim: int, feature_dim: int):
        super().__init__(heads, head_dim, feature_dim)
        self.weight = nn.Parameter(torch.empty(heads, head_dim, feature_dim))

    def reset(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        blocks = [self._orthogonal(generator) for _ in range(-(-self.feature_dim // self.head_dim))]
        omega = torch.cat(blocks, -1)[:, : self.feature_dim]
        init.copy_(self.weight, omega.expand_as(self.weight))

    def _orthogonal(self, generator: torch.Generator) -> Tensor:  # [D, D], rows of N(0, I) length
        gauss = torch.randn(self.head_dim, self.head_dim, generator=generator)
        norms = torch.randn(self.head_dim, self.head_dim, generator=generator).norm(dim=0)
        return torch.linalg.qr(gauss)[0] * norms

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide)
        exponent = x @ self.weight.to(wide) - x.square().sum(-1, keepdim=True) / 2
        return exponent.clamp(max=self.limit).exp() / math.sqrt(self.feature_dim)
