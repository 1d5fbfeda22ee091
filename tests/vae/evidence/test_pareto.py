"""The Pareto fit against arviz-stats', and on quantiles whose shape is known."""

import math

import numpy as np
import pytest
import torch
from arviz_stats.base.array import BaseArray
from scipy import stats

from vae.evidence import WeightStream, pareto_shape, pareto_unit


@pytest.mark.parametrize("M", [5, 6, 12, 20, 94, 212, 1000])
def test_all_examples_at_once_are_as_arviz_fits_each(M):
    rng = np.random.default_rng(M)
    shapes = rng.uniform(-0.5, 1.5, 50)
    excess = np.sort(stats.genpareto.rvs(shapes[:, None], size=(50, M), random_state=rng))
    excess *= 10.0 ** rng.integers(-9, 9, (50, 1))
    found = pareto_shape(torch.from_numpy(excess))
    expected = [BaseArray()._gpdfit(row)[0] for row in excess]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [-0.4, 0.0, 0.3, 0.7, 1.2])
def test_the_shape_of_exact_quantiles_is_found(shape):
    M = 20_000
    excess = stats.genpareto.ppf((np.arange(M) + 0.5) / M, shape)[None]
    assert pareto_shape(torch.from_numpy(excess)).item() == pytest.approx(shape, abs=0.02)


@pytest.mark.parametrize("M", [45, 94, 100, 110, 120, 700])
def test_ties_above_the_threshold_are_a_tail_without_weight(M):
    """Equal values have no finite likeliest shape: far below 0. At 100 one candidate is 0."""
    assert pareto_shape(torch.ones(1, M, dtype=torch.float64)).item() < -3


def test_the_unit_is_about_the_first_quartile():
    assert [pareto_unit(M) for M in (5, 6, 10, 100)] == [0, 1, 2, 24]


@pytest.mark.parametrize("size", [1e8, 1e17])
def test_weights_that_rounding_alone_makes_equal_are_not_trusted(size):
    """Of an example so far out that its log weights have no digit left for their differences."""
    log_w = torch.full((1000, 3), -size) * torch.tensor([1.0, 1.0, 1e-12])
    stream = WeightStream(
        1000, 3, resolution=torch.finfo(torch.float32).eps, device=torch.device("cpu")
    )
    stream.add(log_w, log_w)
    evidence = stream.evidence()
    assert evidence.khat[:2].tolist() == [math.inf, math.inf]
    assert evidence.trustworthy.tolist() == [False, False, True]
