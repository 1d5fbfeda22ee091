"""Compiled passes against the functions they are."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import softplus

from vae.fast.numba_kernels import kernels_for, signs_of

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_softplus_to_float32_s_own_rounding(dtype):
    logits = torch.linspace(-100, 100, 20_001).to(dtype).unsqueeze(1)
    kernels, bias = kernels_for(dtype, "tanh"), np.zeros(1, np.float32)
    for bit in (0.0, 1.0):
        found = kernels.bernoulli_log_prob(logits, bias, signs_of(torch.tensor([[bit]])))
        expected = -softplus((1 - 2 * bit) * logits.double()).squeeze(1)
        torch.testing.assert_close(found.double(), expected, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.49, 0.51, 0.75, 0.99])
def test_no_number_of_pixels_is_too_many(dtype, fraction):
    """Four have a product with a mantissa of 2^fraction: all of them are 2^300 or 2^-300."""
    logit = torch.tensor(2 ** (fraction / 4) - 1).log().to(dtype)
    columns = 4 * math.ceil(300 / min(fraction, 1 - fraction))
    found = kernels_for(dtype, "tanh").bernoulli_log_prob(
        logit.expand(2, columns).contiguous(),
        np.zeros(columns, np.float32),
        signs_of(torch.zeros(1, columns)),
    )
    expected = -columns * softplus(logit.double()).expand(2)
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=6e-8 * columns)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tanh_to_the_dtype_s_own_rounding(dtype):
    products = torch.linspace(-30, 30, 6001).to(dtype).unsqueeze(1)
    exact = (products.double() + 0.125).tanh()
    found = kernels_for(dtype, "tanh").activate_(products, np.full(1, 0.125, np.float32))
    assert found is products
    error = (found.double() - exact).abs()
    own = (exact.to(dtype).double() - exact).abs()
    assert (error <= own + 3e-7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_is_exact_but_for_ties(dtype):
    products = torch.linspace(-3, 3, 602).to(dtype).view(2, 301)
    bias = torch.linspace(-1, 1, 301).to(dtype)
    expected = (products.float() + bias.float()).relu().to(dtype)
    found = kernels_for(dtype, "relu").activate_(products, bias.float().numpy())
    ties = 2.0**-7 if dtype == torch.bfloat16 else 0.0  # away from 0, not to even
    torch.testing.assert_close(found, expected, rtol=ties, atol=0)
