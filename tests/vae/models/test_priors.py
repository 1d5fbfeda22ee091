"""Priors against torch.distributions, exact joint Gaussians and their own samples."""

import math
from typing import Any

import pytest
import torch
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from vae.models import (
    POSTERIORS,
    PRIORS,
    VAE,
    ConditionalNormal,
    DiagonalNormal,
    HierarchicalPrior,
    Mixture,
    StandardNormal,
    VAEConfig,
    bounded_log_scale,
    raw_log_scale,
)

L, M = 3, 5


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_moments_match_samples(p, num_samples=40_000):
    z = p.sample((num_samples,))
    mean_se = (p.variance / num_samples).sqrt()
    assert ((z.mean(0) - p.mean).abs() < 5 * mean_se).all()
    torch.testing.assert_close(z.var(0), p.variance, rtol=0.06, atol=0.0)


def test_standard_normal():
    p = StandardNormal(torch.zeros(L, dtype=torch.float64))
    oracle = Independent(Normal(torch.zeros(L).double(), 1.0), 1)
    z = double(4, 2, L)
    torch.testing.assert_close(p.log_prob(z), oracle.log_prob(z))
    torch.testing.assert_close(p.entropy(), oracle.entropy())
    assert (p.batch_shape, p.event_shape) == ((), (L,))
    assert_moments_match_samples(p)


def test_diagonal_normal():
    loc, log_scale = double(4, L), double(4, L)
    p, oracle = DiagonalNormal(loc, log_scale), Independent(Normal(loc, log_scale.exp()), 1)
    z = double(7, 4, L)
    torch.testing.assert_close(p.log_prob(z), oracle.log_prob(z))
    torch.testing.assert_close(p.entropy(), oracle.entropy())
    torch.testing.assert_close(p.scale_tril @ p.scale_tril.mT, torch.diag_embed(p.variance))
    assert_moments_match_samples(p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bound", [1.0, 9.9])
def test_densities_under_each_component_are_those_of_one_at_a_time(dtype, bound):
    """Value and gradients, scales from e^-9.9 to e^9.9 included, where the products cancel most."""
    g = torch.Generator().manual_seed(5)
    exact = [torch.randn(4, 3, 2, 6, generator=g, dtype=torch.float64) * 3]
    exact += [torch.randn(7, 6, generator=g, dtype=torch.float64) * 3]
    exact += [bound * (2 * torch.rand(7, 6, generator=g, dtype=torch.float64) - 1)]
    exact = [value.to(dtype).double().requires_grad_() for value in exact]
    given = [value.detach().to(dtype).requires_grad_() for value in exact]

    z, loc, log_scale = exact
    expected = DiagonalNormal(loc, log_scale).log_prob(z.unsqueeze(-2))
    found = DiagonalNormal(*given[1:]).log_prob_of_each(given[0])
    assert found.dtype == dtype
    assert found.shape == (4, 3, 2, 7)
    rtol = 2e-6 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e-6)
    weight = torch.randn(found.shape, generator=g, dtype=torch.float64)
    wanted = torch.autograd.grad((weight * expected).sum(), exact)
    gradients = torch.autograd.grad((weight.to(dtype) * found).sum(), given)
    for a, b in zip(gradients, wanted, strict=True):
        largest = b.abs().max().item()
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6 * largest)


def test_mixture():
    loc, log_scale, logits = 2 * double(M, L), 0.3 * double(M, L), double(M)
    p = Mixture(DiagonalNormal(loc, log_scale), logits.log_softmax(0))
    components = Independent(Normal(loc, log_scale.exp()), 1)
    oracle = MixtureSameFamily(Categorical(logits=logits), components)
    z = double(7, 2, L)
    torch.testing.assert_close(p.log_prob(z), oracle.log_prob(z))
    torch.testing.assert_close(p.mean, oracle.mean)
    torch.testing.assert_close(p.variance, oracle.variance)
    assert_moments_match_samples(p)
    assert p.sample().shape == (L,)


def test_learned_mixture_is_normalised_and_every_parameter_learns():
    prior: Any = PRIORS["mixture"](latent_dim=1, num_components=M, input_shape=()).double()
    with torch.no_grad():
        prior.logits.copy_(double(M))
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    p = prior(lambda u: pytest.fail("a Gaussian mixture encodes nothing"))
    assert torch.trapezoid(p.log_prob(grid[:, None]).exp(), grid).item() == pytest.approx(1)
    p.log_prob(double(6, 1)).sum().backward()
    assert all((parameter.grad != 0).any() for parameter in prior.parameters())


