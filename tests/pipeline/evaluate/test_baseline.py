"""Baselines against scikit-learn, closed forms and enumeration."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.decomposition import FactorAnalysis as SklearnFactorAnalysis

from pipeline.evaluate import BernoulliMixture, fit_baselines, independent_bernoulli

LOADINGS = torch.tensor([[3.0, 0.0], [2.0, 1.0], [0.5, -2.0], [0.0, 1.5], [1.0, 1.0], [0.2, 0.0]])


def table(count: int, seed: int) -> torch.Tensor:
    """Linear-Gaussian rows of two factors, in columns of very different units."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    scale = torch.tensor([1.0, 100.0, 0.01, 5.0, 1.0, 30.0], dtype=torch.float64)
    return 7.0 + (z @ LOADINGS.double().T + noise) * scale


def scored(train, valid, test, space, **changes):
    settings = {"latent_dim": 2, "min_scale": 1e-3, "num_samples": 50, "seed": 0} | changes
    return fit_baselines(train, valid, test, space=space, **settings)


def test_continuous_baseline_equals_scikit_learn_in_raw_units():
    train, valid, test = table(2000, 0), table(300, 1), table(300, 2)
    (found,) = scored(train, valid, test, "continuous")
    scale = train.std(0, correction=0).numpy()  # scikit-learn needs columns of one size
    oracle = SklearnFactorAnalysis(2, tol=1e-10, max_iter=20000, svd_method="lapack")
    oracle.fit(train.numpy() / scale)
    expected = oracle.score_samples(test.numpy() / scale) - np.log(scale).sum()
    np.testing.assert_allclose(found.log_px.numpy(), expected, atol=0.02)


def test_more_factors_than_columns_are_capped():
    train, valid, test = table(200, 0), table(50, 1), table(50, 2)
    (found,) = scored(train, valid, test, "continuous", latent_dim=64)
    assert found.name == "factor analysis with 5 factors"


def grey(x: torch.Tensor) -> torch.Tensor:
    """The same rows as wide grey levels: a bin is narrow beside the noise."""
    unit = (x - 7.0) / torch.tensor([1.0, 100.0, 0.01, 5.0, 1.0, 30.0], dtype=torch.float64)
    return (128 + 12 * unit).round().clamp(0, 255).to(torch.uint8)


def test_grey_baseline_is_the_mass_of_a_bin():
    """Where the density is smooth over a bin, the mass is density times width."""
    train, valid, test = grey(table(3000, 0)), grey(table(300, 1)), grey(table(100, 2))
    inside = ((test > 0) & (test < 255)).all(1)
    (found,) = scored(train, valid, test, "grey8", min_scale=1e-4)
    y = (train.double() + 0.5) / 256
    oracle = SklearnFactorAnalysis(2, tol=1e-8, max_iter=5000, svd_method="lapack").fit(y.numpy())
    density = oracle.score_samples(((test.double() + 0.5) / 256).numpy())
    expected = density - 6 * math.log(256)
    difference = (found.log_px.numpy() - expected)[inside]
    assert abs(difference.mean()) < 0.02  # the two fits stop at slightly different places
    assert np.abs(difference).max() < 0.5


def test_one_bright_pixel_does_not_ruin_the_grey_baseline():
    """A pixel that is constant in training and not in validation and test: the floor is raised."""
    train, valid, test = grey(table(500, 0)), grey(table(200, 1)), grey(table(100, 2))
    train[:, 5] = 0
    valid[:, 5] = 0
    test[:, 5] = 0
    valid[:20, 5] = 200
    test[0, 5] = 200
    (found,) = scored(train, valid, test, "grey8")
    with_lowest_floor = stats.norm.logpdf(200.5 / 256, 0.5 / 256, 1e-3)
    assert found.log_px[0].item() > -200 > with_lowest_floor


def test_independent_bernoulli_is_laplace_smoothed():
    model = independent_bernoulli(torch.tensor([0.0, 0.5, 1.0]), 8)
    expected = math.log(1 / 10) + math.log(0.5) + math.log(9 / 10)
    assert model.log_prob(torch.tensor([[1.0, 0.0, 1.0]])).item() == pytest.approx(expected)


