"""The families p(x|z) is chosen from: torch Distributions over whole images or table rows.

Each is a product over data values: parameters (*batch, *event), `log_prob` (*batch,) in nats, a sum
over the event. Values, means and samples are in data units: 0/1, grey levels 0…255, or raw.

Grey levels: level x is the bin [x/256, (x+1)/256) of the unit interval. `loc` and `scale` of these
families are on the unit interval, where 1 is 256 levels.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Chi2, Distribution, Gamma, Laplace, Normal, StudentT, constraints
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax, logsigmoid

from vae.models.numerics import (
    LOG_SQRT_TWO_PI,
    drawing_from,
    log_beta,
    log_gamma_half_step,
    log_logistic_interval,
    log_normal_interval,
    log_truncated_exponential_integral,
    sum_event,
    sum_softplus,
    truncated_exponential_mean,
    truncated_exponential_variance,
)

LEVELS = 256
FAR = 2.0**50  # beyond, 1 + y² / df is y² / df, and y² still no overflow in float32
LOG_LEVELS = math.log(LEVELS)


class Factorised(Distribution):
    """p(x) = prod_d p(x_d). A family gives `values_log_prob` and `_draw`, per data value.

    parameter: any parameter of full shape (*batch, *event); it sets dtype and device.
    """

    value_support: ClassVar[constraints.Constraint] = constraints.real

    def __init__(self, parameter: Tensor, event_dims: int, *, validate_args: bool = False) -> None:
        split = parameter.dim() - event_dims
        self._like = parameter
        super().__init__(parameter.shape[:split], parameter.shape[split:], validate_args)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        return {}

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(self.value_support, len(self.event_shape))

    @abstractmethod
    def values_log_prob(self, x: Tensor) -> Tensor:
        """log p(x_d) of every value, in nats: (*batch, *event); x floating, in data units."""

    @abstractmethod
    def _draw(self, sample_shape: torch.Size) -> Tensor:
        """Values of shape sample_shape + batch + event, in data units."""

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x) in nats, (*batch,). value: any numeric dtype, data units, broadcastable."""
        if self._validate_args:
            self._validate_sample(value)
        x = value.to(device=self._like.device, dtype=self._like.dtype)
        return sum_event(self.values_log_prob(x), len(self.event_shape))

    def sample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        """x in data units, sample_shape + batch + event; from torch's global generator if None."""
        with torch.no_grad(), drawing_from(generator, self._like.device):
            return self._draw(torch.Size(sample_shape))

    def _uniform(self, sample_shape: torch.Size) -> Tensor:
        # Centred between the representable steps: never 0 or 1, so every quantile is finite.
        eps = torch.finfo(self._like.dtype).eps
        u = torch.rand(
            self._extended_shape(sample_shape), dtype=self._like.dtype, device=self._like.device
        )
        return u * (1 - eps) + eps / 2


