"""p(z) and q(z|x) as distributions."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints
from torch.nn.functional import linear

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class LatentDistribution(Distribution):
    """A distribution over latent vectors: batch `batch_shape`, event (L,)."""

    def __init__(self, batch_shape: Sequence[int], event_size: int, like: Tensor) -> None:
        super().__init__(Size(batch_shape), Size((event_size,)), validate_args=False)
        self._like = like

    def __repr__(self) -> str:
        shapes = f"batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)}"
        return f"{type(self).__name__}({shapes})"

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        return {}

    @property
    def support(self) -> constraints.Constraint:
        return constraints.real_vector

    @abstractmethod
    def log_prob(self, value: Tensor) -> Tensor:
        """log density in nats: (*, *batch, L) -> (*, *batch)."""

    @abstractmethod
    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw (*sample_shape, *batch, L), without gradient."""

    def _noise(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        device = self._like.device if generator is None else generator.device
        noise = torch.randn(shape, dtype=self._like.dtype, device=device, generator=generator)
        return noise.to(self._like.device)


class Reparameterized(LatentDistribution):
    """A distribution drawn by pushing standard normal noise through a differentiable map."""

    has_rsample = True

    @abstractmethod
    def from_noise(self, eps: Tensor) -> Tensor:
        """The map: eps (*, *batch, L), standard normal -> z (*, *batch, L)."""

    @abstractmethod
    def detach(self) -> Self:
        """The same distribution with every parameter stopped; its log_prob still follows z."""

    def with_constant_modules(self) -> Self:
        """The same distribution with the weights of modules inside it, if any, stopped."""
        return self

    @abstractmethod
    def take(self, index: Tensor) -> Self:
        """The members `index` of the (first) batch dimension."""

    def from_noise_with_log_prob(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """z = from_noise(eps) and log q(z), the latter along the way where that is cheaper."""
        z = self.from_noise(eps)
        return z, self.log_prob(z)

    def log_prob_of_each(self, value: Tensor) -> Tensor:
        """log density of values under each member of a batch (M,): (*, L) -> (*, M), in nats."""
        return self.log_prob(value.unsqueeze(-2))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.from_noise(self._noise((*sample_shape, *self.batch_shape, *self.event_shape)))

    @torch.no_grad()
    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        return self.from_noise(self._noise(shape, generator))

    @property
    def mean(self) -> Tensor:
        """E[z], (*batch, L): by 512 quasi-random points, always the same ones."""
        return self._quasi_moments()[0]

    @property
    def variance(self) -> Tensor:
        """Var[z], (*batch, L): by 512 quasi-random points, always the same ones."""
        return self._quasi_moments()[1]

    @torch.no_grad()
    def _quasi_moments(self) -> tuple[Tensor, Tensor]:
        noise = _quasi_normal(self.event_shape[0]).to(self._like)
        noise = noise.reshape(-1, *(1 for _ in self.batch_shape), self.event_shape[0])
        shape = (*self.batch_shape, *self.event_shape)
        centre = self.from_noise(torch.zeros_like(noise[0]).expand(shape))
        first = second = torch.zeros_like(centre)
        for block in noise.split(32):  # memory must not grow with the number of points
            offset = self.from_noise(block.expand(-1, *shape)) - centre
            first = first + offset.sum(0) / len(noise)
            second = second + offset.square().sum(0) / len(noise)
        return centre + first, second - first.square()


@functools.cache
def _quasi_normal(size: int, num_points: int = 512) -> Tensor:
    """Scrambled Sobol points through the normal quantile function, (num_points, size)."""
    engine = torch.quasirandom.SobolEngine(size, scramble=True, seed=0)
    uniform = engine.draw(num_points, dtype=torch.float64)
    return torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9))


