"""Feature maps: phi(q)ᵀphi(k) stands for exp(q·k). One class a map, with its paper; `FEATURE_MAPS` is the registry.

Every map is token-wise: features of a token depend on that token (and its position) alone. Inputs arrive scaled by
the square root of the attention scaling, so that the target is exp(x·y) itself. Exponents are never shifted by a
maximum over the sequence, which would leak the future; `bounded` cuts outliers off before float32 overflows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .spec import SpecError

FEATURE_MAPS: dict[str, type[FeatureMap]] = {}
LIMIT = 30.0  # of an exponent: e^30 from both sides and 10^12 tokens stay below float32's 10^38
FLOOR = 1e-6  # of a feature that could be zero in all channels: the normaliser must stay positive
TAU = 0.1  # softness of a key's choice among centres, relative to its mean distance from the chosen one
RIDGE = 1e-3  # of covariances and kernel matrices, relative to their mean diagonal


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

    Subclasses set `paper`, and override `reset` and `forward`; `check` refuses feature dimensions they cannot have,
    `calibrate` fits a layer's two maps to data.
    """

    name: str
    paper: str
    positive = True  # phi(q)ᵀphi(k) >= 0 for every q and k
    calibrated = False  # whether `calibrate` does anything

    def __init__(self, heads: int, head_dim: int, feature_dim: int):
        super().__init__()
        self.check(feature_dim, head_dim)
        self.heads, self.head_dim, self.feature_dim = heads, head_dim, feature_dim

    @classmethod
    def check(cls, feature_dim: int, head_dim: int | None = None) -> None:
        """Raises SpecError when the map cannot have `feature_dim` features; rules that need head_dim wait for it."""

    @classmethod
    def nearest(cls, feature_dim: int, head_dim: int) -> int:
        """The largest size up to `feature_dim` that the map can have; SpecError if there is none."""
        for size in range(feature_dim, 0, -1):
            try:
                cls.check(size, head_dim)
            except SpecError:
                continue
            return size
        raise SpecError(f"feature_dim={feature_dim} is too small for {cls.name} on heads of {head_dim}")

    def reset(self) -> None:
        """Initialises the parameters; goes through `transformers.initialization`, so that loading can skip it."""

    @classmethod
    def calibrate(cls, map_q: FeatureMap, map_k: FeatureMap, query: Tensor, key: Tensor) -> None:
        """Fits a layer's two maps to its own queries [N, H, D] and keys [N, Hk, D], scaled as in `forward`."""

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        raise NotImplementedError


# --- shared arithmetic --------------------------------------------------------------------------------------


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def heads_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, H, T, D] by a matrix a head, weight [H, D, C] -> [B, H, T, C], float32 at least."""
    x = wide(x)
    return x @ weight.to(x.dtype)


def bounded(exponent: Tensor) -> Tensor:
    return exponent.clamp(max=LIMIT)


def half_norm(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True) / 2


def even(name: str, feature_dim: int, reason: str) -> None:
    if feature_dim % 2:
        raise SpecError(f"feature_dim={feature_dim} is odd; {name} {reason}")


def triangle(feature_dim: int) -> int:
    """r with r(r + 1)/2 = feature_dim, or the one just below."""
    return (math.isqrt(8 * feature_dim + 1) - 1) // 2


def triangular(name: str, feature_dim: int, least: int) -> None:
    """Refuses sizes that are not r(r + 1)/2, the products of r numbers in pairs, with r >= least."""
    r = max(triangle(feature_dim), least)
    if feature_dim != r * (r + 1) // 2:
        sizes = f"{r * (r + 1) // 2} or {(r + 1) * (r + 2) // 2}"
        raise SpecError(
            f"feature_dim={feature_dim}: {name} has r(r+1)/2 features, one a pair of r numbers; use {sizes}"
        )


def pairs(x: Tensor) -> Tensor:
    """[..., r] -> [..., r(r + 1)/2] with pairs(x)·pairs(y) = (x·y)²: every product once."""
    first, second = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    twice = 1.0 + (first != second).to(x.dtype)
    return x[..., first] * x[..., second] * twice.sqrt()


def orthogonal_gaussian(rows: int, columns: int, seed: int) -> Tensor:
    """[rows, columns] with columns of N(0, I), orthogonal to each other in blocks of `rows` (arXiv:2009.14794)."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(-(-columns // rows)):
        Q, R = torch.linalg.qr(torch.randn(rows, rows, generator=generator))
        directions = Q * R.diagonal().sign()  # the factorisation prefers a sign; uniform directions have none
        blocks.append(directions * torch.randn(rows, rows, generator=generator).norm(dim=0))
    return torch.cat(blocks, -1)[:, :columns]