@pytest.mark.parametrize("space", ["binary", "grey8", "continuous"])
@pytest.mark.parametrize("posterior", list(POSTERIORS))
def test_vamp_prior_is_the_mean_of_posteriors_at_pseudo_inputs(space, posterior):
    likelihood = {"binary": "bernoulli", "grey8": "discretized_logistic"}.get(space, "gaussian")
    config = VAEConfig(
        data_shape=(1, 2, 3),
        space=space,
        latent_dim=L,
        likelihood=likelihood,
        hidden=(8,),
        posterior=posterior,
        prior="vamp",
        prior_components=M,
    )
    model = VAE(config).double()
    top = {"binary": 1.0, "grey8": 255.0, "continuous": 40.0}[space]
    model.set_data_statistics(top * torch.rand(1, 2, 3), top * torch.rand(1, 2, 3))
    free: Any = model.prior_family.pseudo_inputs
    mean = model.data_loc
    if space == "continuous":
        pseudo = mean + model.data_scale * free
    else:
        share = (mean / top).clamp(0.01, 0.99)
        pseudo = top * share * free.exp() / (1 - share + share * free.exp())
        assert (pseudo > 0).all()
        assert (pseudo < top).all()
    z = double(4, 2, L)
    by_input = torch.stack([model.posterior(u[None]).log_prob(z[..., None, :]) for u in pseudo])
    expected = torch.logsumexp(by_input.squeeze(-1), 0) - math.log(M)
    torch.testing.assert_close(model.prior().log_prob(z), expected)
    if posterior != "flow":
        assert_moments_match_samples(model.prior())
    model.prior().log_prob(z).sum().backward()
    assert (free.grad != 0).all()
    assert (model.encoder.output.weight.grad != 0).any()


def affine_conditional(upper, lower):
    """p(lower|upper) = N(A upper + b, diag(scale)²), with A, b and scale."""
    conditional = ConditionalNormal(upper, lower, (), "tanh").double()
    layer: Any = conditional.network[0]
    log_scale = 0.3 * double(lower)
    with torch.no_grad():
        layer.weight[lower:] = 0
        layer.bias[:lower] = double(lower)
        layer.bias[lower:] = raw_log_scale(log_scale)
    weight, bias = layer.weight[:lower].detach(), layer.bias[:lower].detach()
    return conditional, weight, bias, log_scale.exp()


def test_hierarchical_prior_is_the_joint_gaussian_that_it_describes():
    to_middle, A, a, s = affine_conditional(2, 3)
    to_lowest, B, b, t = affine_conditional(3, 4)
    top = StandardNormal(torch.zeros(2, dtype=torch.float64))
    p = HierarchicalPrior(top, [to_lowest, to_middle], [4, 3, 2])

    # z = mean + T e with e = (e1, e2, e3) standard normal, z1 lowest
    eye = torch.eye(2).double()
    middle = torch.cat([torch.zeros(3, 4).double(), s.diag(), A], 1)
    lowest = torch.cat([t.diag(), torch.zeros(4, 5).double()], 1) + B @ middle
    highest = torch.cat([torch.zeros(2, 7).double(), eye], 1)
    T = torch.cat([lowest, middle, highest])
    mean = torch.cat([B @ a + b, a, torch.zeros(2).double()])
    oracle = MultivariateNormal(mean, T @ T.T)
    z = double(6, 5, 9)
    torch.testing.assert_close(p.log_prob(z), oracle.log_prob(z))
    samples = p.sample((40_000,))
    assert ((samples.mean(0) - mean).abs() < 5 * (oracle.variance / 40_000).sqrt()).all()
    torch.testing.assert_close(torch.cov(samples.T), oracle.covariance_matrix, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("prior", list(PRIORS))
@pytest.mark.parametrize("latent_dim", [3, (4, 2)])
def test_samples_are_reproducible_by_generator(prior, latent_dim):
    config = VAEConfig(
        data_shape=(6,),
        space="continuous",
        latent_dim=latent_dim,
        likelihood="gaussian",
        prior=prior,
        posterior="flow",
        prior_components=M,
    )
    p = VAE(config).prior()
    first, again, other = (
        p.sample((7, 2), generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert first.shape == (7, 2, p.event_shape[0])
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_bounded_log_scale_and_its_inverse():
    log_scale = torch.linspace(-9.9, 9.9, 100, dtype=torch.float64)
    torch.testing.assert_close(bounded_log_scale(raw_log_scale(log_scale)), log_scale)
    extreme = bounded_log_scale(torch.tensor([-1e30, -1e3, 1e3, 1e30]))
    assert torch.equal(extreme, torch.tensor([-10.0, -10.0, 10.0, 10.0]))
    with pytest.raises(ValueError, match="12"):
        raw_log_scale(torch.tensor([0.0, -12.0]))
