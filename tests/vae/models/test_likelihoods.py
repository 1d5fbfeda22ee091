"""Every likelihood against scipy, its own total mass, finite differences and its samples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch.autograd import gradcheck

from vae.models import LIKELIHOODS, SPACES, Likelihood, check_likelihood

PAIRS = [(name, space) for name, kind in LIKELIHOODS.items() for space in sorted(kind.spaces)]
GREY = [name for name, space in PAIRS if space == "grey8"]
DEQUANTIZED = ["gaussian", "gaussian_shared", "gaussian_unit", "continuous_bernoulli"]
DTYPES = [torch.float32, torch.float64]


def _make(name: str, space: str, data_shape: tuple[int, ...], dtype=torch.float64, **options):
    options = {"min_scale": 1e-4, "num_components": 3} | options
    return LIKELIHOODS[name](space=space, data_shape=data_shape, **options).to(dtype)


def _given(likelihood: Likelihood, raw: torch.Tensor) -> Any:
    """p(x|z) with location 3 and scale 2 in `continuous`."""
    shape = likelihood.data_shape
    return likelihood(raw, torch.full(shape, 3.0).to(raw), torch.full(shape, 2.0).to(raw))


def _data(space: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    if space == "binary":
        return torch.randint(0, 2, shape, generator=g)
    if space == "grey8":
        x = torch.randint(0, 256, shape, generator=g)
        x.view(-1)[:2] = torch.tensor([0, 255])  # both edges, always
        return x
    return 3 + 4 * torch.randn(shape, generator=g, dtype=torch.float64)


def _noise(shape: tuple[int, ...], dtype=torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _softplus(raw: torch.Tensor) -> np.ndarray:
    return np.logaddexp(0, raw.numpy())


# --- scipy ----------------------------------------------------------------------------------------


def _bin_log_mass(family, mu, sigma, x, tails: bool) -> np.ndarray:
    low, high = (x / 256 - mu) / sigma, ((x + 1) / 256 - mu) / sigma
    if tails:
        low, high = np.where(x == 0, -np.inf, low), np.where(x == 255, np.inf, high)
    # On the side where the distribution function is small: no cancellation.
    flip = low > 0
    low, high = np.where(flip, -high, low), np.where(flip, -low, high)
    return np.log(family.cdf(high) - family.cdf(low))


def _expected(name: str, space: str, raw: torch.Tensor, x: np.ndarray) -> np.ndarray:
    """log p(x_d) by scipy, from raw of shape (N, outputs, D)."""
    r = [part.numpy() for part in raw.unbind(1)]
    scale = [1e-4 + _softplus(part) for part in raw.unbind(1)]
    stats = scipy.stats
    if space == "continuous":
        mu = 3 + 2 * r[0]
        width = {"gaussian_shared": 1e-4 + math.log(2), "gaussian_unit": 1.0}.get(name)
        sigma = 2 * (scale[1] if width is None else width)
        if name == "student_t":
            return stats.t.logpdf(x, 1 + _softplus(raw[:, 2]), mu, sigma)
        return (stats.laplace if name == "laplace" else stats.norm).logpdf(x, mu, sigma)
    if name == "bernoulli":
        return stats.bernoulli.logpmf(x, scipy.special.expit(r[0]))
    if name in ("gaussian", "gaussian_shared", "gaussian_unit"):
        sigma = {"gaussian_shared": 1e-4 + math.log(2), "gaussian_unit": 1.0}.get(name)
        return _bin_log_mass(stats.norm, r[0], scale[1] if sigma is None else sigma, x, False)
    if name == "discretized_gaussian":
        return _bin_log_mass(stats.norm, r[0], scale[1], x, True)
    if name == "discretized_logistic":
        return _bin_log_mass(stats.logistic, r[0], scale[1], x, True)
    if name == "logistic_mixture":
        weights = scipy.special.log_softmax(raw[:, :3].numpy(), axis=1)
        parts = [
            weights[:, k] + _bin_log_mass(stats.logistic, r[3 + k], scale[6 + k], x, True)
            for k in range(3)
        ]
        return np.logaddexp.reduce(parts, axis=0)
    if name == "beta_binomial":
        alpha, beta = (1e-5 + _softplus(part) for part in raw.unbind(1))
        return stats.betabinom.logpmf(x, 255, alpha, beta)
    if name == "categorical":
        table = scipy.special.log_softmax(raw.numpy(), axis=1)
        return np.take_along_axis(table, x[:, None], 1)[:, 0]
    assert name == "continuous_bernoulli"
    rate = np.abs(r[0])
    start = np.where(r[0] < 0, x, 255 - x) / 256
    exponential = stats.truncexpon(rate, scale=1 / rate)
    return np.log(exponential.cdf(start + 1 / 256) - exponential.cdf(start))


@pytest.mark.parametrize(("name", "space"), PAIRS)
def test_log_prob_equals_scipy(name, space):
    likelihood = _make(name, space, (7,))
    raw = _noise((40, likelihood.outputs_per_value, 7))
    x = _data(space, (40, 7))
    expected = _expected(name, space, raw, x.numpy()).sum(-1)
    found = _given(likelihood, raw).log_prob(x)
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "space"), PAIRS)
def test_float32_agrees_with_float64(name, space):
    likelihood = _make(name, space, (11,))
    raw = 3 * _noise((50, likelihood.outputs_per_value, 11))
    x = _data(space, (50, 11))
    double = _given(likelihood, raw).log_prob(x)
    single = _given(likelihood.float(), raw.float()).log_prob(x)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=2e-4)


# --- masses ---------------------------------------------------------------------------------------


def _extreme_raw(likelihood: Likelihood, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Typical, wild and special decoder outputs: (count, outputs, 1)."""
    g = torch.Generator().manual_seed(2)
    shape = (count, likelihood.outputs_per_value, 1)
    typical = torch.randn(shape, generator=g, dtype=torch.float64)
    spread = 10 ** (6 * torch.rand(shape, generator=g, dtype=torch.float64) - 3)
    special = torch.tensor([-1e3, -20.0, -1e-6, 0.0, 1e-6, 128 / 256, 77.5 / 256, 1.0, 20.0, 1e3])
    picks = special.double()[torch.randint(len(special), shape, generator=g)]
    kind = torch.randint(3, (count, 1, 1), generator=g)
    wild = (typical * spread).clamp(-1e3, 1e3)
    raw = torch.where(kind == 0, typical, torch.where(kind == 1, wild, picks))
    return raw.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GREY)
