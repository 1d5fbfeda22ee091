"""Functions that keep their digits where the textbook formula loses them.

Every function here is accurate in float32 and float64 over the whole range it documents, value and
gradient alike. The tests compare them with scipy and with arbitrary-precision references.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

_MINUS_ONE = torch.tensor(-1.0)
_SQRT_HALF = math.sqrt(0.5)
_SQRT_TWO_PI = math.sqrt(2 * math.pi)
LOG_SQRT_TWO_PI = 0.5 * math.log(2 * math.pi)
SOFTPLUS_IS_LINEAR = 40.0  # from here on, to the last digit of float64


def sum_softplus(t: Tensor, event_dims: int) -> Tensor:
    """Σ log(1 + exp t) over the last `event_dims` dimensions, without a gradient; may overwrite t.

    log(1 + exp t) = max(t, 0) - log σ(|t|), both of one sign, so nothing cancels. As σ(|t|) is at
    least 1/2, a hundred of them are multiplied before one logarithm is taken. The error is about
    1e-7 of the sum in float32. A GPU has time for logarithms, and none for more passes.
    """
    t = t.flatten(-event_dims)
    if t.is_cuda:
        return softplus(t, threshold=SOFTPLUS_IS_LINEAR).sum(-1)
    linear = t.clamp(min=0).sum(-1)
    factors = t.abs_().sigmoid_()
    whole = t.shape[-1] // 100 * 100
    parts = [factors[..., :whole].unflatten(-1, (-1, 100)).prod(-1)] if whole else []
    if whole < t.shape[-1]:
        parts.append(factors[..., whole:].prod(-1, keepdim=True))
    for part in parts:
        linear -= part.log_().sum(-1)
    return linear


def sum_event(values: Tensor, event_dims: int) -> Tensor:
    """Sum over the last `event_dims` dimensions: (*batch, *event) -> (*batch,)."""
    return values.flatten(-event_dims).sum(-1) if event_dims else values


def tanh_(x: Tensor) -> Tensor:
    """tanh(x), in place.

    On a CPU in float32 by way of 2 σ(2x) - 1: torch's sigmoid is four times as fast there as its
    tanh. The error is at most 2e-7, absolute: a hidden unit's, not that of a small number's digits.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu":
        return torch.add(_MINUS_ONE, x.mul_(2).sigmoid_(), alpha=2, out=x)
    return x.tanh_()


def inverse_softplus(y: Tensor) -> Tensor:
    """The x with softplus(x) = y, for y > 0; same shape."""
    return y + torch.log(-torch.expm1(-y))


# --- the exponential distribution truncated to [0, 1] -------------------------------------------


def truncated_exponential_mean(rate: Tensor) -> Tensor:
    """Mean of the density proportional to exp(-rate s) on [0, 1], for rate >= 0; same shape.

    1/rate - 1/(exp(rate) - 1), from its Bernoulli-number series below rate 1/2.
    """
    far, near = _split_at(rate, 0.5)
    s2 = near * near
    tail = 1 / 1209600 - s2 * (1 / 47900160 - s2 * (691 / 1307674368000))
    series = 0.5 - near * (1 / 12 - s2 * (1 / 720 - s2 * (1 / 30240 - s2 * tail)))
    return series + (1 / far - 1 / torch.expm1(far) - (2 - 1 / math.expm1(0.5)))


def truncated_exponential_variance(rate: Tensor) -> Tensor:
    """Variance of the density proportional to exp(-rate s) on [0, 1], for rate >= 0; same shape."""
    far = torch.where(rate < 0.5, 1.0, rate)
    direct = 1 / far.square() - torch.exp(-far) / torch.expm1(-far).square()
    s2 = rate.clamp(max=0.5).square()
    tail = 1 / 172800 - s2 * (1 / 5322240 - s2 * (691 / 118879488000 - s2 / 5748019200))
    series = 1 / 12 - s2 * (1 / 240 - s2 * (1 / 6048 - s2 * tail))
    return torch.where(rate < 0.5, series, direct)


def _split_at(x: Tensor, edge: float) -> tuple[Tensor, Tensor]:
    """(max(x, edge), min(x, edge)), with f(x) = g(max) + (h(min) - h(edge)) wherever g continues h.

    A branch for each side without torch.where, which on CPU costs as much as ten other operations.
    """
    return x.clamp(min=edge), x.clamp(max=edge)


