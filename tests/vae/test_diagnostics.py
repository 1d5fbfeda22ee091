"""Diagnostics against linear-Gaussian models, whose use of each latent is known."""

import math

import pytest
import torch

from vae.diagnostics import (
    active_units,
    aggregate_terms,
    collapse_verdict,
    kl_per_dimension,
    posterior_gap,
    posterior_means,
    pruned_evidence,
)
from vae.evidence import FactorAnalysis, importance_sampling
from vae.models import VAE, VAEConfig


def normal(*shape, generator):
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def model_with_scales(scales, D=12, seed=0):
    """Orthogonal loadings of the given lengths, unit noise: latent j has signal scales[j]²."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(normal(D, len(scales), generator=g)).Q
    one = torch.ones(D, dtype=torch.float64)
    return FactorAnalysis(0 * one, directions * torch.tensor(scales).double(), one), g


def test_active_units_are_those_that_the_data_move():
    # E_q[u] = s/(1+s²) · signal, so Var_x E_q[u] = s²/(1+s²): 0.8, 0.0099, 0.02, 0
    fa, g = model_with_scales([2.0, 0.08, 0.2, 0.0])
    x, _ = fa.sample(50_000, generator=g)
    vae = fa.as_vae()
    assert active_units(vae, x).tolist() == [True, False, True, False]
    assert active_units(vae, x, threshold=0.5).tolist() == [True, False, False, False]
    variance = posterior_means(vae, x).var(0, correction=0)
    expected = torch.tensor([4 / 5, 0.0064 / 1.0064, 0.04 / 1.04, 0.0]).double()
    torch.testing.assert_close(variance, expected, rtol=0.05, atol=1e-9)


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        ([2.0, 1.0, 3.0], "no collapse: 3 of 3 latent units are active"),
        ([2.0, 1.0, 0.0], "no collapse: 2 of 3 latent units are active"),
        ([2.0, 0.0, 0.0], "partial collapse: 1 of 3 latent units is active; a smaller"),
        ([0.0, 0.0, 0.0], "posterior collapse: 0 of 3 latent units are active"),
    ],
)
def test_the_verdict_on_collapse(scales, words):
    fa, g = model_with_scales(scales)
    x, _ = fa.sample(500, generator=g)
    assert collapse_verdict(fa.as_vae(), x).startswith(words)


@pytest.mark.parametrize("posterior", ["diagonal", "full"])
def test_kl_per_dimension_sums_to_the_mean_kl_over_all_batches(posterior):
    torch.manual_seed(0)
    model = VAE(
        VAEConfig(
            data_shape=(5,),
            space="binary",
            latent_dim=3,
            likelihood="bernoulli",
            posterior=posterior,
        )
    )
    x = torch.randint(0, 2, (2500, 5))  # more than one batch, the last one uneven
    with torch.no_grad():
        expected = model(x).kl.double().mean()
    terms = kl_per_dimension(model, x)
    assert terms is not None
    assert terms.shape == (3,)
    assert (terms > 0).all()
    assert terms.sum().item() == pytest.approx(expected.item(), rel=1e-5)


def test_kl_per_dimension_of_a_known_model():
    fa, g = model_with_scales([2.0, 0.0])
    x, _ = fa.sample(100_000, generator=g)
    # E KL = ½ log(1 + s²), the mutual information of x and z
    expected = torch.tensor([0.5 * math.log(5), 0.0]).double()
    torch.testing.assert_close(kl_per_dimension(fa.as_vae(), x), expected, rtol=0.01, atol=1e-9)


def test_kl_per_dimension_says_when_there_is_none():
    torch.manual_seed(0)
    config = {"data_shape": (5,), "space": "binary", "latent_dim": 3, "likelihood": "bernoulli"}
    x = torch.randint(0, 2, (10, 5))
    assert kl_per_dimension(VAE(VAEConfig(**config, posterior="flow")), x) is None
    assert kl_per_dimension(VAE(VAEConfig(**config, prior="vamp")), x) is None


def test_pruning_inactive_units_gives_the_smaller_model():
    fa, g = model_with_scales([2.0, 0.09, 1.0])
    x, _ = fa.sample(300, generator=g)
    pruned = pruned_evidence(fa.as_vae(), x, 2000, generator=g)
    smaller = FactorAnalysis(fa.loc, fa.weight[:, [0, 2]], fa.noise_variance)
    means = posterior_means(fa.as_vae(), x)[:, 1].mean()
    smaller.loc = fa.loc + fa.weight[:, 1] * means
    error = (pruned.log_px - smaller.log_prob(x)) / pruned.se
    assert error.abs().max() < 4.5
    assert (pruned.log_px - fa.log_prob(x)).abs().mean() > 1e-4
    # asked to prune a unit that matters, it shows what is lost
    lost = pruned_evidence(
        fa.as_vae(), x, 2000, active=torch.tensor([False, True, True]), generator=g
    )
    assert (lost.log_px - fa.log_prob(x)).mean() < -0.5


def test_mutual_information_and_aggregate_kl_of_data_from_the_model():
    fa, g = model_with_scales([2.0, 1.0])
    x, _ = fa.sample(2000, generator=g)
    vae = fa.as_vae()
    terms = aggregate_terms(vae, x, num_samples=2, generator=g)
    information = 0.5 * (math.log(5) + math.log(2))
    assert terms.mutual_information == pytest.approx(information, abs=0.06)
    assert terms.aggregate_kl == pytest.approx(0, abs=0.03)  # x is the model's own
    assert terms.num_examples == 2000
    with torch.no_grad():
        kl = vae(x).kl.mean().item()
    assert terms.mutual_information + terms.aggregate_kl == pytest.approx(kl, abs=0.06)


def test_mutual_information_is_at_most_log_n_and_codes_off_the_prior_show():
    fa, g = model_with_scales([30.0, 30.0])
    x = 3 * fa.sample(20, generator=g)[0]  # codes three times as wide as the prior
    terms = aggregate_terms(fa.as_vae(), x, generator=g)
    assert terms.mutual_information == pytest.approx(math.log(20), abs=1e-3)
    assert terms.aggregate_kl > 3


def test_the_posterior_gap_is_the_kl_of_the_encoder():
    fa, g = model_with_scales([2.0, 1.0, 0.5])
    x, _ = fa.sample(200, generator=g)
    evidence = importance_sampling(fa.as_vae(shift=0.3, widen=1.3), x, 2000, generator=g)
    gap = posterior_gap(evidence)
    assert gap.mean().item() == pytest.approx(fa.proposal_kl(0.3, 1.3), rel=0.02)
    assert (gap > 0).all()


@pytest.mark.parametrize("latent_dim", [2, 8, 16])
def test_mutual_information_lies_between_its_bounds(latent_dim):
    """Of a linear model with its exact posterior: I(x; z) = ½ log |W Wᵀ / σ² + I|."""
    g = torch.Generator().manual_seed(latent_dim)
    count, noise = 500, 0.02
    weight = torch.randn(2 * latent_dim, latent_dim, generator=g, dtype=torch.float64)
    fa = FactorAnalysis(
        torch.zeros(2 * latent_dim).double(), weight, torch.full((2 * latent_dim,), noise).double()
    )
    x, _ = fa.sample(count, generator=g)
    eye = torch.eye(latent_dim, dtype=torch.float64)
    exact = 0.5 * torch.logdet(weight.T @ weight / noise + eye).item()
    terms = aggregate_terms(fa.as_vae(), x, num_samples=4, generator=g)
    assert terms.mutual_information <= min(exact, math.log(count)) + 0.1
    assert exact <= terms.most_information + 0.3
    assert terms.is_saturated == (latent_dim > 2)
    if latent_dim == 2:
        assert terms.mutual_information == pytest.approx(exact, abs=0.3)