def two_clusters(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    prob = torch.tensor([[0.9, 0.8, 0.1, 0.2, 0.5], [0.1, 0.2, 0.9, 0.7, 0.5]])
    which = (torch.rand(count, generator=generator) < 0.3).long()
    return (torch.rand(count, 5, generator=generator) < prob[which]).float()


def test_mixture_sums_to_one_over_all_vectors():
    model = BernoulliMixture.fit(two_clusters(500, 0), 3, seed=0)
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=5)))
    assert model.log_prob(every).exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_mixture_finds_the_clusters_that_made_the_data():
    model = BernoulliMixture.fit(two_clusters(20_000, 0), 2, seed=1, tol=1e-6, max_iter=2000)
    order = model.log_weight.argsort()
    np.testing.assert_allclose(model.log_weight[order].exp(), [0.3, 0.7], atol=0.03)
    prob = torch.sigmoid(model.logits[order])
    np.testing.assert_allclose(prob[0], [0.1, 0.2, 0.9, 0.7, 0.5], atol=0.04)
    np.testing.assert_allclose(prob[1], [0.9, 0.8, 0.1, 0.2, 0.5], atol=0.04)


def test_em_never_lowers_the_penalised_likelihood():
    """Each step raises log-likelihood plus the log of the Beta(2, 2) and Dirichlet(2) priors."""
    x = two_clusters(300, 3)
    scores = []
    for steps in range(1, 12):
        model = BernoulliMixture.fit(x, 4, seed=2, max_iter=steps, tol=-math.inf)
        prob = torch.sigmoid(model.logits.double())
        prior = (prob.log() + (1 - prob).log()).sum() + model.log_weight.double().sum()
        scores.append((model.log_prob(x).double().sum() + prior).item())
    assert np.all(np.diff(scores) > -1e-3)
    assert scores[-1] > scores[0] + 1


def test_binary_baselines_the_stronger_first():
    train, valid, test = two_clusters(2000, 0), two_clusters(300, 1), two_clusters(300, 2)
    found = scored(train, valid, test, "binary")
    means = [baseline.log_px.mean().item() for baseline in found]
    assert "mixture" in found[0].name
    assert means[0] > means[1] + 0.3
    # independent values: N ln p with the smoothed frequencies, written out
    prob = (train.double().sum(0) + 1) / (len(train) + 2)
    expected = (test.double() * prob.log() + (1 - test.double()) * (1 - prob).log()).sum(1)
    np.testing.assert_allclose(found[1].log_px, expected, atol=1e-4)


def test_dynamic_binarisation_takes_grey_training_data():
    """Grey 255 p gives the same frequencies as Bernoulli(p) data would."""
    grey_train = torch.full((400, 3), 51, dtype=torch.uint8)  # p = 0.2
    x = torch.tensor([[0, 0, 0], [1, 0, 0]], dtype=torch.uint8)
    found = scored(grey_train, x, x, "binary", binarize=True)
    independent = next(b for b in found if "independent" in b.name)
    p = (0.2 * 400 + 1) / 402
    expected = [3 * math.log(1 - p), math.log(p) + 2 * math.log(1 - p)]
    np.testing.assert_allclose(independent.log_px, expected, atol=1e-5)


@pytest.mark.slow
def test_large_pictures_fit_in_little_memory():
    """192 x 192 RGB, whose covariance would take 98 GB, in 5 GB of address space."""
    program = """
import resource, torch
torch.set_num_threads(1)
from pipeline.evaluate import fit_baselines
torch.ones(1).exp()
resource.setrlimit(resource.RLIMIT_AS, (5 << 30, 5 << 30))
g = torch.Generator().manual_seed(0)
x = torch.randint(0, 256, (40, 3, 192, 192), generator=g, dtype=torch.uint8)
found = fit_baselines(x[:30], x[30:35], x[35:], space="grey8", latent_dim=4, min_scale=1e-3,
                      num_samples=10, seed=0)
print(found[0].log_px.isfinite().all().item())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("size", [784, 196_608])
@pytest.mark.parametrize("low", [0.0, 0.98])
def test_bernoulli_baselines_sum_many_values_in_float64(size, low):
    g = torch.Generator().manual_seed(0)
    mean = low + 0.02 * torch.rand(size, generator=g, dtype=torch.float64)
    x = (torch.rand(20, size, generator=g) < mean).float()
    prob = (2000 * mean + 1) / 2002
    exact = (x * prob.log() + (1 - x) * (1 - prob).log()).sum(1)
    torch.testing.assert_close(
        independent_bernoulli(mean, 2000).log_prob(x), exact, rtol=0, atol=1e-4
    )