class _LogTruncatedExponentialIntegral(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(rate: Tensor) -> Tensor:
        r = rate.clamp(min=torch.finfo(rate.dtype).tiny)
        return (torch.expm1(-r) / -r).log_()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        (rate,) = ctx.saved_tensors
        return -grads[0] * truncated_exponential_mean(rate)


def log_truncated_exponential_integral(rate: Tensor) -> Tensor:
    """log of the integral of exp(-rate s) over [0, 1], for rate >= 0; same shape.

    log((1 - exp(-rate)) / rate). The derivative, minus the mean, has a branch of its own: as
    a difference of two reciprocals it loses every digit near rate 0.
    """
    return _LogTruncatedExponentialIntegral.apply(rate)


# --- intervals of a standard distribution, seen from the mean ------------------------------------


@cache
def _mills_polynomial(degree: int) -> tuple[float, ...]:
    """Coefficients, highest first, of sqrt(2/pi) R(x) / t in 2t - 1, where t = 4 / (4 + x).

    R is Mills' ratio of the standard normal; interpolated at the Chebyshev nodes.
    """
    nodes = np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
    t = torch.from_numpy((nodes + 1) / 2)
    values = torch.special.erfcx(4 * (1 / t - 1) * _SQRT_HALF) / t
    fitted = np.polynomial.chebyshev.chebfit(nodes, values.numpy(), degree)
    return tuple(np.polynomial.chebyshev.cheb2poly(fitted)[::-1].tolist())


def _scaled_tail(x: Tensor) -> Tensor:
    """erfcx(x / sqrt(2)) for x >= 0, inf included: twice the normal tail times exp(x^2 / 2)."""
    if x.is_cuda:
        return torch.special.erfcx(x * _SQRT_HALF)
    # On CPU torch's is scalar code, five times as slow as this polynomial.
    first, *rest = _mills_polynomial(20 if x.dtype == torch.float64 else 9)
    t = 4 / (4 + x)
    w = 2 * t - 1
    value = torch.full_like(w, first)
    for coefficient in rest:
        value.mul_(w).add_(coefficient)
    return value.mul_(t)


class _LogNormalInterval(torch.autograd.Function):
    # log P = log g - max(a, 0)^2 / 2, where g = exp(max(a, 0)^2 / 2) P is the sum of what lies on
    # either side of the mean. The far side [start, start + d] is a difference of two scaled tails,
    # or the midpoint series in the Hermite polynomials where that difference would cancel.
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        start = a.clamp(min=0)
        near_side = torch.erf((start - a) * _SQRT_HALF)
        d = h + a.clamp(max=0)
        decay = torch.exp(-d * (start + 0.5 * d))
        g = _scaled_tail(start).sub_(_scaled_tail(start + d).mul_(decay))

        limit = 0.1 if a.dtype == torch.float64 else 0.5
        narrow = (d * start.clamp(min=1) < limit).to(a.dtype)
        d = d.clamp(max=1)
        w = d * d
        q = (w * (start + 0.5 * d).square_()).clamp_(max=1)
        series = (q - w) / 24 + (q * (q - 6 * w) + 3 * w * w) / 1920
        series += (q * (q * (q - 15 * w) + 45 * w * w) - 15 * w * w * w) / 322560
        midpoint = torch.exp(-0.5 * d * (start + 0.25 * d)).mul_(d * (2 / _SQRT_TWO_PI))
        g = torch.lerp(g, midpoint.mul_(series.add_(1)), narrow).add_(near_side).mul_(0.5)
        return torch.log(g).sub_(start.square_(), alpha=0.5), g

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, h, g = ctx.saved_tensors
        at_edge = torch.exp(-0.5 * a.clamp(max=0).square()) / (_SQRT_TWO_PI * g)
        exponent = -h * (a + 0.5 * h)
        grad = grads[0] * at_edge
        return grad * torch.expm1(exponent), grad * torch.exp(exponent)


def log_normal_interval(a: Tensor, h: Tensor) -> Tensor:
    """log probability that a standard normal lies in [a, a + h]; shapes broadcast.

    a: distance from the mean to the interval's nearer edge, negative when the mean is inside; so
    a >= -h/2. h: width, inf for a tail (then any a). Value and gradient keep their relative
    accuracy for the narrowest interval and the farthest, where the difference of two distribution
    functions has none.
    """
    a, h = torch.broadcast_tensors(a, h)
    return _LogNormalInterval.apply(a, h)[0]


class _LogLogisticInterval(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, h: Tensor) -> Tensor:
        below = a.abs().neg_().exp_().add_(1)
        above = (a + h).neg_().exp_().add_(1)
        log_mass = torch.expm1(-h).neg_().div_(below.mul_(above)).log_()
        return log_mass.sub_(a.clamp(min=0))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, h = ctx.saved_tensors
        beyond = torch.sigmoid(-a - h)
        grad_a = (beyond - torch.sigmoid(a)).mul_(grads[0])
        return grad_a, torch.expm1(h).reciprocal_().add_(beyond).mul_(grads[0])


def log_logistic_interval(a: Tensor, h: Tensor) -> Tensor:
    """log probability that a standard logistic lies in [a, a + h]; shapes broadcast.

    a >= -h/2 and h as in `log_normal_interval`. With b = a + h the probability is a product,
    sigmoid(b) sigmoid(-a) (1 - exp(-h)): nothing cancels.
    """
    a, h = torch.broadcast_tensors(a, h)
    return _LogLogisticInterval.apply(a, h)


# --- the gamma function -------------------------------------------------------------------------
#
# Gamma(y + 8) = y (y+1) … (y+7) Gamma(y), and from 8 up four terms of Stirling's series leave an
# error of 1e-11. torch's lgamma and digamma are scalar code on CPU; this is vectorised.

_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680)


