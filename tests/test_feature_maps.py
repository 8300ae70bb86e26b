"""Feature maps: laws that every registered one obeys, and how fast each comes near exp(q·k)."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

from kernelize.calibrate import calibrate
from kernelize.runtime.feature_maps import FEATURE_MAPS, RandomFeatures, balance, covariance, kmeans, pairs, register
from kernelize.runtime.modeling import kernelize_model
from kernelize.runtime.spec import KernelSpec, SpecError

HEADS, GROUPS, D = 4, 2, 8
NAMES = sorted(FEATURE_MAPS)
SIZES = [(name, FEATURE_MAPS[name].nearest(size, D)) for name in NAMES for size in (10, 32)]
CALIBRATED = [name for name in NAMES if FEATURE_MAPS[name].calibrated]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def make(name, size, heads=HEADS, dtype=torch.float32):
    made = FEATURE_MAPS[name](heads, D, size)
    with torch.no_grad():
        made.reset()
    return made.to(dtype)


def tokens(heads=HEADS, length=7, scale=1.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(2, heads, length, D, generator=generator, dtype=torch.float64).to(dtype)


def positions(length=7):
    return torch.arange(length)[None, None]


def layer_data(count=600, seed=0, spread=0.35):
    """Queries [N, H, D] and keys [N, Hk, D] with means and unequal directions, as in a trained layer."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(1.6, 0.2, D) * spread
    query = torch.randn(count, HEADS, D, generator=generator) * scale + 0.8
    key = torch.randn(count, GROUPS, D, generator=generator) * scale.flip(0) * 2 - 0.7
    return query, key


def fitted(name, size, calibration=True, seed=0):
    map_q, map_k = make(name, size), make(name, size, GROUPS)
    if isinstance(map_q, RandomFeatures):
        with torch.no_grad():
            map_q.reset(seed)
            map_k.reset(seed)
    if calibration:
        with torch.no_grad():
            type(map_q).calibrate(map_q, map_k, *layer_data())
    return map_q, map_k


@torch.no_grad()
def output_error(name, size, calibration=True, seed=0):
    """Relative error of attention over held-out keys with the map's weights instead of softmax's."""
    map_q, map_k = fitted(name, size, calibration, seed)
    query, key = layer_data(300, seed=1)
    value = torch.randn(GROUPS, 300, 4, generator=torch.Generator().manual_seed(2))
    q, k = query.transpose(0, 1)[None], key.transpose(0, 1)[None]
    pos = torch.arange(300)[None, None]
    phi_q, phi_k = map_q(q, pos)[0].unflatten(0, (GROUPS, -1)), map_k(k, pos)[0][:, None]
    weights = phi_q @ phi_k.mT
    softmax = (q[0].unflatten(0, (GROUPS, -1)) @ k[0][:, None].mT).softmax(-1)
    found = weights @ value[:, None] / weights.sum(-1, keepdim=True)
    target = softmax @ value[:, None]
    return float((found - target).square().sum() / target.square().sum())


