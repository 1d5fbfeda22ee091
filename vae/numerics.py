"""Functions that keep their digits where the textbook formula loses them.

Every function here is accurate in float32 and float64 over the whole range it documents, value and
gradient alike. The tests compare them with scipy and with arbitrary-precision references.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_SQRT_HALF = math.sqrt(0.5)
_SQRT_TWO_PI = math.sqrt(2 * math.pi)
LOG_SQRT_TWO_PI = 0.5 * math.log(2 * math.pi)


def sum_event(values: Tensor, event_dims: int) -> Tensor:
    """Sum over the last `event_dims` dimensions: (*batch, *event) -> (*batch,)."""
    return values.flatten(-event_dims).sum(-1) if event_dims else values


def inverse_softplus(y: Tensor) -> Tensor:
    """The x with softplus(x) = y, for y > 0; same shape."""
    return y + torch.log(-torch.expm1(-y))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(-x)) for x > 0; same shape."""
    return torch.log(-torch.expm1(-x))


# --- the exponential distribution truncated to [0, 1] -------------------------------------------


def truncated_exponential_mean(rate: Tensor) -> Tensor:
    """Mean of the density proportional to exp(-rate s) on [0, 1], for rate >= 0; same shape.

    1/rate - 1/(exp(rate) - 1), from its Bernoulli-number series below rate 0.1.
    """
    r = rate.clamp(min=0.1)
    direct = 1 / r - 1 / torch.expm1(r)
    s = rate.clamp(max=0.1)
    s2 = s * s
    series = 0.5 - s * (1 / 12 - s2 * (1 / 720 - s2 * (1 / 30240 - s2 / 1209600)))
    return torch.where(rate < 0.1, series, direct)


def truncated_exponential_variance(rate: Tensor) -> Tensor:
    """Variance of the density proportional to exp(-rate s) on [0, 1], for rate >= 0; same shape."""
    r = rate.clamp(min=0.5)
    decay = torch.exp(-r)
    direct = 1 / r.square() - decay / (1 - decay).square()
    s2 = rate.clamp(max=0.5).square()
    series = 1 / 12 - s2 * (1 / 240 - s2 * (1 / 6048 - s2 * (1 / 172800 - s2 / 5322240)))
    return torch.where(rate < 0.5, series, direct)


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


# --- the standard normal ------------------------------------------------------------------------


class _LogNormalInterval(torch.autograd.Function):
    # With g = exp(max(a, 0)^2 / 2) P([a, a + h]), log P = log g - max(a, 0)^2 / 2. Three branches:
    # the mean inside the interval (a sum of two erf), a narrow interval (midpoint series in the
    # Hermite polynomials), and the rest (a difference of two scaled erfc).
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        middle = a + 0.5 * h
        scaled = a * _SQRT_HALF
        far = (a + h) * _SQRT_HALF
        decay = torch.exp(-h * middle)
        outside = torch.special.erfcx(scaled) - torch.special.erfcx(far).mul_(decay)
        inside = torch.erf(far) - torch.erf(scaled)
        w = h * h
        q = w * (middle * middle)
        series = (q - w) / 24 + (q * (q - 6 * w) + 3 * w * w) / 1920
        series += (q * (q * (q - 15 * w) + 45 * w * w) - 15 * w * w * w) / 322560
        narrow = (1 + series) * torch.exp(-0.5 * h * (a + 0.25 * h)) * (h * (2 / _SQRT_TWO_PI))
        g = torch.where(h * a.clamp(min=1) < 0.1, narrow, outside)
        g = torch.where(a < 0, inside, g).mul_(0.5)
        return torch.log(g).sub_(a.clamp(min=0).square_(), alpha=0.5), g

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, h, g = ctx.saved_tensors
        near_edge = torch.exp(-0.5 * a.clamp(max=0).square()) / (_SQRT_TWO_PI * g)
        exponent = -h * (a + 0.5 * h)
        grad = grads[0] * near_edge
        return grad * torch.expm1(exponent), grad * torch.exp(exponent)


def log_normal_interval(a: Tensor, h: Tensor) -> Tensor:
    """log probability that a standard normal lies in [a, a + h]; shapes broadcast.

    a: distance from the mean to the interval's nearer edge, negative when the mean is inside; so
    a >= -h/2. h: width, may be inf (then any a). Relative error of the probability about ten
    units in the last place down to widths of 1e-8 and out to |a| = 1e18 in float32.
    """
    a, h = torch.broadcast_tensors(a, h)
    return _LogNormalInterval.apply(a, h)[0]


# --- the gamma function -------------------------------------------------------------------------


def log_gamma_half_step(a: Tensor) -> Tensor:
    """log Gamma(a + 1/2) - log Gamma(a) - log(a)/2 for a > 0; same shape.

    The normaliser of Student's t: it tends to 0, while the two log Gamma grow without bound.
    Asymptotic series above a = 8 (Tricomi and Erdelyi 1951).
    """
    small = a.clamp(max=8)
    direct = torch.lgamma(small + 0.5) - torch.lgamma(small) - 0.5 * torch.log(small)
    r = 1 / a.clamp(min=8)
    r2 = r * r
    tail = 17 / 14336 - r2 * (31 / 18432 - r2 * (691 / 180224 - r2 * (5461 / 425984)))
    series = -r * (1 / 8 - r2 * (1 / 192 - r2 * (1 / 640 - r2 * tail)))
    return torch.where(a < 8, direct, series)


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