def test_masses_sum_to_one_for_any_decoder_output(name, dtype):
    likelihood = _make(name, "grey8", (1,), dtype)
    raw = _extreme_raw(likelihood, 3000, dtype)
    p_x = _given(likelihood, raw)
    log_mass = p_x.level_log_probs()
    total = log_mass.double().exp().sum(0)
    if name.startswith("gaussian"):
        total = total + sum(tail.double().exp() for tail in p_x.log_tails())
    assert not log_mass.isnan().any()
    assert (total - 1).abs().max() < 1e-5


@pytest.mark.parametrize("sigma", [1e-4, 1e-3, 1e-2, 1.0, 1e2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gaussian", "discretized_gaussian", "discretized_logistic"])
def test_masses_sum_to_one_from_tiny_to_huge_scales(name, dtype, sigma):
    likelihood = _make(name, "grey8", (1,), dtype, min_scale=sigma / 2)
    location = torch.cat(
        [torch.linspace(-0.2, 1.2, 501), torch.arange(257) / 256, torch.tensor([-10.0, 10.0])]
    ).to(dtype)
    raw_scale = torch.full_like(location, math.log(math.expm1(sigma / 2)))
    p_x = _given(likelihood, torch.stack([location, raw_scale], 1)[..., None])
    total = p_x.level_log_probs().double().exp().sum(0)
    if name == "gaussian":
        total = total + sum(tail.double().exp() for tail in p_x.log_tails())
    assert (total - 1).abs().max() < 1e-5


def test_bernoulli_masses_sum_to_one_and_keep_the_rare_one():
    likelihood = _make("bernoulli", "binary", (1,), torch.float32)
    logits = torch.linspace(-1000, 1000, 2001).reshape(-1, 1, 1)
    zero, one = (_given(likelihood, logits).log_prob(torch.full((1,), x)) for x in (0, 1))
    assert (zero.exp() + one.exp() - 1).abs().max() < 1e-6
    assert one[0].item() == -1000
    assert zero[-1].item() == -1000


@pytest.mark.parametrize("dtype", DTYPES)
def test_continuous_bernoulli_density_integrates_to_one(dtype):
    likelihood = _make("continuous_bernoulli", "grey8", (1,), dtype)
    near_zero = torch.logspace(-12, 0, 60)
    logits = torch.cat([torch.linspace(-1000, 1000, 401), near_zero, -near_zero, torch.zeros(1)])
    p_x = _given(likelihood, logits.to(dtype).reshape(-1, 1, 1))
    nodes, weights = np.polynomial.legendre.leggauss(8)
    total = torch.zeros(len(logits), dtype=torch.float64)
    for level in range(256):
        for node, weight in zip(nodes, weights, strict=True):
            x = torch.full((1,), level)
            u = torch.full((1,), (node + 1) / 2, dtype=torch.float64)
            total += weight / 2 * p_x.dequantized_log_prob(x, u).double().exp()
    assert (total - 1).abs().max() < 1e-5


def test_continuous_bernoulli_cdf_and_density_equal_scipy():
    logits = torch.tensor([-1000.0, -20.0, -1.5, -1e-3, 1e-3, 0.3, 7.0, 1000.0]).double()
    p_x = _given(_make("continuous_bernoulli", "grey8", (1,)), logits.reshape(-1, 1, 1))
    for t in (0.0, 1e-3, 0.3, 0.5, 0.99, 1.0):
        rate = logits.abs().numpy()
        exponential = scipy.stats.truncexpon(rate, scale=1 / rate)
        position = np.where(logits < 0, t, 1 - t)
        cdf = np.where(logits < 0, exponential.cdf(position), exponential.sf(position))
        at = torch.full((1,), t, dtype=torch.float64)
        np.testing.assert_allclose(p_x.cdf(at)[:, 0], cdf, rtol=1e-9, atol=1e-9)
        found = p_x.log_density(at)[:, 0]
        np.testing.assert_allclose(
            found,
            scipy.stats.truncexpon.logpdf(position, rate, scale=1 / rate),
            rtol=1e-9,
            atol=1e-7,
        )
    uniform = _given(_make("continuous_bernoulli", "grey8", (1,)), torch.zeros(1, 1, 1).double())
    assert uniform.log_prob(torch.tensor([9])).item() == pytest.approx(-math.log(256))


# --- densities on the unit interval ---------------------------------------------------------------


@pytest.mark.parametrize("name", DEQUANTIZED)
def test_dequantized_density_averages_to_the_bin_mass_and_its_log_stays_below(name):
    likelihood = _make(name, "grey8", (1,), min_scale=5e-4)
    if name == "continuous_bernoulli":
        raw = torch.tensor([-1000.0, -30.0, -0.5, 0.0, 2.0, 100.0, 1000.0]).reshape(-1, 1, 1)
    else:
        location = torch.tensor([-0.3, 0.0, 0.2, 0.2017, 0.5, 0.9, 1.0]).repeat(4)
        scale = torch.tensor([-20.0, -5.0, -1.0, 2.0]).repeat_interleave(7)
        raw = torch.stack([location, scale], 1)[:, : likelihood.outputs_per_value, None]
    p_x = _given(likelihood, raw.double())
    nodes, weights = np.polynomial.legendre.leggauss(8)
    panels = np.arange(64)[:, None]
    u = torch.from_numpy((panels + (nodes + 1) / 2) / 64).reshape(-1, 1, 1)
    weight = torch.from_numpy(np.tile(weights / 128, 64))[:, None]
    for level in (0, 50, 51, 52, 128, 254, 255):
        x = torch.full((1,), level)
        log_density = p_x.dequantized_log_prob(x, u).detach()
        log_mass = p_x.log_prob(x).detach()
        mean = torch.logsumexp(weight.log() + log_density, 0)
        resolved = log_mass > -1000  # beyond, the quadrature is too coarse
        torch.testing.assert_close(mean[resolved], log_mass[resolved], rtol=1e-9, atol=1e-9)
        assert ((weight * log_density).sum(0) <= log_mass + 1e-9).all()


def test_random_u_estimate_the_bin_mass_of_one_pixel():
    likelihood = _make("gaussian", "grey8", (1,), torch.float32)
    p_x = _given(likelihood, torch.tensor([[[0.3981], [-5.0]]]))
    x, count = torch.tensor([101]), 100_000
    u = torch.rand((count, 1, 1), generator=torch.Generator().manual_seed(9))
    density = p_x.dequantized_log_prob(x, u).double().exp().flatten()
    error = density.mean() - p_x.log_prob(x).double().exp().item()
    assert abs(error) < 4 * density.std() / count**0.5


def test_only_densities_on_the_unit_interval_dequantise():
    dequantizing = {pair for pair in PAIRS if _make(*pair, (2,)).dequantizes}
    assert dequantizing == {(name, "grey8") for name in DEQUANTIZED}


def test_gaussian_dequantised_density_equals_scipy():
    likelihood = _make("gaussian", "grey8", (5,))
    raw, x = _noise((6, 2, 5)), _data("grey8", (6, 5))
    u = torch.rand((6, 5), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = scipy.stats.norm.logpdf((x + u) / 256, raw[:, 0], 1e-4 + _softplus(raw[:, 1]))
    found = _given(likelihood, raw).dequantized_log_prob(x, u)
    np.testing.assert_allclose(found, expected.sum(-1) - 5 * math.log(256), rtol=1e-12)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "space"), PAIRS)
def test_gradients_equal_finite_differences(name, space):
    likelihood = _make(name, space, (4,))
    raw = (0.7 * _noise((3, likelihood.outputs_per_value, 4))).requires_grad_()
    x = _data(space, (3, 4))
    inputs = [raw, *likelihood.parameters()]
    assert gradcheck(lambda *_: _given(likelihood, raw).log_prob(x), inputs, eps=1e-6, atol=1e-6)
    if likelihood.dequantizes:
        u = torch.full((3, 4), 0.3, dtype=torch.float64)
        assert gradcheck(lambda *_: _given(likelihood, raw).dequantized_log_prob(x, u), inputs)


def test_continuous_bernoulli_gradient_is_right_at_logit_zero():
    likelihood = _make("continuous_bernoulli", "grey8", (1,))
    for start in (0.0, -0.0):
        raw = torch.full((1, 1, 1), start, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(_given(likelihood, raw).log_prob(torch.tensor([10])), raw)
        assert slope.item() == pytest.approx(10.5 / 256 - 0.5, abs=1e-12)


@pytest.mark.parametrize(("name", "space"), PAIRS)
def test_values_and_gradients_stay_finite_at_extreme_outputs_in_float32(name, space):
    likelihood = _make(name, space, (6,), torch.float32)
    raw = torch.tensor([-1e3, -30.0, 0.0, 30.0, 1e3]).reshape(-1, 1, 1)
    raw = raw.expand(-1, likelihood.outputs_per_value, 6).clone()
    order = torch.Generator().manual_seed(4)
    raw = torch.cat([raw, raw.flatten()[torch.randperm(raw.numel(), generator=order)].view_as(raw)])
    raw.requires_grad_()
    top = {"binary": [0, 1, 0, 1, 0, 1], "grey8": [0, 1, 100, 254, 255, 255]}
    x = torch.tensor(top.get(space, [-1e3, -1.0, 0.0, 3.0, 100.0, 1e3]))
    p_x = _given(likelihood, raw)
    bounds = [p_x.log_prob(x)]
    if likelihood.dequantizes:
        bounds.append(p_x.dequantized_log_prob(x, torch.full((6,), 0.999)))
    for bound in bounds:
        assert bound.isfinite().all()
        inputs = [raw, *likelihood.parameters()]
        for grad in torch.autograd.grad(bound.sum(), inputs, retain_graph=True):
            assert grad.isfinite().all()


# --- moments and samples --------------------------------------------------------------------------


@pytest.mark.parametrize("name", GREY)
def test_grey_mean_and_variance_equal_the_sums_over_masses(name):
    likelihood = _make(name, "grey8", (3,))
    p_x = _given(likelihood, _noise((20, likelihood.outputs_per_value, 3)))
    mass = p_x.level_log_probs().exp()
    if name.startswith("gaussian"):  # the tails count for the nearest level
        below, above = p_x.log_tails()
        mass = mass.clone()
        mass[0] += below.exp()
        mass[-1] += above.exp()
    levels = torch.arange(256, dtype=torch.float64).reshape(-1, 1, 1)
    mean = (levels * mass).sum(0)
    torch.testing.assert_close(p_x.mean, mean, rtol=1e-9, atol=1e-8)
    variance = (levels.square() * mass).sum(0) - mean.square()
    torch.testing.assert_close(p_x.variance, variance, rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("name", GREY)
def test_grey_samples_follow_the_masses(name):
    likelihood = _make(name, "grey8", (1,), torch.float32)
    raw = 0.3 * _noise((1, likelihood.outputs_per_value, 1), torch.float32)
    p_x = _given(likelihood, raw)
    mass = p_x.level_log_probs().detach().exp().double().flatten()
    if name.startswith("gaussian"):
        mass[0] += p_x.log_tails()[0].exp().item()
        mass[-1] += p_x.log_tails()[1].exp().item()
    draws = p_x.sample((40_000,), generator=torch.Generator().manual_seed(5))
    counts = torch.bincount(draws.flatten().long(), minlength=256).double()
    groups = (mass.cumsum(0) * 20).floor().clamp(max=19).long()
    observed = torch.zeros(20).double().index_add(0, groups, counts)
    expected = torch.zeros(20).double().index_add(0, groups, mass) * 40_000
    keep = expected > 0
    expected = expected[keep] * observed.sum() / expected[keep].sum()
    assert scipy.stats.chisquare(observed[keep], expected).pvalue > 1e-4


@pytest.mark.parametrize("name", [name for name, space in PAIRS if space == "continuous"])
def test_continuous_samples_follow_scipy(name):
    likelihood = _make(name, "continuous", (1,))
    raw = _noise((1, likelihood.outputs_per_value, 1))
    p_x = _given(likelihood, raw)
    draws = p_x.sample((20_000,), generator=torch.Generator().manual_seed(6)).flatten().numpy()

    sigma = {"gaussian_shared": math.log(2) + 1e-4, "gaussian_unit": 1.0}.get(name)
    if sigma is None:
        sigma = 1e-4 + _softplus(raw[0, 1]).item()
    arguments = (3 + 2 * raw[0, 0].item(), 2 * sigma)
    if name == "student_t":
        arguments = (1 + _softplus(raw[0, 2]).item(), *arguments)
    family = {"student_t": scipy.stats.t, "laplace": scipy.stats.laplace}.get(
        name, scipy.stats.norm
    )
    assert scipy.stats.kstest(draws, family(*arguments).cdf).pvalue > 1e-4


@pytest.mark.parametrize(("name", "space"), PAIRS)
def test_samples_lie_in_the_support_and_repeat_with_the_generator(name, space):
    likelihood = _make(name, space, (2, 3), torch.float32)
    raw = 5 * _noise((4, likelihood.outputs_per_value, 2, 3), torch.float32)
    p_x = _given(likelihood, raw)
    first, again = (p_x.sample((5,), torch.Generator().manual_seed(8)) for _ in range(2))
    assert first.shape == (5, 4, 2, 3)
    assert torch.equal(first, again)
    assert p_x.support.check(first).all()
    assert not p_x.support.check(torch.full((2, 3), torch.nan)).any()


# --- starting values ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "space"), PAIRS)
def test_initial_bias_starts_at_the_data_statistics(name, space):
    likelihood = _make(name, space, (2, 2), min_scale=1e-3)
    if space == "binary":
        mean = torch.tensor([[0.1, 0.5], [0.9, 0.02]]).double()
        std = (mean * (1 - mean)).sqrt()
    elif space == "grey8":
        mean = torch.tensor([[100.0, 128.0], [140.0, 110.0]]).double()
        std = torch.tensor([[20.0, 22.0], [25.0, 24.0]]).double()
    else:
        mean = torch.tensor([[-5.0, 0.0], [1e3, 2.0]]).double()
        std = torch.tensor([[0.1, 1.0], [50.0, 2.0]]).double()
    bias = likelihood.initial_bias(mean, std)
    assert bias.shape == (likelihood.outputs_per_value, 2, 2)
    p_x = likelihood(bias, mean, std)
    if name == "gaussian_unit" and space == "grey8":  # its deviation is 256 levels: clipped
        torch.testing.assert_close(p_x.loc, (mean + 0.5) / 256)
        return
    torch.testing.assert_close(p_x.mean, mean, rtol=5e-3, atol=1e-6)
    if name == "continuous_bernoulli":
        return
    tolerance = 0.15 if name == "gaussian_shared" and space == "grey8" else 0.03
    torch.testing.assert_close(p_x.variance.sqrt(), std, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("name", GREY)
def test_initial_bias_is_finite_for_constant_pixels(name):
    likelihood = _make(name, "grey8", (3,), torch.float32)
    mean, std = torch.tensor([0.0, 255.0, 30.0]), torch.tensor([0.0, 0.0, 60.0])
    p_x = _given(likelihood, likelihood.initial_bias(mean, std)[None])
    assert p_x.log_prob(torch.tensor([0, 255, 30])).item() > -25


# --- shapes, dtypes, refusals ---------------------------------------------------------------------


@pytest.mark.parametrize("data_shape", [(5,), (1, 3, 4), (3, 2, 2)])
@pytest.mark.parametrize(("name", "space"), PAIRS)
def test_batches_of_samples_give_the_same_as_one_by_one(name, space, data_shape):
    likelihood = _make(name, space, data_shape)
    raw = _noise((2, 3, likelihood.outputs_per_value, *data_shape))
    x = _data(space, (3, *data_shape))
    p_x = _given(likelihood, raw)
    assert (p_x.batch_shape, p_x.event_shape) == ((2, 3), data_shape)
    apart = [[_given(likelihood, raw[k, b]).log_prob(x[b]) for b in range(3)] for k in range(2)]
    torch.testing.assert_close(p_x.log_prob(x), torch.stack([torch.stack(row) for row in apart]))
    assert p_x.mean.shape == (2, 3, *data_shape)


@pytest.mark.parametrize(("name", "space"), PAIRS)
def test_examples_broadcast_against_the_batch(name, space):
    likelihood = _make(name, space, (5,))
    raw, x = _noise((3, likelihood.outputs_per_value, 5)), _data(space, (2, 5))
    p_x = _given(likelihood, raw)
    apart = torch.stack([_given(likelihood, raw).log_prob(row.expand(3, 5)) for row in x])
    torch.testing.assert_close(p_x.log_prob(x[:, None]), apart)


@pytest.mark.parametrize(("name", "space"), [p for p in PAIRS if p[1] != "continuous"])
def test_every_numeric_dtype_of_x_gives_the_same(name, space):
    likelihood = _make(name, space, (4,))
    p_x = _given(likelihood, _noise((3, likelihood.outputs_per_value, 4)))
    x = _data(space, (3, 4))
    dtypes = [torch.uint8, torch.int32, torch.float16, torch.float32, torch.float64]
    for dtype in [*dtypes, torch.bool] if space == "binary" else dtypes:
        assert torch.equal(p_x.log_prob(x.to(dtype)), p_x.log_prob(x)), dtype


def test_continuous_density_is_in_raw_units():
    """A change of units by 10 lowers the density of two columns by 2 log 10."""
    likelihood = _make("student_t", "continuous", (2,))
    raw, x = _noise((3, 3, 2)), torch.tensor([1.0, -2.0]).double()
    one, ten = torch.ones(2).double(), torch.full((2,), 10.0).double()
    narrow = likelihood(raw, 0 * one, one).log_prob(x)
    wide = likelihood(raw, 0 * ten, ten).log_prob(10 * x)
    torch.testing.assert_close(wide, narrow - 2 * math.log(10))


def test_half_precision_output_is_computed_in_float32():
    likelihood = _make("gaussian", "grey8", (2,), torch.float32)
    raw = _noise((3, 2, 2), torch.float32).bfloat16()
    found = _given(likelihood, raw).log_prob(torch.tensor([0, 200]))
    assert torch.equal(found, _given(likelihood, raw.float()).log_prob(torch.tensor([0, 200])))


def test_only_gaussian_shared_has_parameters_of_its_own():
    own = {name for name, space in PAIRS if list(_make(name, space, (2,)).parameters())}
    assert own == {"gaussian_shared"}


def test_table_and_spaces_are_those_of_the_design():
    assert {space: {n for n, s in PAIRS if s == space} for space in SPACES} == {
        "binary": {"bernoulli"},
        "grey8": {
            "discretized_logistic",
            "logistic_mixture",
            "discretized_gaussian",
            "beta_binomial",
            "categorical",
            *DEQUANTIZED,
        },
        "continuous": {"gaussian", "gaussian_shared", "gaussian_unit", "student_t", "laplace"},
    }


@pytest.mark.parametrize(
    ("name", "space"),
    [(name, space) for name in LIKELIHOODS for space in SPACES if (name, space) not in PAIRS],
)
def test_a_likelihood_outside_its_space_is_refused_with_what_would_work(name, space):
    with pytest.raises(ValueError, match=f"likelihood {name} does not fit space {space}") as error:
        _make(name, space, (2,))
    message = str(error.value)
    assert "model.likelihood" in message
    assert "data.space" in message
    for suggestion in [n for n, s in PAIRS if s == space]:
        assert suggestion in message
    assert any(f"data.space to {s}" in message for s in LIKELIHOODS[name].spaces)


def test_refusal_of_cross_entropy_on_grey_pixels_says_why():
    with pytest.raises(ValueError, match="cross-entropy on grey pixels is not a likelihood"):
        check_likelihood("bernoulli", "grey8")


def test_refusal_of_a_density_of_binary_pixels_says_why():
    with pytest.raises(ValueError, match="on separate values a density has no highest value"):
        check_likelihood("gaussian", "binary")


def test_misspelt_names_are_told_the_nearest():
    with pytest.raises(ValueError, match=r"model\.likelihood.*did you mean discretized_logistic\?"):
        check_likelihood("discretised_logistic", "grey8")
    with pytest.raises(ValueError, match=r"data\.space.*did you mean grey8\?"):
        check_likelihood("gaussian", "gray8")


def test_bad_numbers_and_shapes_are_refused():
    with pytest.raises(ValueError, match=r"model\.min_scale must be a positive number; found 0"):
        _make("gaussian", "grey8", (2,), min_scale=0)
    with pytest.raises(ValueError, match=r"model\.num_components must be at least 1; found 0"):
        _make("logistic_mixture", "grey8", (2,), num_components=0)
    with pytest.raises(ValueError, match=r"needs decoder output of shape \(\*batch, 2, 4\)"):
        _given(_make("gaussian", "grey8", (4,)), torch.zeros(3, 3, 4))
