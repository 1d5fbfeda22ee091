"""Decoder output -> p(x|z). One small class for each likelihood, one table of their names.

A likelihood is a module: it turns the decoder's raw output (*batch, outputs_per_value, *data_shape)
into a torch Distribution with batch shape *batch and event shape data_shape. Its `log_prob` is in
the data space's reporting measure: nats of 0/1 data, of 256-level data, or of density in raw units.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Laplace, Normal
from torch.nn.functional import softplus

from vae.checks import did_you_mean
from vae.models import data_distributions as families
from vae.models.data_distributions import LEVELS
from vae.models.numerics import inverse_softplus, truncated_exponential_mean

SPACES: dict[str, str] = {
    "binary": "values 0 and 1",
    "grey8": "grey levels 0 to 255",
    "continuous": "real numbers",
}
_REAL = "a density of real numbers"
_REAL_ONLY = "a density of real numbers, and no probability to grey levels"
_GREY = "probability to the 256 grey levels and to nothing else"


class Likelihood(nn.Module):
    """Base of the likelihoods.

    space: one of SPACES. data_shape: shape of one example. min_scale: floor of learned scales, in
    standardised units (`continuous`) or on the unit interval (`grey8`, where 1 is 256 levels).
    num_components: components of a mixture; others ignore it. `outputs_per_value` is how many
    numbers the decoder gives for each data value.

    Raises ValueError where the likelihood doesn't model the space, or a number is out of range.
    """

    name: ClassVar[str]
    spaces: ClassVar[frozenset[str]]
    gives: ClassVar[str]
    is_density: ClassVar[bool] = False
    outputs_per_value: int

    def __init__(
        self,
        *,
        space: str,
        data_shape: tuple[int, ...],
        min_scale: float = 1e-3,
        num_components: int = 5,
    ) -> None:
        super().__init__()
        check_likelihood(self.name, space)
        if not (min_scale > 0 and math.isfinite(min_scale)):
            raise ValueError(f"model.min_scale must be a positive number; found {min_scale!r}")
        if num_components < 1:
            raise ValueError(f"model.num_components must be at least 1; found {num_components!r}")
        self.space = space
        self.data_shape = tuple(data_shape)
        self.min_scale = min_scale
        self.num_components = num_components

    @property
    def dequantizes(self) -> bool:
        """Whether training uses `dequantized_log_prob(x, u)`: a density on the unit interval."""
        return self.space == "grey8" and self.is_density

    @abstractmethod
    def distribution(self, raw: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
        """p(x|z) from raw with the outputs first: (outputs_per_value, *batch, *data_shape)."""

    @abstractmethod
    def initial_bias(self, mean: Tensor, std: Tensor) -> Tensor:
        """Decoder output bias at which p(x|z) has about the data's mean and standard deviation.

        mean, std: (*data_shape), data units. Returns (outputs_per_value, *data_shape).
        """

    def forward(self, raw: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
        """p(x|z): batch shape *batch, event shape data_shape.

        raw: (*batch, outputs_per_value, *data_shape). loc, scale: (*data_shape), float64, used in
        `continuous` only, where raw units = loc + scale * standardised units.
        """
        expected = (self.outputs_per_value, *self.data_shape)
        if raw.shape[-len(expected) :] != expected:
            raise ValueError(
                f"likelihood {self.name} needs decoder output of shape (*batch, "
                f"{', '.join(map(str, expected))}); found {tuple(raw.shape)}"
            )
        if raw.dtype in (torch.bfloat16, torch.float16):
            raw = raw.float()
        return self.distribution(raw.movedim(-len(expected), 0), loc, scale)

    # --- shared by the families with a location and a scale --------------------------------------

    def _scale(self, raw: Tensor) -> Tensor:
        return self.min_scale + softplus(raw)

    def _raw_scale(self, scale: Tensor) -> Tensor:
        """The raw value of a starting scale (at least twice the floor)."""
        return inverse_softplus((scale - self.min_scale).clamp(min=self.min_scale))

    def _start(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Location and standard deviation to start from, in the units of the decoder's output.

        In `grey8` nearly constant pixels start at half the typical deviation: at their own, the
        untrained decoder's noise alone would cost thousands of nats each.
        """
        if self.space == "continuous":
            return torch.zeros_like(mean), torch.ones_like(std)
        typical = std.square().mean().sqrt()
        std = torch.maximum(std, (0.5 * typical).clamp(min=1.0))
        return (mean + 0.5) / LEVELS, std / LEVELS


