"""Refined proposals: exact where the posterior is Gaussian, right wherever it can be integrated."""

import math

import pytest
import torch

from vae.evidence import WIDEN, FactorAnalysis, importance_sampling, make_proposal
from vae.evidence.proposals import _cholesky  # pyright: ignore[reportPrivateUsage]
from vae.models import VAE, CholeskyNormal, VAEConfig

FITTED = ["laplace", "refined"]


def factor_analysis(latent_dim, num_values=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    return FactorAnalysis(
        torch.randn(num_values, **draw),
        torch.randn(num_values, latent_dim, **draw),
        0.2 + torch.rand(num_values, **draw),
    )


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("latent_dim", [1, 5])
def test_gaussian_posterior_is_found_from_a_poor_encoder(name, latent_dim):
    fa = factor_analysis(latent_dim)
    x, _ = fa.sample(20, generator=torch.Generator().manual_seed(1))
    model = fa.as_vae(shift=1.5, widen=0.5)
    proposal, exact = make_proposal(name, model, x), fa.posterior(x)
    assert isinstance(proposal, CholeskyNormal)
    torch.testing.assert_close(proposal.mean, exact.mean, rtol=0, atol=0.02)
    torch.testing.assert_close(
        proposal.covariance_matrix,
        WIDEN**2 * exact.covariance_matrix.expand(20, -1, -1),
        rtol=0.1,
        atol=2e-3,
    )


@pytest.mark.parametrize("name", FITTED)
def test_evidence_becomes_trustworthy(name):
    """The encoder is off by 1.5 standard deviations and half as wide in each of 8 dimensions."""
    fa = factor_analysis(8, num_values=30)
    x, _ = fa.sample(60, generator=torch.Generator().manual_seed(1))
    model = fa.as_vae(shift=1.5, widen=0.5)
    exact = fa.log_prob(x)
    poor = importance_sampling(model, x, 1000, generator=torch.Generator().manual_seed(2))
    good = importance_sampling(
        model, x, 1000, generator=torch.Generator().manual_seed(2), proposal=name
    )
    assert (poor.khat > 0.7).double().mean() > 0.9
    assert (good.khat < 0.5).all()
    assert (good.ess > 500).all()
    error = (good.log_px - exact).mean()
    assert abs(error) < 4 * good.se.square().sum().sqrt() / len(x)
    assert good.elbo.mean() > poor.elbo.mean() + 5


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize(
    ("space", "likelihood"),
    [
        ("binary", "bernoulli"),
        ("grey8", "discretized_logistic"),
        ("grey8", "gaussian"),
        ("grey8", "continuous_bernoulli"),
        ("continuous", "student_t"),
    ],
)
def test_evidence_agrees_with_quadrature(name, space, likelihood):
    torch.manual_seed(4)
    config = VAEConfig(
        data_shape=(1, 3, 3), space=space, latent_dim=1, likelihood=likelihood, hidden=(8,)
    )
    model = VAE(config).double()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(1.5)
    x = model.likelihood(2 * torch.randn(12, 1, dtype=torch.float64)).sample()
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64).reshape(-1, 1, 1).expand(-1, 12, 1)
    with torch.no_grad():
        log_joint = model.likelihood(grid).log_prob(x) + model.prior().log_prob(grid)
    exact = log_joint.logsumexp(0) + math.log(16 / 4000)
    found = importance_sampling(
        model, x, 2000, generator=torch.Generator().manual_seed(0), proposal=name
    )
    # Per image: five standard errors, and a floor for posteriors with a second, smaller mode.
    assert torch.all((found.log_px - exact).abs() < 5 * found.se + 0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {"posterior": "flow"},
        {"posterior": "full", "prior": "mixture"},
        {"prior": "vamp"},
        {"latent_dim": (4, 2)},
    ],
    ids=str,
)
def test_every_kind_of_model_gets_a_proposal_with_a_higher_bound(changes):
    torch.manual_seed(0)
    config = {"data_shape": (1, 4, 4), "space": "binary", "latent_dim": 3} | {
        "likelihood": "bernoulli",
        "hidden": (16,),
        "prior_components": 4,
    }
    model = VAE(VAEConfig(**(config | changes)))
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(3)
    x = torch.bernoulli(torch.full((10, 1, 4, 4), 0.5))
    bounds = {
        name: importance_sampling(
            model, x, 400, generator=torch.Generator().manual_seed(0), proposal=name
        ).elbo.mean()
        for name in ("encoder", "refined")
    }
    assert bounds["refined"] > bounds["encoder"] + 0.05