def key_heads(query: Tensor, groups: int) -> Tensor:
    """Queries [N, H, D] -> [Hk, N·G, D], those of each key head's group together."""
    return query.unflatten(1, (groups, -1)).permute(1, 0, 2, 3).flatten(1, 2)


def put(parameter: Tensor, value: Tensor) -> None:
    """Writes a value a key head [Hk, ...] to a parameter a head [H, ...]; query heads take their group's."""
    parameter.data.copy_(value.repeat_interleave(len(parameter) // len(value), 0))


# --- one matrix a head --------------------------------------------------------------------------------------


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
        return heads_matmul(x, self.weight)


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
        return nn.functional.relu(self.project(x)) + FLOOR


@register("t2r")
class T2R(Projected):
    """relu(xW + b)."""

    paper = "arXiv:2103.13076"

    def __init__(self, heads: int, head_dim: int, feature_dim: int):
        super().__init__(heads, head_dim, feature_dim)
        self.bias = nn.Parameter(torch.empty(heads, feature_dim))

    def reset(self) -> None:
        super().reset()
        init.zeros_(self.bias)

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        return nn.functional.relu(self.project(x) + self.bias[:, None]) + FLOOR


@register("exp")
class Exp(Projected):
    """exp(xW) / √F: a softmax without its normaliser."""

    paper = "arXiv:2402.04347"

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        return bounded(self.project(x)).exp() / math.sqrt(self.feature_dim)


@register("lln")
class LogNormal(Projected):
    """exp(a xW): the scale a of queries and of keys gives log φ(q)·φ(k) the variance of q·k."""

    paper = "arXiv:2311.13541"
    calibrated = True
    pairs_held = 512  # queries and keys of which the variance is taken

    def __init__(self, heads: int, head_dim: int, feature_dim: int):
        super().__init__(heads, head_dim, feature_dim)
        self.log_scale = nn.Parameter(torch.empty(heads))

    def reset(self) -> None:
        super().reset()
        init.zeros_(self.log_scale)

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        z = self.project(x) * self.log_scale.exp()[:, None, None]
        return bounded(z).exp() / math.sqrt(self.feature_dim)

    @classmethod
    def calibrate(cls, map_q: FeatureMap, map_k: FeatureMap, query: Tensor, key: Tensor) -> None:
        assert isinstance(map_q, cls)
        assert isinstance(map_k, cls)
        Hk = key.shape[1]
        q, k = key_heads(query, Hk), key_heads(key, Hk)
        q, k = (x[:, :: max(1, x.shape[1] // cls.pairs_held)] for x in (q, k))
        target = (q @ k.mT).flatten(1).var(-1)
        scales = [1 / x.std((1, 2)).clamp(min=1e-6) for x in (q, k)]
        low, high = target.new_full((Hk,), -6.0), target.new_full((Hk,), 4.0)
        for _ in range(20):  # the variance grows with the scale: bisection of its logarithm
            middle = (low + high) / 2
            exponents = [x * (s * middle.exp())[:, None, None] for x, s in zip((q, k), scales, strict=True)]
            less = cls.log_variance(*exponents) < target
            low, high = torch.where(less, middle, low), torch.where(less, high, middle)
        put(map_q.log_scale, scales[0].log() + low)
        put(map_k.log_scale, scales[1].log() + low)

    @staticmethod
    def log_variance(q: Tensor, k: Tensor) -> Tensor:
        """Variance [Hk] of log Σ exp(q_i + k_i) over all pairs of q [Hk, M, D] and k [Hk, N, D]."""
        top_q, top_k = q.amax(-1, keepdim=True), k.amax(-1, keepdim=True)
        log = ((q - top_q).exp() @ (k - top_k).exp().mT).clamp(min=1e-30).log() + top_q + top_k.mT
        return log.flatten(1).var(-1)


@register("hedgehog")
class Hedgehog(Projected):
    """softmax(xW) ⊕ softmax(−xW): learned, positive and spiky."""

    paper = "arXiv:2402.04347"

    @classmethod
    def check(cls, feature_dim: int, head_dim: int | None = None) -> None:
        even("hedgehog", feature_dim, "has a positive and a negative half")

    @property
    def columns(self) -> int:
        return self.feature_dim // 2

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        z = self.project(x)
        return torch.stack([z, -z], -2).softmax(-1).flatten(-2)


@register("dpfp")
class Dpfp(Projected):
    """r ⊙ roll(r, i) for i = 1 … ν, r = relu([z, −z]) of z = xW: products of neighbours."""

    paper = "arXiv:2102.11174"

    @classmethod
    def check(cls, feature_dim: int, head_dim: int | None = None) -> None:
        even("dpfp", feature_dim, "rectifies x and −x")
        if head_dim is not None and feature_dim > 2 * head_dim and feature_dim % (2 * head_dim):
            allowed = f"{feature_dim // (2 * head_dim) * 2 * head_dim}"
            raise SpecError(
                f"feature_dim={feature_dim}: dpfp has {2 * head_dim} features a roll on heads of {head_dim}; "
                f"use a multiple of that, such as {allowed}, or an even number below it"
            )

    @property
    def columns(self) -> int:
        return min(self.feature_dim // 2, self.head_dim)

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        z = self.project(x)
        r = nn.functional.relu(torch.cat([z, -z], -1))
        rolls = range(1, self.feature_dim // (2 * self.columns) + 1)
        return torch.cat([r * r.roll(i, -1) for i in rolls], -1) + FLOOR


@register("cosformer")
class Cosformer(Projected):
    """relu(xW) ⊗ [cos a, sin a], a = π/2 · position/horizon: near tokens count more.

    From `horizon` tokens on the angle stays at π/2, so that no weight becomes negative.
    """

    paper = "arXiv:2202.08791"
    horizon = 16384

    @classmethod
    def check(cls, feature_dim: int, head_dim: int | None = None) -> None:
        even("cosformer", feature_dim, "has a cosine and a sine half")

    @property
    def columns(self) -> int:
        return self.feature_dim // 2

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        r = nn.functional.relu(self.project(x)) + FLOOR
        angle = (pos.to(r.dtype) / self.horizon).clamp(0, 1)[..., None] * (math.pi / 2)
        return torch.cat([r * angle.cos(), r * angle.sin()], -1)


@register("polysketch")
class Polysketch(FeatureMap):
    """(x·y)⁴ by sketches: pairs(xG ⊙ xG'), whose product is a square and so never negative."""

    paper = "arXiv:2310.01655"

    def __init__(self, heads: int, head_dim: int, feature_dim: int):
        super().__init__(heads, head_dim, feature_dim)
        self.width = triangle(feature_dim)
        self.weight = nn.Parameter(torch.empty(heads, head_dim, 2 * self.width))

    @classmethod
    def check(cls, feature_dim: int, head_dim: int | None = None) -> None:
        triangular("polysketch", feature_dim, 1)

    def reset(self, seed: int = 0) -> None:
        init.copy_(self.weight, orthogonal_gaussian(self.head_dim, 2 * self.width, seed).expand_as(self.weight))

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        left, right = heads_matmul(x, self.weight).chunk(2, -1)
        return pairs(left * right / math.sqrt(self.width)) + FLOOR


# --- the exponential kernel itself --------------------------------------------------------------------------


class Exponential(FeatureMap):
    """A map of exp(q·k) that leaves to its features only what no single token can do alone.

    q·k = (q − ν)·(k − μ) + q·μ + ν·(k − μ), with the means ν of a group's queries and μ of its keys: the last two
    terms are factors of one token. A matrix with A Bᵀ = 1 gives what is left of both the same covariance, so that
    |q| and |k|, and with them the variance of random features, are least (arXiv:2302.00787). Without calibration
    means are zero and matrices the identity.
    """

    calibrated = True

    def __init__(self, heads: int, head_dim: int, feature_dim: int):
        super().__init__(heads, head_dim, feature_dim)
        self.mean = nn.Parameter(torch.empty(heads, head_dim))
        self.tilt = nn.Parameter(torch.empty(heads, head_dim))
        self.offset = nn.Parameter(torch.empty(heads))
        self.transform = nn.Parameter(torch.empty(heads, head_dim, self.rank))

    @property
    def rank(self) -> int:
        """Directions that are kept."""
        return self.head_dim

    def reset(self) -> None:
        for parameter in (self.mean, self.tilt, self.offset):
            init.zeros_(parameter)
        init.copy_(self.transform, torch.eye(self.head_dim)[:, : self.rank].expand_as(self.transform))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, H, T, D] -> (what features stand for [B, H, T, rank], the token's own exponent [B, H, T, 1])."""
        centred = wide(x)
        centred = centred - self.mean.to(centred.dtype)[:, None]
        own = heads_matmul(centred, self.tilt[..., None]) + self.offset.to(centred.dtype)[:, None, None]
        return heads_matmul(centred, self.transform), own

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        return self.features(*self.split(x))

    def features(self, z: Tensor, own: Tensor) -> Tensor:
        raise NotImplementedError

    @classmethod
    def calibrate(cls, map_q: FeatureMap, map_k: FeatureMap, query: Tensor, key: Tensor) -> None:
        assert isinstance(map_q, cls)
        assert isinstance(map_k, cls)
        Hk = key.shape[1]
        q, k = key_heads(query, Hk).double(), key_heads(key, Hk).double()
        nu, mu = q.mean(1), k.mean(1)
        A, B = balance(covariance(q - nu[:, None]), covariance(k - mu[:, None]))
        put(map_q.mean, nu)
        put(map_k.mean, mu)
        put(map_q.tilt, mu)
        put(map_q.offset, (nu * mu).sum(-1))
        put(map_k.tilt, nu)
        put(map_k.offset, torch.zeros_like(nu[:, 0]))
        put(map_q.transform, A[..., : map_q.rank])
        put(map_k.transform, B[..., : map_k.rank])


def covariance(x: Tensor) -> Tensor:
    """Centred x [Hk, N, D] -> [Hk, D, D], with a ridge that keeps it invertible."""
    found = x.mT @ x / x.shape[1]
    scale = found.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)
    return found + RIDGE * scale[:, None, None] * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of symmetric positive matrices [..., n, n]."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=1e-12)[..., None, :] ** exponent) @ vectors.mT


def balance(Q: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) with A Bᵀ = 1 and AᵀQA = BᵀKB diagonal and falling: principal directions of queries and keys at once."""
    root, inverse = power(Q, 0.5), power(Q, -0.5)
    values, vectors = torch.linalg.eigh(root @ K @ root)  # the squares of the balanced variances
    values, vectors = values.flip(-1).clamp(min=1e-12), vectors.flip(-1)
    scale = values[..., None, :] ** 0.25
    return inverse @ vectors * scale, root @ vectors / scale


class RandomFeatures(Exponential):
    """Exponential features along random directions `weight` [H, D, columns], redrawn by `reset(seed)`."""

    def __init__(self, heads: int, head_dim: int, feature_dim: int):
        super().__init__(heads, head_dim, feature_dim)
        self.weight = nn.Parameter(torch.empty(heads, head_dim, self.columns))

    @property
    def columns(self) -> int:
        return self.feature_dim

    def reset(self, seed: int = 0) -> None:
        super().reset()
        init.copy_(self.weight, orthogonal_gaussian(self.head_dim, self.columns, seed).expand_as(self.weight))


@register("favor")
class Favor(RandomFeatures):
    """Positive orthogonal random features: exp(xΩ − |x|²/2) / √F, unbiased for exp(x·y)."""

    paper = "arXiv:2009.14794"

    def features(self, z: Tensor, own: Tensor) -> Tensor:
        exponent = heads_matmul(z, self.weight) - half_norm(z) + own
        return bounded(exponent).exp() / math.sqrt(self.feature_dim)


@register("favor_hyperbolic")
class FavorHyperbolic(RandomFeatures):
    """exp(±xΩ − |x|²/2) / √F: every direction and its opposite, with less variance than twice as many directions."""

    paper = "arXiv:2009.14794"

    @classmethod
    def check(cls, feature_dim: int, head_dim: int | None = None) -> None:
        even("favor_hyperbolic", feature_dim, "uses every direction with both signs")

    @property
    def columns(self) -> int:
        return self.feature_dim // 2

    def features(self, z: Tensor, own: Tensor) -> Tensor:
        along = heads_matmul(z, self.weight)
        exponent = torch.cat([along, -along], -1) - half_norm(z) + own
        return bounded(exponent).exp() / math.sqrt(self.feature_dim)


@register("rff")
class Rff(RandomFeatures):
    """[cos zΩ, sin zΩ] · √(2/F) of unit vectors z: the Gaussian kernel of directions; weights may be negative.

    On vectors of their own length these features have the weight exp(|x|²/2) and, on a real layer, half of all
    normalisers below zero; so they take unit vectors, as the paper does.
    """

    paper = "arXiv:2103.02143"
    positive = False

    @classmethod
    def check(cls, feature_dim: int, head_dim: int | None = None) -> None:
        even("rff", feature_dim, "has a cosine and a sine half")

    @property
    def columns(self) -> int:
        return self.feature_dim // 2

    def features(self, z: Tensor, own: Tensor) -> Tensor:
        along = heads_matmul(nn.functional.normalize(z, dim=-1), self.weight)
        size = bounded(own).exp() / math.sqrt(self.columns)
        return torch.cat([along.cos(), along.sin()], -1) * size


@register("taylor")
class Taylor(Exponential):
    """1 + z·z' + (z·z')²/2 of a projection z: at least 1/2, whatever the signs of the features."""

    paper = "arXiv:2402.18668"

    @classmethod
    def check(cls, feature_dim: int, head_dim: int | None = None) -> None:
        triangular("taylor", feature_dim, 2)
        if head_dim is not None and triangle(feature_dim) - 1 > head_dim:
            most = (head_dim + 1) * (head_dim + 2) // 2
            raise SpecError(f"feature_dim={feature_dim}: taylor has at most {most} features on heads of {head_dim}")

    @property
    def rank(self) -> int:
        return triangle(self.feature_dim) - 1

    def features(self, z: Tensor, own: Tensor) -> Tensor:
        powers = torch.cat([torch.ones_like(own), z, pairs(z) / math.sqrt(2.0)], -1)
        return powers * bounded(own).exp()


@register("lowrank")
class LowRank(Exponential):
    """Exponentials on the r = log₂ F principal directions of queries and keys: Π exp(±z_i − z_i²/2).

    This is the two-point Gauss–Hermite rule a direction, exact to third order in z·z' and positive; directions
    beyond the rank are taken at their mean.
    """

    paper = "arXiv:2009.14794"

    @classmethod
    def check(cls, feature_dim: int, head_dim: int | None = None) -> None:
        if feature_dim < 2 or feature_dim & (feature_dim - 1):
            raise SpecError(f"feature_dim={feature_dim} is no power of two; lowrank has two nodes a direction")
        if head_dim is not None and feature_dim.bit_length() - 1 > head_dim:
            raise SpecError(f"feature_dim={feature_dim}: lowrank has at most {head_dim} directions on such heads")

    @property
    def rank(self) -> int:
        return self.feature_dim.bit_length() - 1

    def features(self, z: Tensor, own: Tensor) -> Tensor:
        bit = torch.arange(self.rank, device=z.device)
        signs = torch.arange(self.feature_dim, device=z.device) >> bit[:, None] & 1  # [rank, F]
        exponent = z @ (2 * signs - 1).to(z.dtype) - half_norm(z) + own
        return bounded(exponent).exp() / math.sqrt(self.feature_dim)


# --- landmarks ----------------------------------------------------------------------------------------------


@torch.no_grad()
def kmeans(x: Tensor, count: int, seed: int = 0, rounds: int = 10) -> tuple[Tensor, Tensor]:
    """k-means++ a head: x [Hk, N, D] -> centres [Hk, count, D] and the centre of every point [Hk, N]."""
    generator = torch.Generator().manual_seed(seed)
    heads, N, D = x.shape
    first = torch.randint(N, (heads, 1, 1), generator=generator).to(x.device)
    centres = [x.gather(1, first.expand(-1, -1, D))]
    nearest = (x - centres[0]).square().sum(-1)
    for _ in range(count - 1):
        draw = torch.multinomial(nearest.cpu().float() + 1e-12, 1, generator=generator).to(x.device)
        centres.append(x.gather(1, draw[..., None].expand(-1, -1, D)))
        nearest = torch.minimum(nearest, (x - centres[-1]).square().sum(-1))
    centre = torch.cat(centres, 1)
    for _ in range(rounds):
        member = nn.functional.one_hot(torch.cdist(x, centre).argmin(-1), count).to(x.dtype)
        size = member.sum(1)[..., None]
        centre = torch.where(size > 0, member.mT @ x / size.clamp(min=1), centre)
    return centre, torch.cdist(x, centre).argmin(-1)


@register("nystrom")
class Nystrom(Exponential):
    """k(x, Z) (K(Z, Z) + ridge)^(−1/2) on landmarks Z, the centres of the keys; weights may be negative."""

    paper = "arXiv:2102.03902"
    positive = False

    def __init__(self, heads: int, head_dim: int, feature_dim: int):
        super().__init__(heads, head_dim, feature_dim)
        self.landmarks = nn.Parameter(torch.empty(heads, feature_dim, head_dim))
        self.root = nn.Parameter(torch.empty(heads, feature_dim, feature_dim))

    def reset(self, seed: int = 0) -> None:
        super().reset()
        landmarks = orthogonal_gaussian(self.head_dim, self.feature_dim, seed).mT
        init.copy_(self.landmarks, landmarks.expand_as(self.landmarks))
        init.copy_(self.root, self.inverse_root(landmarks.double()).to(landmarks.dtype).expand_as(self.root))

    @staticmethod
    def inverse_root(landmarks: Tensor) -> Tensor:
        """(G + ridge)^(−1/2) of the landmarks' Gaussian kernel, [..., F, D] -> [..., F, F]."""
        gram = (-torch.cdist(landmarks, landmarks).square() / 2).exp()
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return power(gram + RIDGE * eye, -0.5)

    def features(self, z: Tensor, own: Tensor) -> Tensor:
        # exp(z·y) = exp(|z|²/2) · Gaussian · exp(|y|²/2): the Gaussian's matrix is the better conditioned one
        square = self.landmarks.square().sum(-1)[:, None] / 2
        exponent = heads_matmul(z, self.landmarks.mT) - square.to(z.dtype) + own
        return heads_matmul(bounded(exponent).exp(), self.root)

    @classmethod
    def calibrate(cls, map_q: FeatureMap, map_k: FeatureMap, query: Tensor, key: Tensor) -> None:
        super().calibrate(map_q, map_k, query, key)
        assert isinstance(map_q, cls)
        assert isinstance(map_k, cls)
        z, _ = map_k.split(key.transpose(0, 1)[None])
        centres, _ = kmeans(z[0], map_k.feature_dim)
        root = cls.inverse_root(centres.double())
        for each in (map_q, map_k):
            put(each.landmarks, centres)
            put(each.root, root)


@register("codebook")
class Codebook(FeatureMap):
    """exp(xW + b) / (Σ exp(xW + b))^s: a query weighs centres of keys (s = 0), a key chooses among them (s = 1).

    φ(q)·φ(k) = Σ_i exp(q·c_i) softmax_i(−|k − c_i|²/2τ): the positive, soft form of attention to quantised keys.
    """

    paper = "arXiv:2309.16354"
    calibrated = True

    def __init__(self, heads: int, head_dim: int, feature_dim: int):
        super().__init__(heads, head_dim, feature_dim)
        self.weight = nn.Parameter(torch.empty(heads, head_dim, feature_dim))
        self.bias = nn.Parameter(torch.empty(heads, feature_dim))
        self.tilt = nn.Parameter(torch.empty(heads, head_dim))
        self.share = nn.Parameter(torch.empty(heads))
        self.offset = nn.Parameter(torch.empty(heads))

    def reset(self, seed: int = 0) -> None:
        init.copy_(self.weight, orthogonal_gaussian(self.head_dim, self.feature_dim, seed).expand_as(self.weight))
        for parameter in (self.bias, self.tilt, self.offset):
            init.zeros_(parameter)
        init.constant_(self.share, 0.5)

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        z = heads_matmul(x, self.weight) + self.bias[:, None]
        log_sum = z.logsumexp(-1, keepdim=True) * self.share[:, None, None]
        own = heads_matmul(x, self.tilt[..., None]) + self.offset[:, None, None]
        return bounded(z - log_sum + own).exp()

    @classmethod
    def calibrate(cls, map_q: FeatureMap, map_k: FeatureMap, query: Tensor, key: Tensor) -> None:
        """Centres are those of k-means under the queries' metric, E[(q·(k − c))²]; see `Exponential` for ν and μ."""
        assert isinstance(map_q, cls)
        assert isinstance(map_k, cls)
        Hk = key.shape[1]
        q, k = key_heads(query, Hk).double(), key_heads(key, Hk).double()
        nu, mu = q.mean(1, keepdim=True), k.mean(1, keepdim=True)
        metric = covariance(q - nu)
        _, member = kmeans((k - mu) @ power(metric, 0.5), map_k.feature_dim)
        member = nn.functional.one_hot(member, map_k.feature_dim).to(k.dtype)
        size = member.sum(1).clamp(min=1)[..., None]
        centre = member.mT @ (k - mu) / size  # [Hk, F, D]
        rest = (k - mu) - member @ centre
        spread = ((rest @ metric) * rest).sum(-1, keepdim=True)  # (q·rest)² over the queries
        within = (member.mT @ spread / size)[..., 0]  # [Hk, F]
        put(map_q.weight, (centre + mu).mT)
        put(map_q.bias, within / 2 - (nu @ centre.mT)[:, 0])
        put(map_q.tilt, torch.zeros_like(nu[:, 0]))
        put(map_q.offset, torch.zeros_like(nu[:, 0, 0]))
        put(map_q.share, torch.zeros_like(nu[:, 0, 0]))
        tau = TAU * spread.mean((1, 2))[:, None]
        put(map_k.weight, metric @ centre.mT / tau[..., None])
        norm = ((centre @ metric) * (centre / 2 + mu)).sum(-1)
        put(map_k.bias, -norm / tau)
        put(map_k.tilt, nu[:, 0])
        put(map_k.offset, -(nu * mu).sum(-1)[:, 0])
        put(map_k.share, torch.ones_like(nu[:, 0, 0]))