class DiagonalNormal(Reparameterized):
    """N(loc, diag(exp(log_scale))²); both arguments (*batch, L)."""

    def __init__(self, loc: Tensor, log_scale: Tensor) -> None:
        super().__init__(loc.shape[:-1], loc.shape[-1], loc)
        self.loc = loc
        self.log_scale = log_scale
        self.scale = log_scale.exp()

    def from_noise(self, eps: Tensor) -> Tensor:
        return torch.addcmul(self.loc, self.scale, eps)

    def from_noise_with_log_prob(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        return self.from_noise(eps), self._log_prob_of_standardised(eps)

    def log_prob(self, value: Tensor) -> Tensor:
        return self._log_prob_of_standardised((value - self.loc) / self.scale)

    def _log_prob_of_standardised(self, eps: Tensor) -> Tensor:
        constant = HALF_LOG_2PI * self.event_shape[0]
        return -0.5 * eps.square().sum(-1) - (self.log_scale.sum(-1) + constant)

    def log_prob_of_each(self, value: Tensor) -> Tensor:
        """As of any batch (M,): (*, L) -> (*, M), in nats.

        A quadratic in z is linear in (z², z): one matrix product, and nothing of size (*, M, L).
        Its terms are as large as (z / scale)² and cancel, hence float64.
        """
        loc, log_scale = self.loc.double(), self.log_scale.double()
        precision = (-2 * log_scale).exp()
        weight = torch.cat([-0.5 * precision, precision * loc], -1)
        constant = (0.5 * precision * loc.square() + log_scale + HALF_LOG_2PI).sum(-1)
        z = value.double()
        return linear(torch.cat([z.square(), z], -1), weight, -constant).to(self._like.dtype)

    def detach(self) -> DiagonalNormal:
        return DiagonalNormal(self.loc.detach(), self.log_scale.detach())

    def take(self, index: Tensor) -> DiagonalNormal:
        return DiagonalNormal(self.loc[index], self.log_scale[index])

    @property
    def scale_tril(self) -> Tensor:
        return torch.diag_embed(self.scale)

    def entropy(self) -> Tensor:
        return self.log_scale.sum(-1) + (0.5 + HALF_LOG_2PI) * self.event_shape[0]

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return self.scale.square()


class StandardNormal(LatentDistribution):
    """N(0, I): batch (), event (L,)."""

    def __init__(self, loc: Tensor) -> None:
        """`loc` is a zero vector (L,), which gives size, dtype and device."""
        super().__init__((), loc.shape[-1], loc)

    def log_prob(self, value: Tensor) -> Tensor:
        return -0.5 * value.square().sum(-1) - HALF_LOG_2PI * self.event_shape[0]

    @torch.no_grad()
    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        return self._noise((*sample_shape, *self.event_shape), generator)

    def entropy(self) -> Tensor:
        return (torch.zeros_like(self._like) + (0.5 + HALF_LOG_2PI)).sum()

    @property
    def mean(self) -> Tensor:
        return torch.zeros_like(self._like)

    @property
    def variance(self) -> Tensor:
        return torch.ones_like(self._like)


class Mixture(LatentDistribution):
    """Σ_m weight_m · component_m(z): components of batch (M,), log_weights (M,) normalised."""

    def __init__(self, components: Reparameterized, log_weights: Tensor) -> None:
        super().__init__((), components.event_shape[0], log_weights)
        self.components = components
        self.log_weights = log_weights

    def log_prob(self, value: Tensor) -> Tensor:
        by_component = self.components.log_prob_of_each(value)
        return torch.logsumexp(by_component + self.log_weights, -1)

    @torch.no_grad()
    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        device = self._like.device if generator is None else generator.device
        weights = self.log_weights.exp().to(device)
        count = math.prod(sample_shape)
        index = torch.multinomial(weights, count, replacement=True, generator=generator)
        z = self.components.take(index.to(self._like.device)).sample(generator=generator)
        return z.reshape(*sample_shape, *self.event_shape)

    @property
    def mean(self) -> Tensor:
        return self.log_weights.exp() @ self.components.mean

    @property
    def variance(self) -> Tensor:
        second_moments = self.components.variance + self.components.mean.square()
        return self.log_weights.exp() @ second_moments - self.mean.square()


class HierarchicalPrior(LatentDistribution):
    """p(z) = p(z_n) Π p(z_i | z_{i+1}) over the concatenation (z_1, …, z_n).

    Burda, Grosse and Salakhutdinov (2016), eq. 1. `conditionals[i]` maps z_{i+2} to the
    distribution of z_{i+1}.
    """

    def __init__(
        self,
        top: LatentDistribution,
        conditionals: Sequence[Callable[[Tensor], DiagonalNormal]],
        sizes: Sequence[int],
    ) -> None:
        super().__init__((), sum(sizes), top._like)
        self.top = top
        self.conditionals = conditionals
        self.sizes = list(sizes)

    def log_prob(self, value: Tensor) -> Tensor:
        blocks = value.split(self.sizes, -1)
        log_prob = self.top.log_prob(blocks[-1])
        for conditional, lower, upper in zip(
            self.conditionals, blocks[:-1], blocks[1:], strict=True
        ):
            log_prob = log_prob + conditional(upper).log_prob(lower)
        return log_prob

    @torch.no_grad()
    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        blocks = [self.top.sample(sample_shape, generator)]
        for conditional in reversed(self.conditionals):
            blocks.append(conditional(blocks[-1]).sample(generator=generator))
        return torch.cat(blocks[::-1], -1)


class CholeskyNormal(Reparameterized):
    """N(loc, S Sᵀ): loc (*batch, L), scale_tril S (*batch, L, L), lower triangular."""

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        super().__init__(loc.shape[:-1], loc.shape[-1], loc)
        self.loc = loc
        self.scale_tril = scale_tril

    @property
    def log_diagonal(self) -> Tensor:
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log()

    def from_noise(self, eps: Tensor) -> Tensor:
        return self.loc + self._by_columns(torch.matmul, eps)

    def from_noise_with_log_prob(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        return self.from_noise(eps), self._log_prob_of_standardised(eps)

    def log_prob(self, value: Tensor) -> Tensor:
        return self._log_prob_of_standardised(self._by_columns(_solve, value - self.loc))

    def _log_prob_of_standardised(self, eps: Tensor) -> Tensor:
        constant = HALF_LOG_2PI * self.event_shape[0]
        return -0.5 * eps.square().sum(-1) - (self.log_diagonal.sum(-1) + constant)

    def _by_columns(self, apply: Callable[[Tensor, Tensor], Tensor], value: Tensor) -> Tensor:
        """apply(S, value) for each vector, all samples of one S as the columns of one matrix."""
        shape = torch.broadcast_shapes(value.shape, self.loc.shape)
        value = value.expand(shape)
        num_batch = len(self.batch_shape)
        samples = shape[: len(shape) - 1 - num_batch]
        columns = value.reshape(samples.numel(), *shape[len(samples) :]).movedim(0, -1)
        return apply(self.scale_tril, columns).movedim(-1, 0).reshape(shape)

    def detach(self) -> CholeskyNormal:
        return CholeskyNormal(self.loc.detach(), self.scale_tril.detach())

    def take(self, index: Tensor) -> CholeskyNormal:
        return CholeskyNormal(self.loc[index], self.scale_tril[index])

    def entropy(self) -> Tensor:
        return self.log_diagonal.sum(-1) + (0.5 + HALF_LOG_2PI) * self.event_shape[0]

    @property
    def covariance_matrix(self) -> Tensor:
        return self.scale_tril @ self.scale_tril.mT

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return self.scale_tril.square().sum(-1)


def _solve(scale_tril: Tensor, columns: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(scale_tril, columns, upper=False)
