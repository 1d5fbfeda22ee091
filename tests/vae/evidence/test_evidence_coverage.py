"""Standard errors over many repetitions, and proposals that khat trusts up to image size."""

import math

import pytest
import torch

from vae.evidence import FactorAnalysis, annealed_importance_sampling, importance_sampling


def random_model(D, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = {"generator": g, "dtype": torch.float64}
    weight = torch.randn(D, d, **draw) / math.sqrt(d)
    return FactorAnalysis(torch.randn(D, **draw), weight, 0.2 + torch.randn(D, **draw).square()), g


def test_annealing_s_95_percent_interval_covers_95_percent_of_1000_repetitions():
    fa, g = random_model(6, 4)
    x, _ = fa.sample(1, generator=g)
    evidence = annealed_importance_sampling(
        fa.as_vae(shift=0.2, widen=1.2),
        x.expand(1000, 6),
        100,
        num_temperatures=4,
        num_leapfrog=3,
        generator=g,
    )
    error = (evidence.log_px - fa.log_prob(x)).abs()
    assert 0.93 <= (error < 1.959964 * evidence.se).double().mean() <= 0.97
    assert (error < evidence.se).double().mean() < 0.75  # nor is it too wide


@pytest.mark.parametrize(
    ("D", "d", "B", "K"),
    [
        (1, 1, 8, 1000),
        (16, 16, 8, 4000),
        pytest.param(784, 8, 8, 2000, marks=pytest.mark.slow),
        pytest.param(784, 32, 4, 20_000, marks=pytest.mark.slow),
        pytest.param(64, 64, 8, 200_000, marks=pytest.mark.slow),
        pytest.param(784, 64, 2, 200_000, marks=pytest.mark.slow),
    ],
)
def test_a_shifted_and_widened_proposal_is_trusted_and_right(D, d, B, K):
    """Its weights are bounded, but in 64 dimensions it takes many samples for khat to show it."""
    fa, g = random_model(D, d)
    x, _ = fa.sample(B, generator=g)
    evidence = importance_sampling(fa.as_vae(shift=0.02, widen=1.2), x, K, generator=g)
    assert evidence.ess.min() >= 200
    assert evidence.khat.max() < 0.5
    assert ((evidence.log_px - fa.log_prob(x)).abs() < 4 * evidence.se).all()
