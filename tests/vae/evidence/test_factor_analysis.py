"""Factor analysis against dense Gaussians, many digits, scikit-learn and its own identity."""

import itertools
import math

import mpmath
import pytest
import torch
from sklearn.decomposition import FactorAnalysis as Reference
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from vae.evidence import FactorAnalysis, importance_sampling
from vae.models import CholeskyNormal, DiagonalNormal


def normal(*shape, generator):
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def random_model(D, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = normal(D, d, generator=g) / math.sqrt(d)
    return FactorAnalysis(normal(D, generator=g), weight, 0.2 + normal(D, generator=g).square()), g


def covariance(fa):
    return fa.weight @ fa.weight.T + torch.diag(fa.noise_variance)


@pytest.mark.parametrize(("D", "d"), [(1, 1), (5, 2), (40, 8), (3, 6), (300, 64)])
def test_log_prob_is_the_dense_gaussian_s(D, d):
    fa, g = random_model(D, d)
    x, _ = fa.sample(20, generator=g)
    dense = MultivariateNormal(fa.loc, covariance(fa))
    torch.testing.assert_close(fa.log_prob(x), dense.log_prob(x), rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("noise", [1e-4, 1e-10])
def test_log_prob_keeps_its_digits_with_little_noise(noise):
    g = torch.Generator().manual_seed(1)
    weight, x = normal(4, 2, generator=g), normal(4, generator=g)
    x = weight @ normal(2, generator=g) + math.sqrt(noise) * x
    psi = torch.full((4,), noise, dtype=torch.float64)
    fa = FactorAnalysis(torch.zeros(4, dtype=torch.float64), weight, psi)
    with mpmath.workdps(60):
        W, r = mpmath.matrix(weight.tolist()), mpmath.matrix(x.tolist())
        sigma = W * W.T + mpmath.diag([mpmath.mpf(v) for v in psi.tolist()])
        squares = (r.T * mpmath.lu_solve(sigma, r))[0]
        exact = -0.5 * (4 * mpmath.log(2 * mpmath.pi) + mpmath.log(mpmath.det(sigma)) + squares)
        exact = float(exact)
    # x holds sigma's worth of digits less than float64 does: rounding of x, not of the formula
    assert fa.log_prob(x[None]).item() == pytest.approx(exact, rel=1e-15 / math.sqrt(noise) + 1e-13)


def test_posterior_is_the_conditional_of_the_joint_gaussian():
    fa, g = random_model(12, 3)
    x, _ = fa.sample(6, generator=g)
    gain = fa.weight.T @ torch.linalg.inv(covariance(fa))
    q = fa.posterior(x)
    torch.testing.assert_close(q.mean, (x - fa.loc) @ gain.T, rtol=1e-9, atol=1e-10)
    expected = torch.eye(3, dtype=torch.float64) - gain @ fa.weight
    torch.testing.assert_close(q.covariance_matrix[0], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("D", "d"), [(4, 1), (20, 3), (784, 32)])
@pytest.mark.parametrize("family", ["torch full", "torch diagonal", "full", "diagonal"])
def test_elbo_plus_kl_to_the_posterior_is_log_prob_for_any_gaussian(D, d, family):
    fa, g = random_model(D, d, seed=2)
    x, _ = fa.sample(7, generator=g)
    loc, scale = 2 * normal(7, d, generator=g), 0.1 + normal(7, d, generator=g).abs()
    tril = normal(7, d, d, generator=g).tril(-1) + torch.diag_embed(scale)
    full = MultivariateNormal(loc, scale_tril=tril)
    diagonal = MultivariateNormal(loc, scale_tril=torch.diag_embed(scale))
    q, as_torch = {
        "torch full": (full, full),
        "torch diagonal": (Independent(Normal(loc, scale), 1), diagonal),
        "full": (CholeskyNormal(loc, tril), full),
        "diagonal": (DiagonalNormal(loc, scale.log()), diagonal),
    }[family]
    gap = kl_divergence(as_torch, fa.posterior(x))
    torch.testing.assert_close(fa.elbo(x, q) + gap, fa.log_prob(x), rtol=1e-10, atol=1e-8)
    assert (gap > 0).all()


def test_elbo_refuses_what_is_not_gaussian():
    fa, g = random_model(4, 2)
    x, _ = fa.sample(3, generator=g)
    with pytest.raises(TypeError, match="Gaussian is needed"):
        fa.elbo(x, torch.distributions.Independent(torch.distributions.Laplace(x[:, :2], 1.0), 1))


def test_samples_have_the_model_s_moments():
    fa, g = random_model(5, 2)
    x, z = fa.sample(200_000, generator=g)
    expected = covariance(fa)
    se = (expected.diagonal().outer(expected.diagonal()) + expected.square()).div(len(x)).sqrt()
    assert (((x.T.cov() - expected) / se).abs() < 4.5).all()
    cross = (x - fa.loc).T @ z / len(x)
    torch.testing.assert_close(cross, fa.weight, atol=0.02, rtol=0)


@pytest.mark.parametrize(("D", "d"), [(6, 1), (30, 4)])
def test_fit_agrees_with_scikit_learn(D, d):
    truth, g = random_model(D, d, seed=3)
    x, _ = truth.sample(800, generator=g)
    fitted = FactorAnalysis.fit(x, d, tol=1e-10, max_iter=20_000)
    reference = Reference(d, tol=1e-10, max_iter=20_000, svd_method="lapack").fit(x.numpy())
    score = fitted.log_prob(x).mean().item()
    assert score == pytest.approx(reference.score(x.numpy()), abs=1e-6)
    expected = torch.as_tensor(reference.get_covariance())
    torch.testing.assert_close(covariance(fitted), expected, rtol=1e-3, atol=1e-3)


def test_every_step_of_em_raises_the_likelihood():
    truth, g = random_model(20, 5, seed=4)
    x, _ = truth.sample(300, generator=g)
    scores = [
        FactorAnalysis.fit(x, 3, max_iter=n, tol=0.0).log_prob(x).mean().item() for n in range(12)
    ]
    assert all(later > earlier for earlier, later in itertools.pairwise(scores))
    best = FactorAnalysis.fit(x, 5, max_iter=5000, tol=1e-9)
    assert best.log_prob(x).mean() > truth.log_prob(x).mean()


def test_fit_survives_constant_columns_and_fewer_rows_than_columns():
    g = torch.Generator().manual_seed(5)
    x = torch.randint(0, 256, (30, 1, 8, 8), generator=g)
    x[:, :, :2] = 7
    fitted = FactorAnalysis.fit(x, 4, min_noise=0.25)
    assert fitted.noise_variance.min().item() == 0.25
    constant = fitted.noise_variance.reshape(8, 8)[:2]
    assert (constant == 0.25).all()
    torch.testing.assert_close(fitted.loc.reshape(8, 8)[:2], torch.full((2, 8), 7.0).double())
    assert fitted.log_prob(x).shape == (30,)


@pytest.mark.parametrize(
    ("x", "latent_dim", "message"),
    [
        (torch.zeros(1, 4), 2, "at least 2 rows"),
        (torch.zeros(5, 4), 4, r"1 … 3 .* found 4 \(model.latent_dim\)"),
        (torch.full((5, 4), math.nan), 2, "not finite"),
    ],
)
def test_fit_refuses_what_it_cannot_fit(x, latent_dim, message):
    with pytest.raises(ValueError, match=message):
        FactorAnalysis.fit(x, latent_dim)


@pytest.mark.parametrize(
    ("D", "d", "shape"), [(1, 1, None), (6, 2, (2, 3)), (64, 32, None), (784, 64, (1, 28, 28))]
)
def test_as_vae_has_no_gap_and_constant_weights(D, d, shape):
    fa, g = random_model(D, d, seed=6)
    vae = fa.as_vae(data_shape=shape)
    x, _ = fa.sample(9, generator=g)
    exact = fa.log_prob(x)
    x = x.reshape(9, *vae.config.data_shape)
    evidence = importance_sampling(vae, x, 100, generator=g)
    torch.testing.assert_close(evidence.log_px, exact, rtol=0, atol=1e-8)
    torch.testing.assert_close(evidence.elbo, exact, rtol=0, atol=1e-8)
    torch.testing.assert_close(evidence.ess, torch.full((9,), 100.0).double(), rtol=0, atol=1e-8)
    assert evidence.khat.eq(0).all()
    # the model's own forward: one z, but the closed-form KL, so the mean over z is the ELBO
    eps = torch.randn(4000, 9, d, generator=g, dtype=torch.float64)
    if D < 100:
        with torch.no_grad():
            terms = vae(x, eps)
            by_sample = torch.stack([vae(x, e).log_px_z for e in eps[:200]]).std(0)
        assert ((terms.elbo - exact).abs() < 4.5 * by_sample / math.sqrt(len(eps)) + 1e-9).all()


@pytest.mark.parametrize("space", ["continuous", "grey8"])
def test_as_vae_decodes_and_encodes_in_data_units(space):
    g = torch.Generator().manual_seed(7)
    weight = 0.1 * normal(6, 2, generator=g)
    fa = FactorAnalysis(torch.full((6,), 0.5).double(), weight, torch.full((6,), 0.01).double())
    vae = fa.as_vae(space, (1, 2, 3))
    y, z = fa.sample(5, generator=g)
    x = y if space == "continuous" else (256 * y).floor().clamp(0, 255)
    y = y if space == "continuous" else (x + 0.5) / 256
    q, exact = vae.posterior(x.reshape(5, 1, 2, 3)), fa.posterior(y)
    assert isinstance(q, CholeskyNormal)
    torch.testing.assert_close(q.mean, exact.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(q.covariance_matrix, exact.covariance_matrix, rtol=0, atol=1e-12)
    if space == "continuous":
        likelihood = vae.likelihood(z)
        mean = fa.likelihood(z).mean.reshape(5, 1, 2, 3)
        torch.testing.assert_close(likelihood.mean, mean, rtol=0, atol=1e-12)


def test_grey8_mass_is_the_density_times_the_bin_where_the_density_is_smooth():
    g = torch.Generator().manual_seed(8)
    weight = 0.1 * normal(6, 2, generator=g)
    fa = FactorAnalysis(torch.full((6,), 0.5).double(), weight, torch.full((6,), 0.0064).double())
    y, _ = fa.sample(20, generator=g)
    x = (256 * y).floor().clamp(5, 250)
    evidence = importance_sampling(fa.as_vae("grey8"), x, 200, generator=g)
    density = fa.log_prob((x + 0.5) / 256) - 6 * math.log(256)
    # the midpoint rule's error: bin²/(24 σ²) for each value, about 1e-4 here, and curvature
    torch.testing.assert_close(evidence.log_px, density, rtol=0, atol=5e-3)


@pytest.mark.parametrize(("shift", "widen"), [(0.0, 1.2), (0.3, 1.0), (-0.5, 0.6)])
def test_as_vae_s_deliberate_error_has_the_kl_it_says(shift, widen):
    fa, g = random_model(10, 4)
    x, _ = fa.sample(3, generator=g)
    q = fa.as_vae(shift=shift, widen=widen).posterior(x)
    assert isinstance(q, CholeskyNormal)
    kl = kl_divergence(MultivariateNormal(q.mean, scale_tril=q.scale_tril), fa.posterior(x))
    expected = torch.full((3,), fa.proposal_kl(shift, widen), dtype=torch.float64)
    torch.testing.assert_close(kl, expected, rtol=1e-9, atol=1e-10)
    ratio = q.variance.sqrt() / fa.posterior(x).variance.sqrt()
    torch.testing.assert_close(ratio, torch.full((3, 4), widen, dtype=torch.float64))


def test_as_vae_keeps_dtype_and_leaves_the_random_state_alone():
    fa, _ = random_model(4, 2)
    single = FactorAnalysis(fa.loc.float(), fa.weight.float(), fa.noise_variance.float())
    before = torch.random.get_rng_state()
    assert next(single.as_vae().parameters()).dtype == torch.float32
    assert torch.equal(before, torch.random.get_rng_state())


def test_as_vae_refuses_other_spaces_and_shapes():
    fa, _ = random_model(4, 2)
    with pytest.raises(ValueError, match=r"continuous and grey8; data.space is binary"):
        fa.as_vae("binary")
    with pytest.raises(ValueError, match=r"holds 6 values; this model has 4"):
        fa.as_vae(data_shape=(2, 3))


@pytest.mark.parametrize(
    ("loc", "weight", "noise", "message"),
    [
        ((3,), (4, 2), (3,), "D = 3 as loc"),
        ((3,), (3,), (3,), "takes loc"),
        ((3,), (3, 2), (2,), "takes loc"),
    ],
)
def test_shapes_are_checked(loc, weight, noise, message):
    with pytest.raises(ValueError, match=message):
        FactorAnalysis(torch.ones(loc), torch.ones(weight), torch.ones(noise))


def test_values_are_checked():
    one = torch.ones(2)
    with pytest.raises(ValueError, match="positive in every dimension; smallest found is -1"):
        FactorAnalysis(one, torch.ones(2, 1), torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="loc must be finite"):
        FactorAnalysis(one * math.inf, torch.ones(2, 1), one)
    fa = FactorAnalysis(one, torch.ones(2, 1), one)
    with pytest.raises(ValueError, match=r"2 values for each example; found \(5, 3\)"):
        fa.log_prob(torch.zeros(5, 3))


def test_a_fit_without_the_covariance_matrix_is_the_fit_with_it(monkeypatch):
    """Above `DENSE` values no D x D matrix exists; blocks of rows make no difference."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (70, 12), generator=g, dtype=torch.uint8)
    dense = FactorAnalysis.fit(x, 3, seed=1)
    monkeypatch.setattr("vae.evidence.factor_analysis.DENSE", 4)
    monkeypatch.setattr("vae.evidence.factor_analysis.BLOCK_VALUES", 100)
    streamed = FactorAnalysis.fit(x, 3, seed=1)
    for name in ("loc", "weight", "noise_variance"):
        torch.testing.assert_close(
            getattr(streamed, name), getattr(dense, name), rtol=1e-6, atol=1e-6
        )
    torch.testing.assert_close(streamed.log_prob(x), dense.log_prob(x), rtol=1e-9, atol=1e-9)