class Standardised(Factorised):
    """A product of torch's univariate `standard`, a family with a location, over data values.

    x = loc + scale * y, and y has the distribution `standard`: p(x) = p(y) / scale. loc, scale:
    event shape, float64, so that neither a far location nor a unit of 1e-30 or 1e30 costs digits
    or overflows; y and all that depends on parameters have the dtype of `standard`. Means,
    variances and samples are in the units of x, float64.
    """

    def __init__(
        self,
        standard: Normal | Laplace | StudentT,
        loc: Tensor,
        scale: Tensor,
        event_dims: int,
        *,
        validate_args: bool = False,
    ) -> None:
        self.standard, self.loc, self.scale = standard, loc, scale
        super().__init__(standard.loc, event_dims, validate_args=validate_args)

    @property
    def base(self) -> Normal | Laplace | StudentT:
        """The univariate family in the units of x, (*batch, *event)."""
        loc = self.loc + self.scale * self.standard.loc
        scale = self.scale * self.standard.scale
        if isinstance(self.standard, StudentT):
            return StableStudentT(self.standard.df.to(scale), loc, scale)
        return type(self.standard)(loc, scale, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        return self.loc + self.scale * self.standard.mean

    @property
    def variance(self) -> Tensor:
        return self.scale.square() * self.standard.variance

    def values_log_prob(self, x: Tensor) -> Tensor:
        y = ((x.to(self.loc) - self.loc) / self.scale).to(self._like.dtype)
        return self.standard.log_prob(y) - self.scale.log().to(self._like.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return sum_event(self.values_log_prob(value), len(self.event_shape))

    def _draw(self, sample_shape: torch.Size) -> Tensor:
        return self.loc + self.scale * self.standard.sample(sample_shape)


def bernoulli_log_prob(logits: Tensor, x: Tensor, event_dims: int) -> Tensor:
    """Σ log p(x) of x = 1 with probability σ(logits), else 0, in nats, without a gradient.

    logits, x: (*batch, *event), broadcastable, float32 or float64. Returns (*batch,).
    """
    return -sum_softplus(torch.addcmul(logits, logits, x, value=-2), event_dims)


class BernoulliPixels(Factorised):
    """x_d = 1 with probability sigmoid(logits), else 0. logits: (*batch, *event)."""

    value_support = constraints.boolean

    def __init__(self, logits: Tensor, event_dims: int, *, validate_args: bool = False) -> None:
        self.logits = logits
        super().__init__(logits, event_dims, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(self.logits)

    @property
    def variance(self) -> Tensor:
        return torch.sigmoid(self.logits) * torch.sigmoid(-self.logits)

    def values_log_prob(self, x: Tensor) -> Tensor:
        return logsigmoid(self.logits * (2 * x - 1))

    def log_prob(self, value: Tensor) -> Tensor:
        """As `values_log_prob` summed, at half its cost."""
        if self._validate_args:
            self._validate_sample(value)
        event_dims = len(self.event_shape)
        x = value.to(device=self.logits.device, dtype=self.logits.dtype)
        if torch.is_grad_enabled() or self.logits.dtype not in (torch.float32, torch.float64):
            logits, x = torch.broadcast_tensors(self.logits, x)
            losses = binary_cross_entropy_with_logits(logits, x, reduction="none")
            return -sum_event(losses, event_dims)
        return bernoulli_log_prob(self.logits, x, event_dims)

    def _draw(self, sample_shape: torch.Size) -> Tensor:
        return torch.bernoulli(self.mean.expand(self._extended_shape(sample_shape)))


class StableStudentT(StudentT):
    """torch's StudentT with a normaliser that keeps float32 digits at many degrees of freedom.

    Where (x - loc) / scale has a square that overflows, the density's tail, a power, goes on.
    Its chi-squared distribution is made when it is sampled: that brings a number to the device.
    """

    def __init__(
        self, df: Tensor, loc: Tensor, scale: Tensor, *, validate_args: bool = False
    ) -> None:
        self.df, self.loc, self.scale = torch.broadcast_tensors(df, loc, scale)
        Distribution.__init__(self, self.df.shape, validate_args=validate_args)

    @cached_property
    def _chi2(self) -> Chi2:
        return Chi2(self.df)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> StableStudentT:
        df, loc, scale = (value.expand(batch_shape) for value in (self.df, self.loc, self.scale))
        return StableStudentT(df, loc, scale, validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        y = (value - self.loc) / self.scale
        normaliser = log_gamma_half_step(0.5 * self.df) - LOG_SQRT_TWO_PI - torch.log(self.scale)
        far = y.abs() > FAR
        beyond = torch.where(far, y.abs() / FAR, 1.0)
        y = torch.where(far, FAR, y)
        log_kernel = torch.log1p(y * y / self.df) + 2 * torch.log(beyond)
        return normaliser - 0.5 * (self.df + 1) * log_kernel


# --- grey levels --------------------------------------------------------------------------------


class GreyLevels(Factorised):
    """A distribution of the 256 grey levels, by the exact mass of each."""

    value_support = constraints.integer_interval(0, LEVELS - 1)

    def level_log_probs(self) -> Tensor:
        """log mass of each level 0…255: (256, *batch, *event). For tables and figures."""
        levels = torch.arange(LEVELS, dtype=self._like.dtype, device=self._like.device)
        shape = (1,) * self._like.dim()
        return torch.stack([self.values_log_prob(level.expand(shape)) for level in levels])

    def survival(self, level: int) -> Tensor:
        """P(x_d >= level), (*batch, *event), for 1 <= level <= 255."""
        raise NotImplementedError

    @property
    def mean(self) -> Tensor:
        return self._moments()[0]

    @property
    def variance(self) -> Tensor:
        first, second = self._moments()
        return second - first.square()

    def _moments(self) -> tuple[Tensor, Tensor]:
        """E[x] and E[x^2] as sums of the survival function: exact, in memory of one image."""
        first = torch.zeros_like(self._like)
        second = torch.zeros_like(self._like)
        for level in range(1, LEVELS):
            survival = self.survival(level)
            first = first + survival
            second = second + (2 * level - 1) * survival
        return first, second


def _level(t: Tensor) -> Tensor:
    """The level whose bin holds t; values outside the unit interval go to the nearest level."""
    return torch.floor(LEVELS * t).clamp_(0, LEVELS - 1)


def _level_interval(x: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Level x as an interval in units of the scale: distance of its nearer edge, and width.

    Levels 0 and 255 reach to infinity. (x + 1/2)/256 - loc is exact near the bin, so neighbouring
    bins agree on the edge between them however small the scale.
    """
    one = torch.ones((), dtype=x.dtype, device=x.device)
    first, last = x == 0, x == LEVELS - 1
    offset = (x + 0.5) / LEVELS - loc
    # The side of the mean that the level lies on; an edge level has one side only.
    side = torch.copysign(one, offset.detach())
    side = torch.minimum(side, torch.where(first, -one, one))
    side = torch.maximum(side, torch.where(last, one, -one))
    inverse = 1 / scale
    distance = (offset * side - 0.5 / LEVELS) * inverse
    beyond = torch.where(first | last, torch.inf, 0.0).to(x.dtype)
    return distance, inverse / LEVELS + beyond


class _GaussianLevels(GreyLevels):
    """Grey levels of N(loc, scale^2): shared by the two ways to treat its tails.

    loc: (*batch, *event). scale: broadcastable to loc.
    """

    def __init__(
        self, loc: Tensor, scale: Tensor, event_dims: int, *, validate_args: bool = False
    ) -> None:
        self.loc, self.scale = loc, scale
        super().__init__(loc, event_dims, validate_args=validate_args)

    def survival(self, level: int) -> Tensor:
        return torch.special.ndtr((self.loc - level / LEVELS) / self.scale)

    def _draw(self, sample_shape: torch.Size) -> Tensor:
        noise = torch.randn(
            self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device
        )
        return _level(self.loc + self.scale * noise)


class GreyGaussian(_GaussianLevels):
    """N(loc, scale^2) on the unit interval, as a distribution of grey levels.

    `log_prob` is the exact mass of the level's bin. `dequantized_log_prob` is the log density at
    (x+u)/256 in the same unit; over u ~ U[0, 1) its mean is at most `log_prob`, by Jensen's
    inequality, and the mean of its exponential is exactly the mass (Theis et al. 2016). The mass
    outside the unit interval (`log_tails`) belongs to no level; `mean` and `sample` put it on the
    nearest one.
    """

    def values_log_prob(self, x: Tensor) -> Tensor:
        inverse = 1 / self.scale
        distance = ((x + 0.5) / LEVELS - self.loc).abs() - 0.5 / LEVELS
        return log_normal_interval(distance * inverse, inverse / LEVELS)

    def dequantized_log_prob(self, x: Tensor, u: Tensor) -> Tensor:
        """log density of (x+u)/256 minus D log 256, in nats: (*batch,). u in [0, 1), like x."""
        t = (x.to(self._like.dtype) + u.to(self._like.dtype)) / LEVELS
        z = (t - self.loc) / self.scale
        constant = torch.log(self.scale) + (LOG_SQRT_TWO_PI + LOG_LEVELS)
        return sum_event(torch.addcmul(-constant, z, z, value=-0.5), len(self.event_shape))

    def log_tails(self) -> tuple[Tensor, Tensor]:
        """log mass below 0 and log mass from 1 up, each (*batch, *event)."""
        infinite = torch.full_like(self.loc, torch.inf)
        below = log_normal_interval(self.loc / self.scale, infinite)
        return below, log_normal_interval((1 - self.loc) / self.scale, infinite)


class DiscretizedGaussian(_GaussianLevels):
    """N(loc, scale^2) rounded to grey levels: levels 0 and 255 also take the tails."""

    def values_log_prob(self, x: Tensor) -> Tensor:
        return log_normal_interval(*_level_interval(x, self.loc, self.scale))


class DiscretizedLogistic(GreyLevels):
    """Logistic(loc, scale) rounded to grey levels: levels 0 and 255 also take the tails.

    Kingma et al. 2016 (inverse autoregressive flow).
    """

    def __init__(
        self, loc: Tensor, scale: Tensor, event_dims: int, *, validate_args: bool = False
    ) -> None:
        self.loc, self.scale = loc, scale
        super().__init__(loc, event_dims, validate_args=validate_args)

    def values_log_prob(self, x: Tensor) -> Tensor:
        return log_logistic_interval(*_level_interval(x, self.loc, self.scale))

    def survival(self, level: int) -> Tensor:
        return torch.sigmoid((self.loc - level / LEVELS) / self.scale)

    def _draw(self, sample_shape: torch.Size) -> Tensor:
        return _level(self.loc + self.scale * torch.logit(self._uniform(sample_shape)))


class LogisticMixture(GreyLevels):
    """Mixture of logistics rounded to grey levels, each value on its own given z.

    Salimans et al. 2017 (PixelCNN++), eq. 2. Parameters: (*batch, components, *event).
    """

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        scale: Tensor,
        event_dims: int,
        *,
        validate_args: bool = False,
    ) -> None:
        self._dim = -event_dims - 1
        self.log_weights = log_softmax(logits, self._dim)
        self.loc, self.scale = loc, scale
        super().__init__(loc.select(self._dim, 0), event_dims, validate_args=validate_args)

    def values_log_prob(self, x: Tensor) -> Tensor:
        interval = _level_interval(x.unsqueeze(self._dim), self.loc, self.scale)
        return torch.logsumexp(self.log_weights + log_logistic_interval(*interval), self._dim)

    def survival(self, level: int) -> Tensor:
        components = torch.sigmoid((self.loc - level / LEVELS) / self.scale)
        return (self.log_weights.exp() * components).sum(self._dim)

    def _draw(self, sample_shape: torch.Size) -> Tensor:
        shape = sample_shape + self.loc.shape
        noise = torch.empty(shape, dtype=self.loc.dtype, device=self.loc.device)
        gumbel = -noise.exponential_().log()
        chosen = (self.log_weights + gumbel).argmax(self._dim, keepdim=True)
        loc = self.loc.expand(shape).gather(self._dim, chosen).squeeze(self._dim)
        scale = self.scale.expand(shape).gather(self._dim, chosen).squeeze(self._dim)
        return _level(loc + scale * torch.logit(self._uniform(sample_shape)))


class ContinuousBernoulliGrey(GreyLevels):
    """Continuous Bernoulli on [0, 1], density proportional to exp(logits t), as grey levels.

    Loaiza-Ganem and Cunningham 2019, from logits and exact for any of them: seen from the
    favoured end (s = t for negative logits, else 1 - t) it is an exponential of rate |logits|
    truncated to [0, 1]. `log_prob` is the exact mass of the level's bin, `dequantized_log_prob` the
    density at (x+u)/256 in the same unit. logits: (*batch, *event).
    """

    def __init__(self, logits: Tensor, event_dims: int, *, validate_args: bool = False) -> None:
        self.logits = logits
        # Not abs() and sign(): their zero derivative at 0 would be wrong here.
        self._sign = torch.copysign(torch.ones_like(logits), logits.detach())
        self.rate = logits * self._sign
        super().__init__(logits, event_dims, validate_args=validate_args)

    def _from_favoured_end(self, centred: Tensor) -> Tensor:
        """s for a t given as t - 1/2."""
        return 0.5 - self._sign * centred

    def values_log_prob(self, x: Tensor) -> Tensor:
        near_edge = self._from_favoured_end((x + 0.5) / LEVELS - 0.5) - 0.5 / LEVELS
        bin_ = log_truncated_exponential_integral(self.rate / LEVELS)
        whole = log_truncated_exponential_integral(self.rate)
        return torch.addcmul(bin_ - whole - LOG_LEVELS, self.rate, near_edge, value=-1)

    def dequantized_log_prob(self, x: Tensor, u: Tensor) -> Tensor:
        """log density of (x+u)/256 minus D log 256, in nats: (*batch,). u in [0, 1), like x."""
        centred = ((x.to(self._like.dtype) - LEVELS / 2) + u.to(self._like.dtype)) / LEVELS
        whole = log_truncated_exponential_integral(self.rate)
        position = self._from_favoured_end(centred)
        values = torch.addcmul(-LOG_LEVELS - whole, self.rate, position, value=-1)
        return sum_event(values, len(self.event_shape))

    def log_density(self, t: Tensor) -> Tensor:
        """log density of each t in [0, 1], in nats of the unit interval: (*batch, *event)."""
        whole = log_truncated_exponential_integral(self.rate)
        return -self.rate * self._from_favoured_end(t - 0.5) - whole

    def cdf(self, value: Tensor) -> Tensor:
        """P(t <= value) for value in [0, 1]: (*batch, *event)."""
        rate = self.rate.clamp(min=torch.finfo(self.rate.dtype).tiny)
        below = torch.expm1(-rate * value) / torch.expm1(-rate)
        mirrored = torch.expm1(-rate * (1 - value)) / torch.expm1(-rate)
        return torch.where(self._sign < 0, below, 1 - mirrored)

    @property
    def mean(self) -> Tensor:
        steps = LEVELS * truncated_exponential_mean(self.rate)
        steps = steps - truncated_exponential_mean(self.rate / LEVELS)
        middle = (LEVELS - 1) / 2
        return middle + self._sign * (middle - steps)

    @property
    def variance(self) -> Tensor:
        whole = LEVELS**2 * truncated_exponential_variance(self.rate)
        return whole - truncated_exponential_variance(self.rate / LEVELS)

    def _draw(self, sample_shape: torch.Size) -> Tensor:
        u = self._uniform(sample_shape)
        rate = self.rate.clamp(min=1e-4)
        position = -torch.log1p(u * torch.expm1(-rate)) / rate
        position = torch.where(self.rate < 1e-4, u, position)
        return _level(torch.where(self._sign < 0, position, 1 - position))


class BetaBinomial(GreyLevels):
    """255 trials whose success probability is Beta(alpha, beta): (*batch, *event) each.

    Skellam 1948. Computed in float64 whatever the dtype: log Gamma of large arguments cancels.
    """

    def __init__(
        self, alpha: Tensor, beta: Tensor, event_dims: int, *, validate_args: bool = False
    ) -> None:
        self.alpha, self.beta = alpha, beta
        super().__init__(alpha, event_dims, validate_args=validate_args)

    def values_log_prob(self, x: Tensor) -> Tensor:
        n = LEVELS - 1
        x = x.double()
        alpha, beta = self.alpha.double(), self.beta.double()
        log_choose = math.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
        log_ratio = log_beta(alpha + x, beta + (n - x)) - log_beta(alpha, beta)
        return (log_choose + log_ratio).to(self.alpha.dtype)

    @property
    def mean(self) -> Tensor:
        return (LEVELS - 1) * self.alpha / (self.alpha + self.beta)

    @property
    def variance(self) -> Tensor:
        n, total = LEVELS - 1, self.alpha + self.beta
        binomial = n * (self.alpha / total) * (self.beta / total)
        return binomial * (total + n) / (total + 1)

    def _draw(self, sample_shape: torch.Size) -> Tensor:
        shape = self._extended_shape(sample_shape)
        # Through log Gamma(1 + a) + log(u)/a: a Gamma draw of tiny shape would underflow.
        log_odds = torch.zeros(shape, dtype=torch.float64, device=self._like.device)
        for concentration, sign in ((self.alpha, 1.0), (self.beta, -1.0)):
            a = concentration.double().expand(shape)
            u = torch.empty_like(log_odds).exponential_()
            log_odds += sign * (Gamma(a + 1, torch.ones_like(a)).sample().log() - u / a)
        p = torch.sigmoid(log_odds)
        return torch.binomial(torch.full_like(p, LEVELS - 1), p).to(self._like.dtype)


class CategoricalLevels(GreyLevels):
    """A free mass for each grey level. logits: (*batch, 256, *event)."""

    def __init__(self, logits: Tensor, event_dims: int, *, validate_args: bool = False) -> None:
        self._dim = -event_dims - 1
        self.log_probs = log_softmax(logits, self._dim)
        super().__init__(logits.select(self._dim, 0), event_dims, validate_args=validate_args)

    def values_log_prob(self, x: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(x.shape, self._like.shape)
        index = x.long().expand(shape).unsqueeze(self._dim)
        levels = [*index.shape]
        levels[self._dim] = LEVELS
        return self.log_probs.expand(levels).gather(self._dim, index).squeeze(self._dim)

    def _moments(self) -> tuple[Tensor, Tensor]:
        probs = self.log_probs.exp().movedim(self._dim, -1)
        levels = torch.arange(LEVELS, dtype=probs.dtype, device=probs.device)
        return (probs * levels).sum(-1), (probs * levels.square()).sum(-1)

    def _draw(self, sample_shape: torch.Size) -> Tensor:
        shape = sample_shape + self.log_probs.shape
        noise = torch.empty(shape, dtype=self._like.dtype, device=self._like.device)
        gumbel = -noise.exponential_().log()
        return (self.log_probs + gumbel).argmax(self._dim).to(self._like.dtype)