def _rising_factors(y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four factors whose product is y (y+1) … (y+7)."""
    q = y * (y + 7)
    return q, q + 6, q + 10, q + 12


def _rising(y: Tensor) -> Tensor:
    q0, q1, q2, q3 = _rising_factors(y)
    return q0.mul_(q1).mul_(q2.mul_(q3))


def _stirling(y: Tensor) -> Tensor:
    """log Gamma(y + 8) + (y + 8) - log sqrt(2 pi)."""
    z = y + 8
    r = z.reciprocal()
    r2 = r * r
    series = r2 * _STIRLING[3]
    for coefficient in _STIRLING[2:0:-1]:
        series.add_(coefficient).mul_(r2)
    return (z - 0.5).mul_(z.log_()).add_(series.add_(_STIRLING[0]).mul_(r))


def _digamma(y: Tensor) -> Tensor:
    if y.is_cuda:
        return torch.digamma(y)
    z = y + 8
    r = z.reciprocal()
    r2 = r * r
    series = r2 * (7 * _STIRLING[3])
    for i in (2, 1, 0):
        series.add_((2 * i + 1) * _STIRLING[i]).mul_(r2)
    q0, q1, q2, q3 = _rising_factors(y)
    shift = q0.reciprocal_().add_(q1.reciprocal_()).add_(q2.reciprocal_()).add_(q3.reciprocal_())
    return z.log_().sub_(r, alpha=0.5).sub_(series).sub_(shift.mul_(2 * y + 7))


class _LogBeta(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        total = a + b
        if a.is_cuda:
            return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(total)
        shift = _rising(total).div_(_rising(a).mul_(_rising(b))).log_()
        smooth = _stirling(a).add_(_stirling(b)).sub_(_stirling(total))
        return smooth.add_(shift).add_(LOG_SQRT_TWO_PI - 8)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        both = _digamma(a + b)
        return (_digamma(a) - both).mul_(grads[0]), (_digamma(b) - both).mul_(grads[0])


def log_beta(a: Tensor, b: Tensor) -> Tensor:
    """log of the beta function for a, b in (1e-30, 1e12), float64; shapes broadcast."""
    a, b = torch.broadcast_tensors(a, b)
    return _LogBeta.apply(a, b)


def log_gamma_half_step(a: Tensor) -> Tensor:
    """log Gamma(a + 1/2) - log Gamma(a) - log(a)/2 for a > 0; same shape.

    The normaliser of Student's t: it tends to 0, while the two log Gamma grow without bound. The
    asymptotic series (Tricomi and Erdelyi 1951) at a + 8, brought back by the recurrence.
    """
    r = 1 / (a + 8)
    r2 = r * r
    tail = 17 / 14336 - r2 * (31 / 18432 - r2 * (691 / 180224 - r2 * (5461 / 425984)))
    series = -r * (1 / 8 - r2 * (1 / 192 - r2 * (1 / 640 - r2 * tail)))
    upper, lower = _rising_factors(a + 0.5), _rising_factors(a)
    ratios = [(high - low) / low for high, low in zip(upper, lower, strict=True)]
    shift = sum(torch.log1p(ratio) for ratio in ratios)
    return series + 0.5 * torch.log1p(8 / a) - shift


# --- random numbers -----------------------------------------------------------------------------


@contextmanager
def drawing_from(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Make torch's global random numbers follow `generator` inside the block (None: as they are).

    torch.distributions draws from the global generator only; this seeds it from one number of
    `generator`, and puts its state back afterwards.
    """
    if generator is None:
        yield
        return
    seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(seed))
        yield