def test_proposal_is_deterministic_leaves_no_gradients_and_works_in_inference_mode():
    fa = factor_analysis(3)
    x, _ = fa.sample(5, generator=torch.Generator().manual_seed(1))
    model = fa.as_vae(shift=0.5)
    first = make_proposal("refined", model, x)
    with torch.inference_mode():
        second = make_proposal("refined", model, x.clone())
    assert torch.equal(first.mean, second.mean)
    assert not first.mean.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_unknown_proposal_is_refused_by_name():
    fa = factor_analysis(1)
    with pytest.raises(ValueError, match=r"'refind' is unknown.*did you mean refined"):
        importance_sampling(fa.as_vae(), torch.zeros(1, 12), 5, proposal="refind")


def test_the_signs_of_eigenvectors_are_not_the_library_s(monkeypatch):
    """Those of CPUs and GPUs differ, and each axis would get other noise by them."""
    torch.manual_seed(0)
    setup = {"data_shape": (6,), "space": "binary", "likelihood": "bernoulli", "hidden": (8,)}
    model = VAE(VAEConfig(latent_dim=3, **setup)).double()
    x = torch.randint(0, 2, (4, 6), generator=torch.Generator().manual_seed(1))
    expected = make_proposal("refined", model, x)
    eigh = torch.linalg.eigh

    def flipped(matrix):
        values, vectors = eigh(matrix)
        return values, vectors * torch.tensor([1.0, -1.0, 1.0]).to(vectors)

    monkeypatch.setattr(torch.linalg, "eigh", flipped)
    found = make_proposal("refined", model, x)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.variance, expected.variance, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("likelihood", ["gaussian", "gaussian_unit", "laplace", "student_t"])
@pytest.mark.parametrize("size", [1e9, 1e18, 1e20, 1e30])
def test_an_example_far_out_does_not_end_its_neighbours(name, likelihood, size):
    """Its curvature is finite, but 1e36 along one latent and 1 along the other."""
    torch.manual_seed(0)
    config = VAEConfig(
        data_shape=(3,), space="continuous", latent_dim=2, likelihood=likelihood, hidden=(8,)
    )
    model = VAE(config).eval()
    x = torch.randn(6, 3, dtype=torch.float64)
    model.set_data_statistics(x.mean(0), x.std(0))
    far = x.clone()
    far[2, 1] = size

    def estimate(values):
        noise = [torch.Generator().manual_seed(i) for i in range(len(values))]
        return importance_sampling(model, values, 100, proposal=name, generator=noise)

    found, alone = estimate(far), estimate(x)
    others = torch.arange(6) != 2
    torch.testing.assert_close(found.log_px[others], alone.log_px[others], rtol=1e-5, atol=1e-4)
    if likelihood != "student_t":  # its tail is a power, and can be sampled
        assert not found.trustworthy[2]


@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e9, 1e18])
def test_a_proposal_has_the_covariance_of_its_axes(ratio):
    g = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64)).Q
    axes = rotation * torch.tensor([1 / ratio, 1.0, 1.0, 3.0], dtype=torch.float64)
    lower = _cholesky(axes[None])[0]
    assert torch.equal(lower, lower.tril())
    assert (lower.diagonal() > 0).all()
    torch.testing.assert_close(lower @ lower.T, axes @ axes.T, rtol=0, atol=1e-14)
