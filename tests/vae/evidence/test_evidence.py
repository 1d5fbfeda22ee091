"""Importance sampling and prior Monte Carlo against exact values, quadrature, plain arithmetic."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from arviz_stats.base.array import BaseArray
from scipy import stats
from torch.distributions import Independent, MultivariateNormal, Normal

from vae.evidence import (
    NOISE_BLOCK,
    FactorAnalysis,
    WeightStream,
    example_generators,
    importance_sampling,
    ladder_rungs,
    noise,
    pareto_khat,
    prior_monte_carlo,
    standard_normal,
    tail_length,
)
from vae.models import LIKELIHOODS, VAE, VAEConfig
from vae.trust import KHAT_LIMIT


def normal(*shape, generator):
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def random_model(D, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = normal(D, d, generator=g) / math.sqrt(d)
    return FactorAnalysis(normal(D, generator=g), weight, 0.2 + normal(D, generator=g).square()), g


def small_vae(seed=0, **changes):
    torch.manual_seed(seed)
    config = {
        "data_shape": (1, 3, 4),
        "space": "binary",
        "latent_dim": 3,
        "likelihood": "bernoulli",
        "hidden": (7,),
    }
    return VAE(VAEConfig(**config | changes)).double()


def bits(count, shape=(1, 3, 4), seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (count, *shape), generator=g)


# --- against exact values ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("D", "d", "K"), [(3, 1, 2000), (20, 4, 2000), (50, 16, 3000), (30, 32, 4000)]
)
def test_importance_sampling_lies_within_its_error_of_the_exact_value(D, d, K):
    fa, g = random_model(D, d)
    x, _ = fa.sample(20, generator=g)
    evidence = importance_sampling(fa.as_vae(shift=0.1, widen=1.2), x, K, generator=g)
    exact = fa.log_prob(x)
    assert evidence.ess.min() >= 200
    assert evidence.khat.max() < 0.5
    assert evidence.trustworthy.all()
    assert ((evidence.log_px - exact).abs() < 4 * evidence.se).all()
    gap = fa.proposal_kl(0.1, 1.2)
    assert (exact - evidence.elbo).mean().item() == pytest.approx(gap, rel=0.1)


def test_its_95_percent_interval_covers_95_percent_of_1000_repetitions():
    fa, g = random_model(6, 4)
    x, _ = fa.sample(1, generator=g)
    repeated = x.expand(1000, 6)
    evidence = importance_sampling(fa.as_vae(shift=0.2, widen=1.2), repeated, 1000, generator=g)
    inside = (evidence.log_px - fa.log_prob(x)).abs() < 1.959964 * evidence.se
    assert 0.93 <= inside.double().mean() <= 0.97


@pytest.mark.parametrize("d", [8, 32])
def test_a_narrow_proposal_is_reported_as_untrustworthy(d):
    fa, g = random_model(40, d)
    x, _ = fa.sample(20, generator=g)
    evidence = importance_sampling(fa.as_vae(widen=0.6), x, 4000, generator=g)
    assert evidence.khat.median() > KHAT_LIMIT
    assert evidence.trustworthy.double().mean() < 0.5
    if d == 32:
        assert not evidence.trustworthy.any()


def test_the_bound_rises_with_the_number_of_samples():
    fa, g = random_model(20, 8)
    x, _ = fa.sample(500, generator=g)
    evidence = importance_sampling(fa.as_vae(shift=0.5, widen=0.8), x, 1000, generator=g)
    means = [evidence.ladder[k].mean() for k in (1, 10, 100, 1000)]
    assert means[0] < means[1] < means[2] < means[3]
    difference = evidence.ladder[1] - fa.log_prob(x)
    expected = -fa.proposal_kl(0.5, 0.8)
    assert difference.mean().item() == pytest.approx(
        expected, abs=4 * difference.std().item() / math.sqrt(500)
    )


SPACES = [(name, space) for name, kind in LIKELIHOODS.items() for space in sorted(kind.spaces)]


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize(("likelihood", "space"), SPACES)
def test_nonlinear_decoders_agree_with_quadrature(likelihood, space, latent_dim):
    torch.manual_seed(3)
    model = small_vae(
        space=space,
        likelihood=likelihood,
        data_shape=(3,),
        latent_dim=latent_dim,
        hidden=(6,),
        min_scale=0.01,
        num_components=2,
    )
    if space == "continuous":
        model.set_data_statistics(torch.tensor([5.0, -2.0, 0.5]), torch.tensor([3.0, 0.2, 1.0]))
    with torch.no_grad():  # a decoder bent enough, an encoder wide enough
        next(model.decoder.body.parameters()).mul_(3)
        model.encoder.output.weight.mul_(0.2)
        x = model.likelihood(torch.randn(4, latent_dim).double()).sample()

    per_side = 801 if latent_dim == 1 else 161
    points = torch.linspace(-7, 7, per_side, dtype=torch.float64)
    axes = torch.meshgrid(*[points] * latent_dim, indexing="ij")
    z = torch.stack(axes, -1).reshape(-1, 1, latent_dim).expand(-1, 4, -1)
    with torch.no_grad():
        log_joint = model.likelihood(z).log_prob(x) + model.prior().log_prob(z)
    step = (points[1] - points[0]).log() * latent_dim
    exact = log_joint.logsumexp(0) + step

    g = torch.Generator().manual_seed(4)
    evidence = importance_sampling(model, x, 20_000, generator=g)
    assert (evidence.se < 0.1).all()
    assert ((evidence.log_px - exact).abs() < 4 * evidence.se).all()
    assert (evidence.elbo < exact).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"posterior": "flow"},
        {"posterior": "full", "prior": "vamp", "prior_components": 3},
        {"prior": "mixture", "prior_components": 3},
        {"latent_dim": (3, 2)},
    ],
    ids=["flow", "full, vamp", "mixture", "hierarchical"],
)
def test_both_estimators_agree_for_every_posterior_and_prior(changes):
    model = small_vae(**changes)
    with torch.no_grad():  # q, p(z) and the posterior near enough to each other for both to work
        for name, parameter in model.named_parameters():
            if not name.startswith("decoder"):
                parameter.mul_(0.3)
    g = torch.Generator().manual_seed(5)
    x = bits(10)
    blind = prior_monte_carlo(model, x, 20_000, generator=g)
    guided = importance_sampling(model, x, 20_000, generator=g)
    error = (blind.se.square() + guided.se.square()).sqrt()
    assert blind.trustworthy.all()
    assert guided.trustworthy.all()
    assert (error < 0.1).all()
    assert ((blind.log_px - guided.log_px).abs() < 4 * error).all()


@pytest.mark.parametrize(
    "distribution",
    [
        lambda q: MultivariateNormal(q.loc, scale_tril=torch.diag_embed(q.scale)),
        lambda q: Independent(Normal(q.loc, q.scale), 1),
    ],
)
def test_a_posterior_of_torch_s_own_gives_the_same_weights(distribution):
    model, x = small_vae(), bits(5)
    expected = importance_sampling(model, x, 50, generator=torch.Generator().manual_seed(6))
    posterior: Any = model.posterior
    model.posterior = lambda x: distribution(posterior(x))  # pyright: ignore
    found = importance_sampling(model, x, 50, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(found.log_px, expected.log_px, rtol=1e-12, atol=0)
    model.posterior = lambda x: Independent(torch.distributions.Laplace(posterior(x).loc, 1.0), 1)  # pyright: ignore
    with pytest.raises(TypeError, match="from_noise"):
        importance_sampling(model, x, 50)


# --- the arithmetic: every weight once, whatever the chunks --------------------------------------


@pytest.mark.parametrize("K", [1, 7, 250, 5000])
def test_exactly_k_samples_are_used_and_the_encoder_runs_once(K):
    model, x = small_vae(), bits(3)
    decoded, encoded = [], []
    model.decoder.register_forward_hook(
        lambda _module, inputs, _output: decoded.append(inputs[0].shape[:-1].numel())
    )
    model.encoder.register_forward_hook(
        lambda _module, inputs, _output: encoded.append(len(inputs[0]))
    )
    g = torch.Generator().manual_seed(7)
    evidence = importance_sampling(model, x, K, generator=g, chunk_size=100)
    assert sum(decoded) == 3 * K
    assert max(decoded) <= 3 * 100  # memory doesn't grow with K
    assert encoded == [3]
    assert evidence.num_samples == K
    assert evidence.ladder.keys() == set(ladder_rungs(K))

    # the same weights, all at once
    with torch.no_grad():
        g.manual_seed(7)
        blocks = math.ceil(K / NOISE_BLOCK)
        eps = torch.cat([normal(NOISE_BLOCK, 3, 3, generator=g) for _ in range(blocks)])[:K]
        q = model.posterior(x)
        z = q.from_noise(eps)
        log_px_z = model.likelihood(z).log_prob(x)
        log_w = log_px_z + model.prior().log_prob(z) - q.log_prob(z)
    close: Any = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(evidence.log_px, log_w.logsumexp(0) - math.log(K), **close)
    torch.testing.assert_close(evidence.elbo, log_w.mean(0), **close)
    torch.testing.assert_close(evidence.log_px_z, log_px_z.mean(0), **close)
    torch.testing.assert_close(evidence.kl, (log_px_z - log_w).mean(0), **close)
    for k, rung in evidence.ladder.items():
        torch.testing.assert_close(rung, log_w[:k].logsumexp(0) - math.log(k), **close)
    w = log_w.softmax(0)
    torch.testing.assert_close(evidence.ess, 1 / w.square().sum(0), **close)
    if K == 1:
        assert evidence.se.isnan().all()
    else:  # the delta method: the standard error of the mean weight over the mean weight
        w = (log_w - log_w.mean(0)).exp()
        delta = w.std(0, correction=0) / math.sqrt(K) / w.mean(0)
        torch.testing.assert_close(evidence.se, delta, rtol=1e-8, atol=1e-10)
    if K < 25:
        assert evidence.khat.isnan().all()
        assert not evidence.trustworthy.any()
    else:
        expected = BaseArray().psislw(-log_w.T.numpy(), axis=-1)[1]
        np.testing.assert_allclose(evidence.khat, expected, rtol=1e-8)


@pytest.mark.parametrize("estimator", [importance_sampling, prior_monte_carlo])
@pytest.mark.parametrize("K", [1, 7, 250, 5000])
def test_chunking_changes_nothing(estimator, K):
    model, x = small_vae(posterior="full"), bits(4)
    results = []
    for chunk_size in (None, 1, 3, 16, 17, 1000):
        g = torch.Generator().manual_seed(8)
        results.append(estimator(model, x, K, generator=g, chunk_size=chunk_size))
    for other in results[1:]:
        for name in ("log_px", "se", "ess", "khat", "elbo", "log_px_z"):
            torch.testing.assert_close(
                getattr(other, name),
                getattr(results[0], name),
                equal_nan=True,
                rtol=1e-9,
                atol=1e-9,
            )
        assert other.ladder.keys() == results[0].ladder.keys()
        for k, rung in other.ladder.items():
            torch.testing.assert_close(rung, results[0].ladder[k])


def test_more_samples_begin_with_the_same_ones():
    model, x = small_vae(), bits(4)
    few = importance_sampling(model, x, 100, generator=torch.Generator().manual_seed(9))
    many = importance_sampling(model, x, 1000, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(few.log_px, many.ladder[100])


@pytest.mark.parametrize("estimator", [importance_sampling, prior_monte_carlo])
def test_the_generator_alone_decides_the_noise(estimator):
    model, x = small_vae(), bits(4)
    before = torch.random.get_rng_state()
    first = estimator(model, x, 40, generator=torch.Generator().manual_seed(1)).log_px
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)
    again = estimator(model, x, 40, generator=torch.Generator().manual_seed(1)).log_px
    other = estimator(model, x, 40, generator=torch.Generator().manual_seed(2)).log_px
    assert torch.equal(first, again)
    assert (first != other).all()
    torch.manual_seed(3)
    default = estimator(model, x, 40).log_px
    torch.manual_seed(3)
    assert torch.equal(default, estimator(model, x, 40).log_px)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float32])
def test_x_comes_in_any_dtype(dtype):
    model, x = small_vae(), bits(4)
    expected = importance_sampling(model, x.double(), 9, generator=torch.Generator().manual_seed(1))
    found = importance_sampling(model, x.to(dtype), 9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found.log_px, expected.log_px)


def test_single_precision_agrees_with_double():
    model, x = small_vae(), bits(6)
    double = importance_sampling(model, x, 500, generator=torch.Generator().manual_seed(1))
    single = importance_sampling(model.float(), x, 500, generator=torch.Generator().manual_seed(1))
    assert ((single.log_px - double.log_px).abs() < 5 * single.se).all()
    assert single.log_px.dtype == torch.float64


def test_the_result_is_an_ordinary_tensor_without_graph():
    evidence = importance_sampling(small_vae(), bits(2), 30)
    evidence.log_px.add_(1)
    assert not evidence.log_px.requires_grad
    assert not evidence.log_px.is_inference()
    assert not evidence.ladder[10].is_inference()


def test_no_examples_give_no_evidence():
    assert importance_sampling(small_vae(), bits(0), 30).khat.shape == (0,)


@pytest.mark.parametrize(("num_samples", "chunk_size"), [(0, None), (-3, None), (5, 0)])
def test_counts_are_checked(num_samples, chunk_size):
    with pytest.raises(ValueError, match="must be at least 1; found"):
        importance_sampling(small_vae(), bits(2), num_samples, chunk_size=chunk_size)


# --- the diagnostics of weights ------------------------------------------------------------------


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9, 1.4])
def test_khat_finds_the_shape_of_pareto_weights(k):
    w = stats.genpareto.rvs(k, size=(20, 20_000), random_state=0)
    log_w = torch.as_tensor(np.log(w)).T
    tail = log_w.topk(tail_length(20_000) + 1, dim=0).values
    # the prior of the fit, worth 10 observations at 0.5, pulls 424 of them by little
    assert pareto_khat(tail, 1e-16).mean().item() == pytest.approx(k, abs=0.06)


def test_khat_of_constant_extreme_and_broken_weights():
    columns = {
        "constant": torch.zeros(11),
        "rounding": torch.tensor([-100.0 + 1e-13 * (i % 3) for i in range(11)]).double(),
        "extreme": -1000.0 * torch.arange(11.0),
        "one found": torch.tensor([0.0] + [-math.inf] * 10),
        "none found": torch.full((11,), -math.inf),
        "broken": torch.full((11,), math.nan),
    }
    tail = torch.stack([c.double() for c in columns.values()], 1).sort(0, descending=True).values
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        khat = pareto_khat(tail, torch.finfo(torch.float64).eps)
    assert khat[:4].tolist() == [0, 0, math.inf, math.inf]
    assert khat[4] == math.inf
    assert khat[5].isnan()


def test_khat_counts_weights_of_zero():
    """Weights of 0 below the tail are draws like any other; a tail of little else is hopeless."""
    w = np.asarray(stats.genpareto.rvs(0.4, size=(2, 100), random_state=1))
    w[0, 30:] = 0  # a tail of 20 has its threshold at a weight above 0
    w[1, 3:] = 0
    log_w = torch.as_tensor(w).log().T
    khat = pareto_khat(log_w.topk(21, dim=0).values, 1e-16)
    expected = BaseArray().psislw(-log_w[:, :1].T.numpy(), axis=-1)[1]
    np.testing.assert_allclose(khat[:1], expected, rtol=1e-8)
    assert khat[1] == math.inf


def test_weights_that_are_all_zero_count_for_nothing():
    stream = WeightStream(4, 2, resolution=1e-16, device=torch.device("cpu"))
    log_w = torch.tensor([[-math.inf] * 4, [0.0, -math.inf, -math.inf, -math.inf]]).T
    stream.add(log_w, log_w)
    evidence = stream.evidence()
    assert evidence.log_px.tolist() == [-math.inf, -math.log(4)]
    assert evidence.ess.tolist() == [0, 1]
    assert evidence.se.tolist() == [math.inf, math.sqrt(1 - 1 / 4)]


@pytest.mark.parametrize(
    ("K", "length"), [(1, 0), (24, 0), (25, 5), (100, 20), (225, 45), (1000, 94), (5000, 212)]
)
def test_the_tail_holds_a_fifth_or_three_roots(K, length):
    assert tail_length(K) == length


# --- prior Monte Carlo ---------------------------------------------------------------------------


def coordinatewise_model(d, noise=0.25):
    """x_j = z_j + noise: everything about its weights has a closed form."""
    one = torch.ones(d, dtype=torch.float64)
    return FactorAnalysis(0 * one, torch.diag(one), noise * one)


def exact_inverse_share(x, noise=0.25):
    """E[w²] / E[w]² of weights p(x|z), z ~ N(0, 1), a product over coordinates: K / ESS."""
    second = Normal(0, math.sqrt(1 + noise / 2)).log_prob(x) - 0.5 * math.log(4 * math.pi * noise)
    first = Normal(0, math.sqrt(1 + noise)).log_prob(x)
    return (second - 2 * first).sum(-1).exp()


@pytest.mark.parametrize("d", [1, 2, 4])
def test_prior_monte_carlo_is_right_and_its_ess_falls_as_theory_says(d):
    fa = coordinatewise_model(d)
    g = torch.Generator().manual_seed(10)
    x, _ = fa.sample(50, generator=g)
    evidence = prior_monte_carlo(fa.as_vae(), x, 100_000, generator=g)
    assert ((evidence.log_px - fa.log_prob(x)).abs() < 4 * evidence.se).all()
    assert evidence.kl.eq(0).all()
    share = evidence.ess / 100_000
    torch.testing.assert_close(share, 1 / exact_inverse_share(x), rtol=0.25, atol=0)
    assert share.log().mean().item() == pytest.approx(
        -exact_inverse_share(x).log().mean().item(), abs=0.05
    )


def test_prior_monte_carlo_s_ess_falls_exponentially_with_the_latent_dimension():
    g = torch.Generator().manual_seed(11)
    logs = []
    for d in range(1, 7):
        fa = coordinatewise_model(d, noise=0.5)
        x, _ = fa.sample(200, generator=g)
        evidence = prior_monte_carlo(fa.as_vae(), x, 4000, generator=g)
        logs.append((evidence.ess / 4000).log().mean().item())
    steps = np.diff([0, *logs])
    assert (steps < -0.3).all()  # each latent dimension costs a constant factor
    assert steps.std() < 0.15 * -steps.mean()


def test_noise_of_each_examples_own_makes_its_estimate_independent_of_the_batch():
    torch.manual_seed(0)
    config = {"data_shape": (3,), "space": "continuous", "likelihood": "gaussian"}
    model = VAE(VAEConfig(**config, latent_dim=2, hidden=(8,))).double().eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    together = importance_sampling(model, x, 40, generator=example_generators(x, 7))
    for row in (1, 4):
        one = x[row : row + 1]
        alone = importance_sampling(model, one, 40, generator=example_generators(one, 7))
        for name in ("log_px", "se", "ess", "elbo"):
            found, expected = getattr(alone, name)[0], getattr(together, name)[row]
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    twice = torch.cat([x[:1], x[:1]])
    same = importance_sampling(model, twice, 40, generator=example_generators(twice, 7))
    assert same.log_px[0] == same.log_px[1]
    eps = standard_normal((4000, 2, 3), like=x, generator=example_generators(x[:2], 7)).numpy()
    assert abs(np.corrcoef(eps[:, 0].ravel(), eps[:, 1].ravel())[0, 1]) < 0.04
    assert stats.kstest(eps.ravel(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 3])
def test_noise_of_several_blocks_is_that_of_as_many_draws_on_any_number_of_threads(dtype, d):
    # What `noise_blocks` relies on, so that the chunk size and the machine don't change a score.
    like = torch.empty(0, dtype=dtype)

    def draws(blocks, threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        generators = [torch.Generator().manual_seed(seed) for seed in range(5)]
        shape = (blocks * NOISE_BLOCK, 5, d)
        times = 6 // blocks
        parts = [standard_normal(shape, like=like, generator=generators) for _ in range(times)]
        torch.set_num_threads(before)
        return torch.cat(parts)

    expected = draws(blocks=1, threads=1)
    for blocks, threads in ((2, 1), (6, 1), (1, 2), (3, 2), (6, 7)):
        assert torch.equal(draws(blocks, threads), expected)
    for row, one in enumerate(expected.unbind(1)):
        alone = torch.Generator().manual_seed(row)
        assert torch.equal(torch.randn(6 * NOISE_BLOCK, d, dtype=dtype, generator=alone), one)


@pytest.mark.parametrize("own", [True, False])
def test_neither_the_chunk_size_nor_what_is_drawn_at_once_changes_an_estimate(own, monkeypatch):
    model = small_vae()
    x = torch.rand(5, *model.config.data_shape, generator=torch.Generator().manual_seed(1)).round()

    def estimate(chunk_size):
        source = example_generators(x, 7) if own else torch.Generator().manual_seed(7)
        return importance_sampling(model, x, 500, generator=source, chunk_size=chunk_size)

    expected = estimate(NOISE_BLOCK)
    for chunk_size in (1, 7, 100, 500, 5000):
        found = estimate(chunk_size)
        torch.testing.assert_close(found.log_px, expected.log_px, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.ladder[10], expected.ladder[10], rtol=1e-6, atol=0)
    for drawn in (1, 2 * NOISE_BLOCK * 5 * 3):
        monkeypatch.setattr(noise, "DRAWN_VALUES", drawn)
        torch.testing.assert_close(estimate(500).log_px, expected.log_px, rtol=1e-6, atol=0)
