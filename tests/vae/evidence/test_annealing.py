"""Annealed importance sampling and two-sided bounds, against exact values and quadrature."""

import math

import pytest
import torch

from vae.evidence import (
    FactorAnalysis,
    annealed_importance_sampling,
    bidirectional,
    importance_sampling,
)
from vae.evidence.annealing import _Path
from vae.models import VAE, VAEConfig


def normal(*shape, generator):
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def random_model(D, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = normal(D, d, generator=g) / math.sqrt(d)
    return FactorAnalysis(normal(D, generator=g), weight, 0.2 + normal(D, generator=g).square()), g


def small_vae(seed=0, **changes):
    torch.manual_seed(seed)
    config = {
        "data_shape": (1, 2, 4),
        "space": "binary",
        "latent_dim": 2,
        "likelihood": "bernoulli",
        "hidden": (7,),
    }
    model = VAE(VAEConfig(**config | changes))
    with torch.no_grad():
        model.decoder.output.weight.mul_(2)
    return model


@pytest.mark.parametrize(("D", "d"), [(3, 1), (20, 4), (40, 16)])
def test_it_lies_within_its_error_of_the_exact_value(D, d):
    fa, g = random_model(D, d)
    x, _ = fa.sample(20, generator=g)
    vae = fa.as_vae(shift=0.1, widen=1.2)
    evidence = annealed_importance_sampling(vae, x, 200, num_temperatures=15, generator=g)
    exact = fa.log_prob(x)
    assert ((evidence.log_px - exact).abs() < 4 * evidence.se).all()
    assert evidence.khat.max() < 0.5
    assert (exact - evidence.elbo).mean().item() == pytest.approx(fa.proposal_kl(0.1, 1.2), rel=0.2)
    plain = importance_sampling(vae, x, 200, generator=g)
    assert evidence.ess.mean() > plain.ess.mean()
    assert evidence.se.mean() < plain.se.mean()


@pytest.mark.slow
@pytest.mark.parametrize(("D", "d"), [(64, 64), (784, 64)])
def test_it_is_right_in_many_dimensions(D, d):
    fa, g = random_model(D, d)
    x, _ = fa.sample(4, generator=g)
    vae = fa.as_vae(shift=0.1, widen=1.2)
    evidence = annealed_importance_sampling(vae, x, 32, num_temperatures=50, generator=g)
    assert ((evidence.log_px - fa.log_prob(x)).abs() < 4 * evidence.se).all()
    assert evidence.ess.min() > 16


def test_its_weights_are_unbiased_over_many_chains():
    fa, g = random_model(5, 3)
    x, _ = fa.sample(1, generator=g)
    vae = fa.as_vae(shift=0.5, widen=0.8)
    repeated = x.expand(200, 5)  # 200 independent adaptations
    evidence = annealed_importance_sampling(
        vae, repeated, 100, num_temperatures=4, num_leapfrog=3, generator=g
    )
    ratio = (evidence.log_px - fa.log_prob(x)).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(200)
    assert ratio.std() / math.sqrt(200) < 0.02


def test_the_exact_posterior_gives_constant_weights():
    fa, g = random_model(10, 3)
    x, _ = fa.sample(5, generator=g)
    evidence = annealed_importance_sampling(
        fa.as_vae(), x, 30, num_temperatures=6, num_leapfrog=2, generator=g
    )
    torch.testing.assert_close(evidence.log_px, fa.log_prob(x), rtol=0, atol=1e-8)
    torch.testing.assert_close(evidence.ess, torch.full((5,), 30.0).double())


def test_it_beats_importance_sampling_on_a_poor_encoder():
    fa, g = random_model(40, 16)
    x, _ = fa.sample(10, generator=g)
    vae = fa.as_vae(shift=0.5, widen=0.4)
    exact = fa.log_prob(x)
    annealed = annealed_importance_sampling(vae, x, 16, num_temperatures=50, generator=g)
    gradients = 3 * (16 + 8) * 50 * 10  # a gradient costs about three decodings
    plain = importance_sampling(vae, x, gradients, generator=g)
    assert (exact - annealed.log_px).mean() < 0.5 * (exact - plain.log_px).mean()
    assert ((exact - annealed.log_px).abs() < 1.5).all()
    assert plain.khat.median() > 0.7


@pytest.mark.parametrize(
    "changes",
    [
        {"posterior": "flow"},
        {"posterior": "full", "prior": "vamp", "prior_components": 3},
        {"space": "grey8", "likelihood": "logistic_mixture", "min_scale": 0.05},
        {"space": "continuous", "likelihood": "student_t"},
    ],
    ids=["flow", "full, vamp", "logistic mixture", "student t"],
)
def test_it_agrees_with_quadrature(changes):
    model = small_vae(**changes).double()
    with torch.no_grad():
        x = model.likelihood(torch.randn(4, 2).double()).sample()
        points = torch.linspace(-7, 7, 161, dtype=torch.float64)
        z = torch.cartesian_prod(points, points)[:, None].expand(-1, 4, -1)
        log_joint = model.likelihood(z).log_prob(x) + model.prior().log_prob(z)
        exact = log_joint.logsumexp(0) + 2 * (points[1] - points[0]).log()
    g = torch.Generator().manual_seed(1)
    evidence = annealed_importance_sampling(model, x, 100, num_temperatures=30, generator=g)
    assert (evidence.se < 0.3).all()
    assert ((evidence.log_px - exact).abs() < 4 * evidence.se).all()


@pytest.mark.parametrize(("D", "d"), [(8, 2), (30, 8)])
def test_the_bidirectional_bounds_enclose_the_exact_value(D, d):
    fa, g = random_model(D, d)
    vae = fa.as_vae(shift=0.3, widen=0.7)
    bounds = bidirectional(vae, 60, num_samples=2, num_temperatures=10, num_leapfrog=4, generator=g)
    exact = fa.log_prob(bounds.x)
    for difference in (exact - bounds.lower, bounds.upper - exact):
        assert difference.mean() > -4 * difference.std() / math.sqrt(60)
        assert difference.mean() < 2
    assert bounds.gap.mean() > 0


def test_bidirectional_bounds_tighten_with_more_temperatures_and_say_what_they_hold_for():
    fa, g = random_model(8, 4)
    vae = fa.as_vae(shift=0.5, widen=0.6)
    coarse, fine = (
        bidirectional(vae, 40, num_samples=1, num_temperatures=n, num_leapfrog=4, generator=g)
        for n in (3, 30)
    )
    assert fine.gap.mean() < 0.5 * coarse.gap.mean()
    assert "simulated" in fine.valid_for


@pytest.mark.parametrize(
    "changes",
    [{"posterior": "flow"}, {"posterior": "full", "prior": "vamp"}, {"latent_dim": (3, 2)}],
    ids=["flow", "full, vamp", "hierarchical"],
)
def test_bidirectional_works_for_every_posterior_and_prior(changes):
    model = small_vae(**changes)
    g = torch.Generator().manual_seed(2)
    bounds = bidirectional(model, 30, num_samples=2, num_temperatures=10, generator=g)
    assert bounds.x.shape == (30, 1, 2, 4)
    assert set(bounds.x.unique().tolist()) <= {0.0, 1.0}
    assert bounds.gap.mean() > -4 * bounds.gap.std() / math.sqrt(30)
    assert bounds.gap.mean() < 3


def test_bidirectional_refuses_a_likelihood_that_leaks_mass():
    model = small_vae(space="grey8", likelihood="gaussian")
    with pytest.raises(ValueError, match=r"gaussian on 8-bit data leaves mass .* discretized_g"):
        bidirectional(model, 2)
    model = small_vae(space="grey8", likelihood="discretized_gaussian")
    bounds = bidirectional(model, 3, num_samples=1, num_temperatures=3)
    assert bounds.x.min() >= 0
    assert bounds.x.max() <= 255


def test_transitions_leave_the_posterior_as_it_is():
    fa, g = random_model(6, 2)
    vae = fa.as_vae(shift=0.5, widen=0.7)
    x, _ = fa.sample(1, generator=g)
    path = _Path(vae, x, 20, 5, g)
    path.adapt()
    posterior = fa.posterior(x)
    state = path.at(posterior.loc + normal(20_000, 1, 2, generator=g) @ posterior.scale_tril[0].T)
    accepted = torch.zeros(())
    for _ in range(5):
        state, accepted = path._transition(state, 1.0, path.steps[-2])
    assert 0.3 < accepted.mean() < 0.98
    z = (path.mean + torch.einsum("bij,cbj->cbi", path.scale_tril, state.u))[:, 0]
    centred = (z - posterior.loc) @ torch.linalg.inv(posterior.scale_tril[0]).T
    assert (centred.mean(0).abs() < 4 / math.sqrt(20_000)).all()
    torch.testing.assert_close(centred.T.cov(), torch.eye(2).double(), rtol=0, atol=0.04)


def test_it_is_reproducible_and_leaves_the_model_alone():
    model = small_vae()
    x = torch.randint(0, 2, (3, 1, 2, 4))
    few = {"num_samples": 3, "num_temperatures": 5, "num_leapfrog": 2}
    first, again = (
        annealed_importance_sampling(model, x, **few, generator=torch.Generator().manual_seed(4))
        for _ in range(2)
    )
    assert torch.equal(first.log_px, again.log_px)
    assert first.num_samples == 3
    assert first.khat.isnan().all()
    assert first.log_px.dtype == torch.float64
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad
        assert parameter.grad is None


def test_counts_are_checked():
    model = small_vae()
    x = torch.zeros(2, 1, 2, 4)
    with pytest.raises(ValueError, match="num_temperatures and num_leapfrog must be at least 1"):
        annealed_importance_sampling(model, x, num_temperatures=0)
    with pytest.raises(ValueError, match="num_samples must be at least 1; found 0"):
        annealed_importance_sampling(model, x, 0)
    with pytest.raises(ValueError, match="num_examples and num_samples must be at least 1"):
        bidirectional(model, 0)
