"""The stable helpers against arbitrary precision, in float32 and float64."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.special
import torch

from vae.models import numerics

TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-12}
DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def _many_digits():
    with mpmath.workdps(50):
        yield


def _relative(found: torch.Tensor, expected: list, floor: float) -> float:
    return max(
        float(abs(f - e) / max(abs(e), floor))
        for f, e in zip(found.tolist(), expected, strict=True)
    )


def _intervals(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances and widths across every branch: mean inside, near, far; narrow, wide, infinite."""
    rng = np.random.default_rng(0)
    width = 10 ** rng.uniform(-5, 2.5, 600)
    distance = np.concatenate(
        [
            rng.uniform(-0.5, 0, 200) * width[:200],
            10 ** rng.uniform(-4, 3, 200),
            rng.uniform(0.05, 0.6, 200) / width[400:],
        ]
    )
    width = np.append(width, [np.inf] * 4)
    distance = np.append(distance, [-30.0, -0.5, 0.0, 40.0])
    return torch.tensor(distance, dtype=dtype), torch.tensor(width, dtype=dtype)


def _tail(x: Any) -> Any:
    return mpmath.erfc(x / mpmath.sqrt(2)) / 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_normal_interval_and_its_gradient_equal_arbitrary_precision(dtype):
    a, h = _intervals(dtype)
    a, h = a.requires_grad_(), h.requires_grad_()
    found = numerics.log_normal_interval(a, h)
    grad_a, grad_h = torch.autograd.grad(found.sum(), (a, h))
    value, by_a, by_h = [], [], []
    for low, width in zip(a.tolist(), h.tolist(), strict=True):
        high = mpmath.mpf(low) + width
        mass = _tail(mpmath.mpf(low)) - (0 if math.isinf(width) else _tail(high))
        at_high = mpmath.mpf(0) if math.isinf(width) else mpmath.npdf(high)
        value.append(mpmath.log(mass))
        by_a.append((at_high - mpmath.npdf(low)) / mass)
        by_h.append(at_high / mass)
    assert _relative(found.detach(), value, 1.0) < TOLERANCE[dtype]
    assert _relative(grad_a, by_a, 1e-3) < TOLERANCE[dtype]
    assert _relative(grad_h, by_h, 1e-3) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_logistic_interval_and_its_gradient_equal_arbitrary_precision(dtype):
    a, h = _intervals(dtype)
    a, h = a.requires_grad_(), h.requires_grad_()
    found = numerics.log_logistic_interval(a, h)
    grad_a, grad_h = torch.autograd.grad(found.sum(), (a, h))
    value, by_a, by_h = [], [], []
    for low, width in zip(a.tolist(), h.tolist(), strict=True):
        below = 1 / (1 + mpmath.exp(low))
        above = (
            mpmath.mpf(0) if math.isinf(width) else 1 / (1 + mpmath.exp(mpmath.mpf(low) + width))
        )
        value.append(mpmath.log(below - above))
        by_a.append((above * (1 - above) - below * (1 - below)) / (below - above))
        by_h.append(above * (1 - above) / (below - above))
    assert _relative(found.detach(), value, 1.0) < TOLERANCE[dtype]
    assert _relative(grad_a, by_a, 0.1) < TOLERANCE[dtype]
    assert _relative(grad_h, by_h, 1e-2) < TOLERANCE[dtype]


@pytest.mark.parametrize("interval", [numerics.log_normal_interval, numerics.log_logistic_interval])
def test_intervals_far_beyond_float_range_stay_finite(interval):
    a = torch.tensor([1e9, 1e4, 0.0, -1e3], requires_grad=True)
    h = torch.tensor([1e-8, 39.0, 1e-8, 1e4], requires_grad=True)
    value = interval(a, h)
    grads = torch.autograd.grad(value.sum(), (a, h))
    assert all(t.isfinite().all() for t in (value, *grads))
    assert value[3].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_truncated_exponential_equals_arbitrary_precision(dtype):
    rates = np.append(np.logspace(-8, 3, 500), [0.4999, 0.5, 0.5001])
    rate = torch.tensor(rates, dtype=dtype, requires_grad=True)
    log_integral = numerics.log_truncated_exponential_integral(rate)
    (slope,) = torch.autograd.grad(log_integral.sum(), rate)
    exact = [mpmath.mpf(r) for r in rate.tolist()]
    mean = [1 / r - 1 / mpmath.expm1(r) for r in exact]
    variance = [1 / r**2 - mpmath.exp(-r) / mpmath.expm1(-r) ** 2 for r in exact]
    tolerance = TOLERANCE[dtype]
    log_exact = [mpmath.log(-mpmath.expm1(-r) / r) for r in exact]
    assert _relative(log_integral.detach(), log_exact, 1.0) < tolerance
    assert _relative(-slope, mean, 0.1) < tolerance
    assert _relative(numerics.truncated_exponential_mean(rate.detach()), mean, 0.1) < tolerance
    found = numerics.truncated_exponential_variance(rate.detach())
    assert _relative(found, variance, 0.01) < 10 * tolerance