@final
class Bernoulli(Likelihood):
    """Independent Bernoulli pixels; one logit each."""

    name = "bernoulli"
    spaces = frozenset({"binary"})
    gives = "probability to the values 0 and 1 and to nothing else"
    outputs_per_value = 1

    def distribution(self, raw: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
        return families.BernoulliPixels(raw.squeeze(0), len(self.data_shape))

    def initial_bias(self, mean: Tensor, std: Tensor) -> Tensor:
        return torch.logit(mean.clamp(1e-3, 1 - 1e-3))[None]


def _gaussian(
    likelihood: Likelihood, mu: Tensor, sigma: Tensor, loc: Tensor, scale: Tensor
) -> Distribution:
    event_dims = len(likelihood.data_shape)
    if likelihood.space == "grey8":
        return families.GreyGaussian(mu, sigma, event_dims)
    standard = Normal(mu, sigma.expand_as(mu), validate_args=False)
    return families.Standardised(standard, loc, scale, event_dims)


@final
class Gaussian(Likelihood):
    """Diagonal Gaussian, mean and standard deviation both from the decoder."""

    name = "gaussian"
    spaces = frozenset({"grey8", "continuous"})
    gives = _REAL
    is_density = True
    outputs_per_value = 2

    def distribution(self, raw: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
        location, raw_scale = raw
        return _gaussian(self, location, self._scale(raw_scale), loc, scale)

    def initial_bias(self, mean: Tensor, std: Tensor) -> Tensor:
        mu, sigma = self._start(mean, std)
        return torch.stack([mu, self._raw_scale(sigma)])


@final
class GaussianShared(Likelihood):
    """Gaussian with one learned standard deviation for all values.

    `initial_bias` also sets that standard deviation, to the data's root mean square.
    """

    name = "gaussian_shared"
    spaces = frozenset({"grey8", "continuous"})
    gives = _REAL
    is_density = True
    outputs_per_value = 1

    def __init__(
        self,
        *,
        space: str,
        data_shape: tuple[int, ...],
        min_scale: float = 1e-3,
        num_components: int = 5,
    ) -> None:
        super().__init__(
            space=space, data_shape=data_shape, min_scale=min_scale, num_components=num_components
        )
        self.raw_scale = nn.Parameter(torch.zeros(()))

    def distribution(self, raw: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
        return _gaussian(self, raw.squeeze(0), self._scale(self.raw_scale), loc, scale)

    def initial_bias(self, mean: Tensor, std: Tensor) -> Tensor:
        mu, sigma = self._start(mean, std)
        with torch.no_grad():
            self.raw_scale.copy_(self._raw_scale(sigma.square().mean().sqrt()))
        return mu[None]


@final
class GaussianUnit(Likelihood):
    """Gaussian with standard deviation 1: what a squared-error loss means.

    1 is the width of the unit interval in `grey8`, and each column's own in `continuous`.
    """

    name = "gaussian_unit"
    spaces = frozenset({"grey8", "continuous"})
    gives = _REAL
    is_density = True
    outputs_per_value = 1

    def distribution(self, raw: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
        return _gaussian(self, raw.squeeze(0), raw.new_ones(()), loc, scale)

    def initial_bias(self, mean: Tensor, std: Tensor) -> Tensor:
        return self._start(mean, std)[0][None]


@final
class ContinuousBernoulli(Likelihood):
    """Continuous Bernoulli pixels; one logit each."""

    name = "continuous_bernoulli"
    spaces = frozenset({"grey8"})
    gives = "a density of the unit interval"
    is_density = True
    outputs_per_value = 1

    def distribution(self, raw: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
        return families.ContinuousBernoulliGrey(raw.squeeze(0), len(self.data_shape))

    def initial_bias(self, mean: Tensor, std: Tensor) -> Tensor:
        mean = mean.double().clamp(0.5, LEVELS - 1.5)
        steps = torch.minimum(mean, LEVELS - 1 - mean)
        low, high = torch.zeros_like(mean), torch.full_like(mean, 1e3)
        for _ in range(60):  # bisection: the mean falls with the rate
            rate = (low + high) / 2
            found = LEVELS * truncated_exponential_mean(rate)
            found = found - truncated_exponential_mean(rate / LEVELS)
            low, high = (
                torch.where(found > steps, rate, low),
                torch.where(found > steps, high, rate),
            )
        logits = torch.where(mean < (LEVELS - 1) / 2, -low, low)
        return logits.to(std.dtype)[None]


_LOGISTIC_STD = math.pi / math.sqrt(3)


@final
class DiscretizedLogistic(Likelihood):
    """Logistic rounded to grey levels, location and scale from the decoder."""

    name = "discretized_logistic"
    spaces = frozenset({"grey8"})
    gives = _GREY
    outputs_per_value = 2

    def distribution(self, raw: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
        location, raw_scale = raw
        return families.DiscretizedLogistic(location, self._scale(raw_scale), len(self.data_shape))

    def initial_bias(self, mean: Tensor, std: Tensor) -> Tensor:
        mu, sigma = self._start(mean, std)
        return torch.stack([mu, self._raw_scale(sigma / _LOGISTIC_STD)])


@final
class LogisticMixture(Likelihood):
    """Mixture of `num_components` logistics rounded to grey levels, for each value."""

    name = "logistic_mixture"
    spaces = frozenset({"grey8"})
    gives = _GREY

    def __init__(
        self,
        *,
        space: str,
        data_shape: tuple[int, ...],
        min_scale: float = 1e-3,
        num_components: int = 5,
    ) -> None:
        super().__init__(
            space=space, data_shape=data_shape, min_scale=min_scale, num_components=num_components
        )
        self.outputs_per_value = 3 * num_components

    def distribution(self, raw: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
        component_dim = -len(self.data_shape) - 1
        logits, mu, raw_scale = (part.movedim(0, component_dim) for part in raw.chunk(3))
        return families.LogisticMixture(logits, mu, self._scale(raw_scale), len(self.data_shape))

    def initial_bias(self, mean: Tensor, std: Tensor) -> Tensor:
        """Half the variance between the components, half within."""
        mu, sigma = self._start(mean, std)
        offsets = torch.linspace(-1, 1, self.num_components, dtype=mu.dtype, device=mu.device)
        if self.num_components == 1:
            offsets, within = torch.zeros_like(offsets), 1.0
        else:
            offsets, within = offsets / offsets.square().mean().sqrt() * 0.5**0.5, 0.5**0.5
        offsets = offsets.reshape(-1, *(1,) * mu.dim())
        raw_scale = self._raw_scale(within * sigma / _LOGISTIC_STD)
        location = mu + offsets * sigma
        return torch.cat([torch.zeros_like(location), location, raw_scale.expand_as(location)])


@final
class DiscretizedGaussian(Likelihood):
    """Gaussian rounded to grey levels, mean and standard deviation from the decoder."""

    name = "discretized_gaussian"
    spaces = frozenset({"grey8"})
    gives = _GREY
    outputs_per_value = 2

    def distribution(self, raw: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
        location, raw_scale = raw
        return families.DiscretizedGaussian(location, self._scale(raw_scale), len(self.data_shape))

    def initial_bias(self, mean: Tensor, std: Tensor) -> Tensor:
        mu, sigma = self._start(mean, std)
        return torch.stack([mu, self._raw_scale(sigma)])


_MIN_CONCENTRATION = 1e-5


@final
class BetaBinomial(Likelihood):
    """Beta-binomial over the grey levels, both concentrations from the decoder."""

    name = "beta_binomial"
    spaces = frozenset({"grey8"})
    gives = _GREY
    outputs_per_value = 2

    def distribution(self, raw: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
        alpha, beta = (_MIN_CONCENTRATION + softplus(part) for part in raw)
        return families.BetaBinomial(alpha, beta, len(self.data_shape))

    def initial_bias(self, mean: Tensor, std: Tensor) -> Tensor:
        """By the method of moments."""
        n = LEVELS - 1
        p = (mean / n).clamp(0.5 / n, 1 - 0.5 / n)
        correlation = (std.square() / (n * p * (1 - p)) - 1) / (n - 1)
        total = 1 / correlation.clamp(1e-2, 0.9) - 1
        return inverse_softplus(torch.stack([p * total, (1 - p) * total]))


@final
class Categorical(Likelihood):
    """A free probability for each of the 256 grey levels, all from the decoder."""

    name = "categorical"
    spaces = frozenset({"grey8"})
    gives = _GREY
    outputs_per_value = LEVELS

    def distribution(self, raw: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
        event_dims = len(self.data_shape)
        return families.CategoricalLevels(raw.movedim(0, -event_dims - 1), event_dims)

    def initial_bias(self, mean: Tensor, std: Tensor) -> Tensor:
        """The masses of a logistic rounded to grey levels."""
        mu, sigma = self._start(mean, std)
        start = families.DiscretizedLogistic(mu, sigma / _LOGISTIC_STD, mu.dim())
        return start.level_log_probs()


@final
class StudentT(Likelihood):
    """Student's t; location, scale and degrees of freedom (above 1) from the decoder.

    Takahashi et al. 2018 (Student-t variational autoencoder).
    """

    name = "student_t"
    spaces = frozenset({"continuous"})
    gives = _REAL_ONLY
    is_density = True
    outputs_per_value = 3

    def distribution(self, raw: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
        raw_location, raw_scale, raw_df = raw
        df = 1 + softplus(raw_df)
        width = self._scale(raw_scale)
        standard = families.StableStudentT(df, raw_location, width, validate_args=False)
        return families.Standardised(standard, loc, scale, len(self.data_shape))

    def initial_bias(self, mean: Tensor, std: Tensor) -> Tensor:
        """Ten degrees of freedom."""
        mu, sigma = self._start(mean, std)
        df = torch.full_like(mu, 10.0)
        raw_scale = self._raw_scale(sigma * ((df - 2) / df).sqrt())
        return torch.stack([mu, raw_scale, inverse_softplus(df - 1)])


@final
class LaplaceLikelihood(Likelihood):
    """Laplace, location and scale from the decoder."""

    name = "laplace"
    spaces = frozenset({"continuous"})
    gives = _REAL_ONLY
    is_density = True
    outputs_per_value = 2

    def distribution(self, raw: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
        location, raw_scale = raw
        standard = Laplace(location, self._scale(raw_scale), validate_args=False)
        return families.Standardised(standard, loc, scale, len(self.data_shape))

    def initial_bias(self, mean: Tensor, std: Tensor) -> Tensor:
        mu, sigma = self._start(mean, std)
        return torch.stack([mu, self._raw_scale(sigma / math.sqrt(2))])


LIKELIHOODS: dict[str, type[Likelihood]] = {
    kind.name: kind
    for kind in (
        Bernoulli,
        Gaussian,
        GaussianShared,
        GaussianUnit,
        ContinuousBernoulli,
        DiscretizedLogistic,
        LogisticMixture,
        DiscretizedGaussian,
        BetaBinomial,
        Categorical,
        StudentT,
        LaplaceLikelihood,
    )
}


def check_likelihood(name: str, space: str) -> None:
    """Refuse a likelihood outside its data space.

    Raises ValueError that names the pair, the reason, what would work and the params.yaml keys.
    """
    if space not in SPACES:
        raise ValueError(
            f"data.space must be one of {', '.join(SPACES)}; "
            f"found {space!r}{did_you_mean(space, SPACES)}"
        )
    here = [kind.name for kind in LIKELIHOODS.values() if space in kind.spaces]
    if name not in LIKELIHOODS:
        raise ValueError(
            f"model.likelihood must be one of {', '.join(here)} (data.space is {space}); "
            f"found {name!r}{did_you_mean(name, LIKELIHOODS)}"
        )
    kind = LIKELIHOODS[name]
    if space in kind.spaces:
        return
    reason = f"{name} gives {kind.gives}, but data.space is {space} ({SPACES[space]})"
    if kind.is_density and space == "binary":
        reason += "; on separate values a density has no highest value"
    if name == "bernoulli" and space == "grey8":
        reason += "; cross-entropy on grey pixels is not a likelihood"
    raise ValueError(
        f"likelihood {name} does not fit space {space}: {reason}. "
        f"Set model.likelihood to {'one of ' * (len(here) > 1)}{', '.join(here)}, "
        f"or data.space to {' or '.join(sorted(kind.spaces))}."
    )
