"""Posteriors: exact densities, invertible flows, closed-form KL against oracles."""

from typing import Any

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence as torch_kl

from vae.models import (
    POSTERIORS,
    CholeskyNormal,
    ConditionalPosterior,
    CouplingFlow,
    DiagonalNormal,
    DiagonalPosterior,
    FlowDistribution,
    HierarchicalPosterior,
    Mixture,
    StandardNormal,
    kl_divergence,
    kl_per_dimension,
    raw_log_scale,
)

B, L, K = 4, 3, 7


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shaken(module, amount=0.5):
    """The module in float64 with random weights everywhere (flows start as the identity)."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += amount * torch.randn_like(parameter)
    return module


def cholesky_normal(batch=B, size=L):
    scale_tril = torch.tril(0.4 * double(batch, size, size), -1)
    return CholeskyNormal(
        double(batch, size), scale_tril + torch.diag_embed(double(batch, size).exp())
    )


def make(name, size=L, batch=B):
    """A random posterior of each kind, batch (batch,), event (size,)."""
    if name == "hierarchical":
        lower = size - size // 2
        upper = size // 2
        family = POSTERIORS["flow"](latent_dim=upper, width=6)
        conditional = shaken(ConditionalPosterior(lower, (5,), "tanh", family), 0.3)
        return HierarchicalPosterior(make("full", lower, batch), [conditional], [lower, upper])
    family = shaken(POSTERIORS[name](latent_dim=size, width=6))
    return family(double(batch, family.num_outputs))


ALL = [*POSTERIORS, "hierarchical"]


def test_diagonal_family_reads_loc_and_log_scale():
    outputs = double(B, 2 * L)
    q = POSTERIORS["diagonal"](latent_dim=L, width=1)(outputs)
    scale = (10 * torch.tanh(outputs[:, L:] / 10)).exp()
    z = double(K, B, L)
    oracle = Independent(Normal(outputs[:, :L], scale), 1)
    torch.testing.assert_close(q.log_prob(z), oracle.log_prob(z))
    torch.testing.assert_close(q.from_noise(z), outputs[:, :L] + scale * z)


def test_full_family_reads_a_cholesky_factor():
    family = POSTERIORS["full"](latent_dim=L, width=1).double()
    assert family.num_outputs == 2 * L + 3
    outputs = double(B, family.num_outputs)
    q = family(outputs)
    scale_tril = torch.zeros(B, L, L, dtype=torch.float64)
    scale_tril[:, 1, 0], scale_tril[:, 2, 0], scale_tril[:, 2, 1] = outputs[:, 2 * L :].unbind(-1)
    scale_tril += torch.diag_embed((10 * torch.tanh(outputs[:, L : 2 * L] / 10)).exp())
    torch.testing.assert_close(q.scale_tril, scale_tril)
    oracle = MultivariateNormal(outputs[:, :L], scale_tril=scale_tril)
    z = double(K, 2, B, L)
    torch.testing.assert_close(q.log_prob(z), oracle.log_prob(z))
    torch.testing.assert_close(q.log_prob(z[0, 0]), oracle.log_prob(z[0, 0]))
    torch.testing.assert_close(q.variance, oracle.variance)
    torch.testing.assert_close(q.entropy(), oracle.entropy())
    torch.testing.assert_close(q.covariance_matrix, oracle.covariance_matrix)
    expected = outputs[:, :L] + torch.einsum("bij,kbj->kbi", scale_tril, z[:, 0])
    torch.testing.assert_close(q.from_noise(z[:, 0]), expected)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_log_prob_along_the_way_equals_log_prob_of_the_point(name, size):
    q = make(name, size)
    z, log_q = q.from_noise_with_log_prob(double(K, 2, B, size))
    torch.testing.assert_close(q.log_prob(z), log_q, rtol=1e-9, atol=1e-9)
    eps = double(B, size)
    torch.testing.assert_close(q.from_noise_with_log_prob(eps)[0], q.from_noise(eps))


@pytest.mark.parametrize("name", ALL)
def test_density_is_the_noise_density_over_the_jacobian(name):
    """Change of variables: log q(z) = log N(eps; 0, I) - log |det dz/deps|, det by autograd."""
    size = 4
    q = make(name, size, batch=1)
    eps = double(1, size)
    jacobian: Any = torch.autograd.functional.jacobian(q.from_noise, eps)
    log_det = torch.linalg.slogdet(jacobian[0, :, 0, :])[1]
    expected = Normal(0.0, 1.0).log_prob(eps).sum() - log_det
    torch.testing.assert_close(q.log_prob(q.from_noise(eps))[0], expected)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_coupling_flow_inverts_and_knows_its_jacobian(size):
    flow = shaken(CouplingFlow(size, 6, 4))
    z, context = double(K, B, size), double(B, 6)
    y, log_det = flow(z, context)
    back, log_det_back = flow(y, context, inverse=True)
    assert (y - z).abs().max() > 0.1
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(log_det_back, -log_det)
    for b in range(B):
        jacobian = torch.autograd.functional.jacobian(
            lambda v, c=context[b]: flow(v, c)[0], z[3, b]
        )
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det[3, b])


def test_coupling_flow_moves_every_value_and_depends_on_the_context():
    flow = shaken(CouplingFlow(3, 6, 4))
    z, context = double(3), double(6)
    jacobian = torch.autograd.functional.jacobian(lambda v, c: flow(v, c)[0], (z, context))
    assert all((part.abs().sum(1) > 1e-3).all() for part in jacobian)
    assert (jacobian[0].abs() > 1e-6).all(), "two turns mix all values"


def test_flow_starts_as_the_diagonal_posterior():
    family = POSTERIORS["flow"](latent_dim=L, width=6).double()
    outputs = double(B, family.num_outputs)
    base = DiagonalPosterior(latent_dim=L, width=6)(outputs[:, : 2 * L])
    z = double(K, B, L)
    torch.testing.assert_close(family(outputs).log_prob(z), base.log_prob(z))
    torch.testing.assert_close(family(outputs).mean, base.mean, atol=0.02, rtol=0.0)
    torch.testing.assert_close(family(outputs).variance, base.variance, atol=0.0, rtol=0.05)


@pytest.mark.parametrize("name", ["flow", "hierarchical"])
def test_two_dimensional_density_integrates_to_one(name):
    family = shaken(POSTERIORS["flow"](latent_dim=2, width=6), 0.2)
    outputs = 0.3 * double(1, family.num_outputs)
    q = family(outputs)
    if name == "hierarchical":
        lower = POSTERIORS["flow"](latent_dim=1, width=6).double()
        upper = POSTERIORS["flow"](latent_dim=1, width=6)
        conditional = shaken(ConditionalPosterior(1, (5,), "tanh", upper), 0.2)
        first = shaken(lower, 0.2)(0.3 * double(1, lower.num_outputs))
        q = HierarchicalPosterior(first, [conditional], [1, 1])
    axis = torch.linspace(-20, 20, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)[:, None]
    mass = q.log_prob(grid).exp().sum() * (axis[1] - axis[0]).square()
    assert mass.item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_samples_follow_mean_and_variance(name):
    q = make(name)
    z = q.sample((40_000,))
    se = (q.variance / 40_000).sqrt()
    exact = name in ("diagonal", "full")
    # quasi-Monte Carlo moments have an error of their own
    slack = 0.0 if exact else 0.05
    assert ((z.mean(0) - q.mean).abs() <= 5 * se + slack * q.stddev).all()
    torch.testing.assert_close(z.var(0), q.variance, rtol=0.08 if exact else 0.25, atol=0.0)
    assert not z.requires_grad
    assert q.rsample((2,)).shape == (2, B, L)


@pytest.mark.parametrize("name", ALL)
def test_detach_stops_the_parameters_and_follows_z(name):
    q = make(name)
    stopped = q.detach()
    z = double(K, B, L).requires_grad_()
    torch.testing.assert_close(stopped.log_prob(z), q.log_prob(z))
    (through_stopped,) = torch.autograd.grad(stopped.log_prob(z).sum(), z)
    (through_free,) = torch.autograd.grad(q.log_prob(z).sum(), z)
    torch.testing.assert_close(through_stopped, through_free)
    assert not stopped.log_prob(z.detach()).requires_grad


@pytest.mark.parametrize("name", ALL)
def test_take_picks_members_of_the_batch(name):
    q = make(name)
    index = torch.tensor([2, 0, 2, 3, 1])
    z = double(K, 5, L)
    expected = torch.stack(
        [q.log_prob(z[:, [i]].expand(-1, B, -1))[:, j] for i, j in enumerate(index)], 1
    )
    torch.testing.assert_close(q.take(index).log_prob(z), expected)


@pytest.mark.parametrize("name", POSTERIORS)
def test_log_prob_broadcasts_points_over_the_batch(name):
    q = make(name)
    z = double(K, 2, 1, L)
    torch.testing.assert_close(q.log_prob(z), q.log_prob(z.expand(K, 2, B, L)))


def test_hierarchical_posterior_is_the_joint_gaussian_that_it_describes():
    family = DiagonalPosterior(latent_dim=2, width=1)
    conditional = ConditionalPosterior(3, (), "tanh", family).double()
    layer: Any = conditional.network[0]
    log_scale = 0.3 * double(2)
    with torch.no_grad():
        layer.weight[2:] = 0
        layer.bias[:2] = double(2)
        layer.bias[2:] = raw_log_scale(log_scale)
    A, a = layer.weight[:2].detach(), layer.bias[:2].detach()
    first = DiagonalNormal(double(B, 3), 0.3 * double(B, 3))
    q = HierarchicalPosterior(first, [conditional], [3, 2])
    scale = first.scale
    T = torch.zeros(B, 5, 5, dtype=torch.float64)
    T[:, :3, :3] = torch.diag_embed(scale)
    T[:, 3:, :3] = A @ torch.diag_embed(scale)
    T[:, 3:, 3:] = log_scale.exp().diag()
    oracle = MultivariateNormal(torch.cat([first.loc, first.loc @ A.T + a], -1), scale_tril=T)
    z = double(K, B, 5)
    torch.testing.assert_close(q.log_prob(z), oracle.log_prob(z))
    torch.testing.assert_close(q.mean, oracle.mean, atol=0.02, rtol=0.0)


def as_torch(q):
    if isinstance(q, CholeskyNormal):
        return MultivariateNormal(q.loc, scale_tril=q.scale_tril)
    return Independent(Normal(q.mean, q.stddev), 1)


PAIRS = {
    "diagonal-standard": lambda: (make("diagonal"), StandardNormal(torch.zeros(L).double())),
    "full-standard": lambda: (cholesky_normal(), StandardNormal(torch.zeros(L).double())),
    "diagonal-diagonal": lambda: (make("diagonal"), make("diagonal")),
}


@pytest.mark.parametrize("pair", list(PAIRS))
def test_closed_form_kl_equals_torch_and_monte_carlo(pair):
    q, p = PAIRS[pair]()
    kl = kl_divergence(q, p)
    oracle_p = as_torch(p)
    if pair.startswith("full"):
        oracle_p = MultivariateNormal(p.mean, torch.eye(L).double())
    torch.testing.assert_close(kl, torch_kl(as_torch(q), oracle_p))
    torch.testing.assert_close(torch_kl(q, p), kl)
    z, log_q = q.from_noise_with_log_prob(double(40_000, B, L))
    draws = log_q - p.log_prob(z)
    assert ((draws.mean(0) - kl).abs() < 5 * draws.std(0) / 200).all()


def test_full_kl_per_dimension_follows_the_chain_rule():
    """The first j terms sum to the KL between the marginals of the first j dimensions."""
    q, p = cholesky_normal(size=5), StandardNormal(torch.zeros(5).double())
    terms = kl_per_dimension(q, p)
    assert terms is not None
    assert (terms >= 0).all()
    for j in range(1, 6):
        marginal = MultivariateNormal(q.loc[:, :j], q.covariance_matrix[:, :j, :j])
        standard = MultivariateNormal(torch.zeros(j).double(), torch.eye(j).double())
        torch.testing.assert_close(terms[:, :j].sum(-1), torch_kl(marginal, standard))


def test_kl_without_a_closed_form_is_none():
    q, standard = make("diagonal"), StandardNormal(torch.zeros(L).double())
    log_weights = torch.zeros(B).double().log_softmax(0)
    assert kl_divergence(make("flow"), standard) is None
    assert kl_divergence(q, Mixture(make("full"), log_weights)) is None
    assert kl_per_dimension(make("hierarchical"), standard) is None


def test_posteriors_of_an_empty_batch():
    for name in ALL:
        q = make(name, batch=0)
        assert q.log_prob(double(K, 0, L)).shape == (K, 0)
        assert q.from_noise(double(K, 0, L)).shape == (K, 0, L)


def test_an_outlier_leaves_scales_finite_in_float32():
    for name in POSTERIORS:
        family = POSTERIORS[name](latent_dim=L, width=6)
        outputs = torch.full((1, family.num_outputs), 1e4)
        outputs[:, :L] = 1.0
        outputs[:, 2 * L :] = 0.0
        for sign in (1, -1):
            outputs[:, L : 2 * L] = sign * 1e4
            q = family(outputs)
            z, log_q = q.from_noise_with_log_prob(torch.randn(K, 1, L))
            assert log_q.isfinite().all()
            torch.testing.assert_close(q.log_prob(z), log_q, rtol=1e-2, atol=1e-2)


def test_flow_distribution_reports_its_shapes():
    q = make("flow")
    assert isinstance(q, FlowDistribution)
    assert (q.batch_shape, q.event_shape) == ((B,), (L,))