# --- laws -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_features_have_their_size_and_are_wide(name, size, dtype):
    phi = make(name, size)(tokens(dtype=dtype), positions())
    assert phi.shape == (2, HEADS, 7, size)
    assert phi.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize(("name", "size"), SIZES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_features_depend_on_the_token_and_its_position_alone(name, size, dtype):
    phi_of, x = make(name, size, dtype=dtype), tokens(dtype=dtype)
    order = torch.tensor([3, 0, 6, 2])
    some = phi_of(x[:, :, order], positions()[..., order])
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(some, phi_of(x, positions())[:, :, order], rtol=bound, atol=bound)


@pytest.mark.parametrize(("name", "size"), SIZES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_weights_are_finite_and_not_negative(name, size, scale):
    phi = make(name, size)(tokens(scale=scale), positions())
    weights = phi @ make(name, size)(tokens(scale=scale, seed=1), positions()).mT
    assert weights.isfinite().all()
    if FEATURE_MAPS[name].positive:
        assert (weights >= 0).all()
    if FEATURE_MAPS[name].positive and scale < 100:
        assert (weights > 0).all()


@pytest.mark.parametrize("name", [n for n in NAMES if not FEATURE_MAPS[n].positive])
def test_a_map_that_says_so_has_negative_weights(name):
    phi_of = make(name, FEATURE_MAPS[name].nearest(16, D))
    weights = phi_of(tokens(length=64), positions(64)) @ phi_of(-tokens(length=64), positions(64)).mT
    assert (weights < 0).any()


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_every_parameter_can_be_trained(name, size):
    map_q, map_k = make(name, size), make(name, size, GROUPS)
    phi_q, phi_k = map_q(tokens(), positions()), map_k(tokens(GROUPS, seed=1), positions())
    weights = phi_q.unflatten(1, (GROUPS, -1)) @ phi_k[:, :, None].mT
    weights.log1p().sum().backward() if FEATURE_MAPS[name].positive else weights.square().sum().backward()
    for part in (map_q, map_k):
        for field, parameter in part.named_parameters():
            assert parameter.grad.isfinite().all(), field
            assert parameter.grad.any(), field


@pytest.mark.parametrize("name", NAMES)
def test_every_map_names_its_paper(name):
    assert FEATURE_MAPS[name].paper.startswith("arXiv:")
    assert FEATURE_MAPS[name].__doc__


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match=r"favor.*Favor"):
        register("favor")(FEATURE_MAPS["elu"])


@pytest.mark.parametrize(("name", "size", "head_dim", "said"), [
    ("hedgehog", 7, None, "odd"), ("favor_hyperbolic", 7, None, "odd"), ("rff", 7, None, "odd"),
    ("cosformer", 7, None, "odd"), ("dpfp", 7, None, "odd"), ("dpfp", 24, 8, "16"),
    ("taylor", 128, None, "120 or 136"), ("taylor", 136, 8, "at most 45"), ("polysketch", 128, None, "120 or 136"),
    ("lowrank", 100, None, "power of two"), ("lowrank", 1024, 8, "at most 8 directions"),
])  # fmt: skip
def test_sizes_that_a_map_cannot_have_are_refused_with_the_reason(name, size, head_dim, said):
    with pytest.raises(SpecError, match=f"feature_dim={size}.*{said}"):
        FEATURE_MAPS[name].check(size, head_dim)
    with pytest.raises(SpecError, match=f"feature_dim={size}"):
        FEATURE_MAPS[name](2, head_dim or 64, size)


@pytest.mark.parametrize("name", NAMES)
def test_the_nearest_size_is_allowed(name):
    for size in (9, 64, 130):
        near = FEATURE_MAPS[name].nearest(size, 64)
        assert near <= size
        KernelSpec(feature_map=name, feature_dim=near)


@pytest.mark.parametrize("name", [n for n in NAMES if issubclass(FEATURE_MAPS[n], RandomFeatures)] + ["polysketch"])
def test_random_features_come_from_their_seed(name):
    drawn = [make(name, FEATURE_MAPS[name].nearest(16, D)) for _ in range(3)]
    with torch.no_grad():
        drawn[2].reset(seed=1)
    assert torch.equal(drawn[0].weight, drawn[1].weight)
    assert not torch.equal(drawn[0].weight, drawn[2].weight)


# --- calibration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in CALIBRATED if n != "lln"])  # its law is the next one
def test_calibration_brings_a_map_nearer_to_softmax(name):
    size = FEATURE_MAPS[name].nearest(36, D)
    assert output_error(name, size) < output_error(name, size, calibration=False)


def test_log_normal_matching_gives_the_weights_the_variance_of_softmax():
    map_q, map_k = fitted("lln", D)
    query, key = (x.transpose(0, 1) for x in layer_data())
    phi_q, phi_k = (f(x[None], positions(600))[0] for f, x in ((map_q, query), (map_k, key)))
    logs = (phi_q.unflatten(0, (GROUPS, -1)) @ phi_k[:, None].mT).log()
    scores = query.unflatten(0, (GROUPS, -1)) @ key[:, None].mT
    torch.testing.assert_close(logs.flatten(1).var(-1), scores.flatten(1).var(-1), rtol=0.05, atol=0)


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibrated_features_are_loaded_not_made_anew(name, tmp_path):
    spec = KernelSpec(
        feature_map=name, feature_dim=FEATURE_MAPS[name].nearest(16, D), window=4, sinks=1, slots=4, block=4
    )
    model = kernelize_model(tiny_llama(), [spec, None])
    initial = {key: value.clone() for key, value in model.state_dict().items() if ".map_" in key}
    calibrate(model, [torch.randint(1, 257, (1, 40), generator=torch.Generator().manual_seed(0))])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert any(not torch.equal(value, loaded[key]) for key, value in initial.items())
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded[key]), key


