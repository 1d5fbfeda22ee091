"""Sums over many data values: as exact without a gradient as with one."""

import math

import pytest
import torch
from scipy import stats
from torch.nn.functional import logsigmoid

from vae.models import LIKELIHOODS, BernoulliPixels
from vae.models.data_distributions import StableStudentT

D = 12_288


@pytest.mark.parametrize("size", [12_288, 196_608])
@pytest.mark.parametrize("logit", [1e-3, 1.0, 30.0, 200.0, 1e4])
@pytest.mark.parametrize("wrong", [0.0, 0.001, 0.5])
def test_bernoulli_sums_are_exact_with_and_without_a_gradient(size, logit, wrong):
    g = torch.Generator().manual_seed(0)
    x = (torch.rand(2, size, generator=g) < 0.5).float()
    flipped = torch.rand(2, size, generator=g) < wrong
    spread = 1 + 0.1 * torch.rand(2, size, generator=g)
    logits = logit * spread * torch.where(flipped, 1 - 2 * x, 2 * x - 1)
    exact = logsigmoid(logits.double() * (2 * x.double() - 1)).sum(-1)
    p = BernoulliPixels(logits, 1)
    with torch.no_grad():
        without = p.log_prob(x).double()
    with_one = p.log_prob(x).double()
    for found in (without, with_one):
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("space", ["binary", "grey8", "continuous"])
@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
def test_every_likelihood_sums_many_values_as_float64_does(space, name):
    kind = LIKELIHOODS[name]
    if space not in kind.spaces:
        pytest.skip("not of this space")
    torch.manual_seed(0)
    family = kind(space=space, data_shape=(D,))
    raw = torch.randn(2, family.outputs_per_value, D)
    if space == "continuous":
        x = 3 * torch.randn(2, D)
    else:
        x = torch.randint(0, 2 if space == "binary" else 256, (2, D)).float()
    loc, scale = torch.zeros(D).double(), torch.ones(D).double()
    with torch.no_grad():
        found = family(raw, loc, scale).log_prob(x).double()
        exact = family.double()(raw.double(), loc, scale).log_prob(x.double())
    with_gradient = kind(space=space, data_shape=(D,))(raw.requires_grad_(), loc, scale).log_prob(x)
    assert not math.isnan(exact.sum().item())
    torch.testing.assert_close(found, exact, rtol=2e-5, atol=1e-3)
    torch.testing.assert_close(with_gradient.detach().double(), found, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("value", [1e-3, 1.0, 1e9, 2.0**50, 1e18, 1e20, 1e30, 1e38])
@pytest.mark.parametrize("df", [1.0, 10.0, 1e4])
def test_the_tail_of_student_t_goes_on_where_a_square_overflows(value, df):
    x = torch.tensor([-value, value], requires_grad=True)
    one = torch.tensor(1.0)
    found = StableStudentT(df * one, 0 * one, one).log_prob(x)
    torch.testing.assert_close(
        found.detach().double(), torch.from_numpy(stats.t.logpdf(x.detach().double(), df)),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(found.sum(), x)
    exact = -(df + 1) * x.detach().double() / (df + x.detach().double().square())
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=0)