def test_truncated_exponential_at_rate_zero_is_uniform():
    rate = torch.zeros(1, requires_grad=True)
    value = numerics.log_truncated_exponential_integral(rate)
    (slope,) = torch.autograd.grad(value.sum(), rate)
    assert value.item() == 0
    assert slope.item() == pytest.approx(-0.5, abs=1e-6)
    assert numerics.truncated_exponential_variance(rate.detach()).item() == pytest.approx(1 / 12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_gamma_half_step_equals_arbitrary_precision(dtype):
    a = torch.logspace(-6, 6, 300, dtype=dtype, requires_grad=True)
    found = numerics.log_gamma_half_step(a)
    (slope,) = torch.autograd.grad(found.sum(), a)
    exact = [mpmath.mpf(v) for v in a.tolist()]
    value = [mpmath.loggamma(v + 0.5) - mpmath.loggamma(v) - mpmath.log(v) / 2 for v in exact]
    by_a = [mpmath.digamma(v + 0.5) - mpmath.digamma(v) - 1 / (2 * v) for v in exact]
    assert _relative(found.detach(), value, 1.0) < TOLERANCE[dtype]
    assert _relative(slope, by_a, 1.0) < TOLERANCE[dtype]


def test_log_beta_and_its_gradient_equal_scipy():
    rng = np.random.default_rng(1)
    a, b = 10 ** rng.uniform(-6, 4, (2, 2000))
    found = numerics.log_beta(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(found, scipy.special.betaln(a, b), rtol=1e-12, atol=1e-9)
    both = [torch.from_numpy(v).requires_grad_() for v in (a, b)]
    for grad, v in zip(
        torch.autograd.grad(numerics.log_beta(*both).sum(), both), (a, b), strict=True
    ):
        expected = scipy.special.digamma(v) - scipy.special.digamma(a + b)
        np.testing.assert_allclose(grad, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inverse_softplus_inverts_softplus(dtype):
    y = torch.logspace(-8, 3, 200, dtype=dtype)
    back = torch.nn.functional.softplus(numerics.inverse_softplus(y))
    torch.testing.assert_close(back, y, rtol=1e-5 if dtype == torch.float32 else 2e-10, atol=0)


def test_drawing_from_a_generator_repeats_and_leaves_the_global_generator_alone():
    device = torch.device("cpu")
    before = torch.get_rng_state()
    draws = []
    for seed in (7, 7, 8):
        with numerics.drawing_from(torch.Generator().manual_seed(seed), device):
            draws.append(torch.rand(5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 99, 100, 101, 784])
def test_softplus_summed_by_products_equals_one_by_one(size, dtype):
    g = torch.Generator().manual_seed(size)
    t = torch.randn(50, size, generator=g, dtype=torch.float64)
    t = (t * 10 ** (5 * torch.rand(50, 1, generator=g, dtype=torch.float64) - 2)).clamp(-1e3, 1e3)
    expected = -torch.nn.functional.logsigmoid(-t).sum(-1)
    found = numerics.sum_softplus(t.to(dtype), 1).double()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * size)


def test_summed_softplus_of_images_and_of_extremes():
    t = torch.tensor([[1e3, -1e3], [0.0, 88.0]]).expand(7, 2, 2)
    found = numerics.sum_softplus(t.clone(), 2)
    torch.testing.assert_close(found, torch.full((7,), 1e3 + 88 + math.log(2)))