@pytest.mark.parametrize("name", ["favor", "nystrom"])
def test_what_one_token_can_do_alone_is_exact(name):
    """z·z' plus both tokens' own exponents is q·k, whatever the means and the covariances."""
    map_q, map_k = fitted(name, 16)
    query, key = layer_data(50, seed=3)
    z_q, own_q = map_q.split(query.transpose(0, 1)[None])
    z_k, own_k = map_k.split(key.transpose(0, 1)[None])
    own = own_q.unflatten(1, (GROUPS, -1)) + own_k[:, :, None].mT
    got = z_q.unflatten(1, (GROUPS, -1)) @ z_k[:, :, None].mT + own
    expected = query.transpose(0, 1).unflatten(0, (GROUPS, -1)) @ key.transpose(0, 1)[:, None].mT
    torch.testing.assert_close(got[0], expected, rtol=1e-4, atol=1e-3)


def test_balance_gives_queries_and_keys_the_same_falling_variances():
    query, key = (x[:, 0].double() for x in layer_data())
    Q, K = (covariance((x - x.mean(0))[None]) for x in (query, key))
    A, B = balance(Q, K)
    torch.testing.assert_close(A @ B.mT, torch.eye(D, dtype=A.dtype)[None])
    torch.testing.assert_close(A.mT @ Q @ A, B.mT @ K @ B)
    variances = (A.mT @ Q @ A).diagonal(dim1=-2, dim2=-1)[0]
    torch.testing.assert_close(A.mT @ Q @ A, variances.diag()[None])
    assert (variances.diff() <= 0).all()


def test_kmeans_finds_well_separated_centres():
    centres = torch.eye(D)[:5] * 20
    points = centres.repeat(40, 1) + torch.randn(200, D, generator=torch.Generator().manual_seed(0)) * 0.1
    found, member = kmeans(points[None], 5)
    assert torch.cdist(found[0], centres).min(0).values.max() < 0.2
    assert all(member[0, i::5].unique().numel() == 1 for i in range(5))


def test_pairs_square_the_product():
    x, y = tokens(dtype=torch.float64), tokens(seed=1, dtype=torch.float64)
    torch.testing.assert_close((pairs(x) * pairs(y)).sum(-1), (x * y).sum(-1).square())


# --- rates ----------------------------------------------------------------------------------------------------


def weight_error(name, size, seeds=40):
    """Mean squared error of φ(q)·φ(k) / exp(q·k) over pairs of short vectors, and its bias."""
    q, k = tokens(1, 64, 0.25, dtype=torch.float64), tokens(1, 64, 0.25, seed=1, dtype=torch.float64)
    if name == "rff":  # for which all vectors have length one, and exp(−1) from their own lengths is left out
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    target = (q @ k.mT - (1.0 if name == "rff" else 0.0)).exp()
    ratios = []
    for seed in range(seeds):
        phi = make(name, size, 1)
        with torch.no_grad():
            phi.reset(seed)
            ratios.append(phi(q, positions(64)) @ phi(k, positions(64)).mT / target)
    ratio = torch.stack(ratios)
    return float((ratio - 1).square().mean()), float((ratio.mean(0) - 1).abs().mean())


@pytest.mark.parametrize("name", ["favor", "favor_hyperbolic", "rff"])
def test_random_features_are_unbiased_and_their_error_falls_like_one_over_root_f(name):
    errors = {size: weight_error(name, size)[0] ** 0.5 for size in (32, 128, 512)}
    assert 1.6 < errors[32] / errors[128] < 2.5
    assert 1.6 < errors[128] / errors[512] < 2.5
    assert weight_error(name, 128)[1] < errors[128] / 3


def test_opposite_directions_lower_the_variance():
    assert weight_error("favor_hyperbolic", 128)[0] < weight_error("favor", 128)[0]


@pytest.mark.parametrize(("name", "sizes", "share"), [
    ("nystrom", (4, 16, 64), 0.1), ("taylor", (6, 21, 45), 0.1), ("lowrank", (2, 8, 64), 0.5),
    ("codebook", (4, 16, 64), 0.7),  # nearest centres: in 8 dimensions 16 times as many halve no distance
])  # fmt: skip
def test_error_falls_with_rank(name, sizes, share):
    errors = [output_error(name, size) for size in sizes]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < share * errors[0]
