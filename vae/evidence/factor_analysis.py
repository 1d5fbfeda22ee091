"""Factor analysis: the linear-Gaussian model whose log p(x) is exact.

    z ~ N(0, I),    x | z ~ N(loc + W z, Ψ),    hence    x ~ N(loc, W Wᵀ + Ψ),    Ψ diagonal.

Everything here costs O(D d²), through the d x d matrix M = I + Wᵀ Ψ⁻¹ W: Woodbury's identity for
the inverse of W Wᵀ + Ψ and the matrix determinant lemma for its determinant (Bishop, *Pattern
Recognition and Machine Learning*, section 12.2 and appendix C). Estimators and objectives are
compared with these values; fitted to data, the model is also the baseline that a VAE must beat.

Shapes: B examples, D data values, d latent values.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from vae.models import LEVELS, VAE, DiagonalNormal, VAEConfig, inverse_softplus, raw_log_scale

LOG_2PI = math.log(2 * math.pi)


DENSE = 4096
"""Data values up to which the covariance is kept as a matrix, 134 MB."""

BLOCK_VALUES = 2**22
"""Data values that are turned into float64 at a time."""


class FactorAnalysis:
    """x ~ N(loc, weight weightᵀ + diag(noise_variance)), with every quantity exact.

    Args:
        loc: mean of x, (D,).
        weight: factor loadings W, (D, d).
        noise_variance: diagonal of Ψ, (D,), positive.

    Arithmetic is in the arguments' dtype; integers and mixed dtypes become the widest one.

    Raises:
        ValueError: shapes that don't fit, values that aren't finite, a variance not positive.
    """

    def __init__(self, loc: Tensor, weight: Tensor, noise_variance: Tensor) -> None:
        loc, weight, noise_variance = (
            torch.as_tensor(value) for value in (loc, weight, noise_variance)
        )
        if loc.ndim != 1 or weight.ndim != 2 or noise_variance.shape != loc.shape:
            raise ValueError(
                "factor analysis takes loc (D,), weight (D, d) and noise_variance (D,); found "
                f"{tuple(loc.shape)}, {tuple(weight.shape)} and {tuple(noise_variance.shape)}"
            )
        if weight.shape[0] != loc.shape[0] or weight.shape[1] < 1:
            raise ValueError(
                f"weight must be (D, d) with D = {loc.shape[0]} as loc and d of at least 1; "
                f"found {tuple(weight.shape)}"
            )
        dtype = torch.promote_types(
            torch.promote_types(loc.dtype, weight.dtype), noise_variance.dtype
        )
        if not dtype.is_floating_point:
            dtype = torch.get_default_dtype()
        self.loc = loc.to(dtype)
        self.weight = weight.to(dtype)
        self.noise_variance = noise_variance.to(dtype)
        for name in ("loc", "weight", "noise_variance"):
            if not bool(getattr(self, name).isfinite().all()):
                raise ValueError(f"{name} must be finite")
        if not bool((self.noise_variance > 0).all()):
            raise ValueError(
                "noise_variance must be positive in every dimension; smallest found is "
                f"{self.noise_variance.min().item():g}"
            )

    def __repr__(self) -> str:
        return f"FactorAnalysis(D={self.num_values}, latent_dim={self.latent_dim})"

    @property
    def num_values(self) -> int:
        """D, the number of data values."""
        return self.weight.shape[0]

    @property
    def latent_dim(self) -> int:
        """d, the number of factors."""
        return self.weight.shape[1]

    @cached_property
    def _whitened_weight(self) -> Tensor:
        return self.weight / self.noise_variance.sqrt()[:, None]  # A = Ψ^-½ W, (D, d)

    @cached_property
    def _precision(self) -> Tensor:
        A = self._whitened_weight
        return torch.eye(self.latent_dim, dtype=A.dtype, device=A.device) + A.T @ A

    @cached_property
    def _precision_cholesky(self) -> Tensor:
        return torch.linalg.cholesky(self._precision)

    @cached_property
    def _posterior_scale_tril(self) -> Tensor:
        unit = torch.zeros_like(self._precision[0])
        return MultivariateNormal(unit, precision_matrix=self._precision).scale_tril

    @cached_property
    def _log_normaliser(self) -> Tensor:
        """log |2π (W Wᵀ + Ψ)|, by the matrix determinant lemma |W Wᵀ + Ψ| = |Ψ| |M|."""
        log_det = self.noise_variance.log().sum()
        log_det = log_det + 2 * self._precision_cholesky.diagonal().log().sum()
        return self.num_values * LOG_2PI + log_det

    def _whiten(self, x: Tensor) -> Tensor:
        """Ψ^-½ (x - loc), (B, D); x may come in any shape (B, ...) of D values each."""
        x = torch.as_tensor(x)
        if x.shape[-1] != self.num_values:
            x = x.flatten(1) if x.ndim > 1 else x
        if x.ndim == 0 or x.shape[-1] != self.num_values:
            raise ValueError(
                f"x must hold {self.num_values} values for each example; found {tuple(x.shape)}"
            )
        x = x.to(device=self.loc.device, dtype=self.loc.dtype)
        return (x - self.loc) / self.noise_variance.sqrt()

    def _posterior_mean(self, whitened: Tensor) -> Tensor:
        projected = whitened @ self._whitened_weight
        return torch.cholesky_solve(projected[..., None], self._precision_cholesky)[..., 0]

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log p(x) = log N(x; loc, W Wᵀ + Ψ) in nats, (B,).

        With r = Ψ^-½(x - loc), A = Ψ^-½W and the posterior mean m = M⁻¹Aᵀr, Woodbury's
        rᵀ(I + AAᵀ)⁻¹r equals |r - A m|² + |m|²: a sum of squares, which loses no digits to
        cancellation however small the noise.
        """
        r = self._whiten(x)
        m = self._posterior_mean(r)
        squares = (r - m @ self._whitened_weight.T).square().sum(-1) + m.square().sum(-1)
        return -0.5 * (self._log_normaliser + squares)

    def posterior(self, x: Tensor) -> MultivariateNormal:
        """Exact p(z|x) = N(M⁻¹Wᵀ Ψ⁻¹(x - loc), M⁻¹), batch (B,), event (d,)."""
        mean = self._posterior_mean(self._whiten(x))
        return MultivariateNormal(mean, scale_tril=self._posterior_scale_tril)

    def prior(self) -> Independent:
        """p(z) = N(0, I), event (d,)."""
        zero = torch.zeros_like(self.weight[0])
        return Independent(Normal(zero, torch.ones_like(zero)), 1)

    def likelihood(self, z: Tensor) -> Independent:
        """p(x|z) = N(loc + W z, Ψ), batch z.shape[:-1], event (D,)."""
        return Independent(Normal(self.loc + z @ self.weight.T, self.noise_variance.sqrt()), 1)

    def elbo(self, x: Tensor, q: Distribution) -> Tensor:
        """Exact E_q[log p(x|z)] - KL(q || p(z)) in nats, (B,), for any Gaussian q.

        Args:
            x: (B, D).
            q: a Gaussian over z: `MultivariateNormal`, a diagonal `Independent(Normal)`, or any
                distribution with `mean` and `scale_tril`; batch (B,) or (), event (d,).
        """
        r = self._whiten(x)
        mean, scale_tril = gaussian_moments(q)
        A = self._whitened_weight
        squares = (r - mean @ A.T).square().sum(-1) + (A @ scale_tril).square().sum((-2, -1))
        constant = self.num_values * LOG_2PI + self.noise_variance.log().sum()
        log_px_z = -0.5 * (constant + squares)
        log_det = 2 * scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        spread = mean.square().sum(-1) + scale_tril.square().sum((-2, -1))
        return log_px_z - 0.5 * (spread - self.latent_dim - log_det)

    def sample(
        self, num_examples: int, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw (x, z) from the model: (num_examples, D) and (num_examples, d)."""
        like = {"dtype": self.loc.dtype, "device": self.loc.device, "generator": generator}
        z = torch.randn(num_examples, self.latent_dim, **like)
        noise = torch.randn(num_examples, self.num_values, **like)
        return self.loc + z @ self.weight.T + noise * self.noise_variance.sqrt(), z

    @classmethod
    def fit(
        cls,
        x: Tensor,
        latent_dim: int,
        *,
        min_noise: float = 1e-6,
        max_iter: int = 1000,
        tol: float = 1e-6,
        seed: int = 0,
    ) -> FactorAnalysis:
        """Maximum likelihood by expectation-maximisation, in float64.

        Rubin and Thayer, *EM algorithms for ML factor analysis* (1982), with the parameter
        expansion of Liu, Rubin and Wu (1998): z's covariance is free within a step and folded back
        into W, which leaves the maximum where it was and reaches it in far fewer steps. The data
        enter through their covariance only: a step costs O(D² d) up to D = 4096 values, and
        O(N D d) in memory of O(D d) beyond the data above.

        Args:
            x: (N, D) or (N, ...), any numeric dtype.
            latent_dim: d, fewer than D.
            min_noise: smallest noise variance, in squared units of x; it keeps a constant column
                from making the density infinite.
            max_iter: steps at most.
            tol: stops when the mean log-likelihood per example rises by less, in nats.
            seed: of the starting loadings.

        Raises:
            ValueError: fewer than 2 rows, values that aren't finite, latent_dim out of range.
        """
        x = torch.as_tensor(x).flatten(1)
        num_examples, num_values = x.shape
        if num_examples < 2:
            raise ValueError(f"factor analysis needs at least 2 rows of data; found {num_examples}")
        if not 1 <= latent_dim < max(num_values, 2):
            raise ValueError(
                f"latent_dim of factor analysis must lie in 1 … {num_values - 1} for data of "
                f"{num_values} values; found {latent_dim} (model.latent_dim)"
            )
        if not min_noise > 0:
            raise ValueError(f"min_noise must be positive; found {min_noise}")
        covariance = _Covariance(x)
        loc = covariance.loc
        if not bool(loc.isfinite().all()):
            raise ValueError("x holds values that are not finite")
        variance = covariance.diagonal.clamp_min(min_noise)

        generator = torch.Generator(x.device).manual_seed(seed)
        like = {"dtype": torch.float64, "device": x.device}
        noise = (0.5 * variance).clamp_min(min_noise)
        weight = torch.randn(num_values, latent_dim, generator=generator, **like)
        weight = weight * (0.5 * variance / latent_dim).sqrt()[:, None]
        previous = -math.inf
        for _ in range(max_iter):
            log_likelihood, W, psi = _em_step(covariance, weight, noise, min_noise)
            if log_likelihood - previous < tol:
                break
            previous, weight, noise = log_likelihood, W, psi
        return cls(loc, weight, noise)

    def as_vae(
        self,
        space: str = "continuous",
        data_shape: tuple[int, ...] | None = None,
        *,
        shift: float = 0.0,
        widen: float = 1.0,
    ) -> VAE:
        """The same model as a VAE: linear decoder, linear encoder, full-covariance posterior.

        Args:
            space: `continuous`, where its ELBO equals `log_prob(x)` and its importance weights are
                constant; or `grey8`, where this model lives on y = (x + 0.5) / 256 and the VAE
                gives each pixel the exact mass of its bin.
            data_shape: shape of one example, D values in all; (D,) if not given.
            shift, widen: put the encoder off on purpose: its mean off the exact posterior's by
                `shift` of its Cholesky factor in every direction, its standard deviations `widen`
                times the exact ones. Then KL(q || posterior) is `proposal_kl(shift, widen)`.
        """
        if space not in ("continuous", "grey8"):
            raise ValueError(
                "factor analysis models real numbers, so it becomes a VAE in the spaces continuous "
                f"and grey8; data.space is {space}"
            )
        if not (widen > 0 and math.isfinite(widen) and math.isfinite(shift)):
            raise ValueError(f"widen must be positive and shift finite; found {widen} and {shift}")
        data_shape = (self.num_values,) if data_shape is None else tuple(data_shape)
        if math.prod(data_shape) != self.num_values:
            raise ValueError(
                f"data_shape {data_shape} holds {math.prod(data_shape)} values; this model has "
                f"{self.num_values}"
            )
        # The VAE's own units: raw = centre + unit * standardised; in grey8 y is 256 levels wide.
        sigma = self.noise_variance.sqrt()
        if space == "grey8":
            unit = torch.ones_like(sigma)
            centre, width, mean = LEVELS * self.loc - 0.5, LEVELS * unit, self.loc
        else:
            unit = (self.weight.square().sum(1) + self.noise_variance).sqrt()
            centre, width, mean = self.loc, unit, torch.zeros_like(unit)
        config = VAEConfig(
            data_shape=data_shape,
            space=space,
            latent_dim=self.latent_dim,
            likelihood="gaussian",
            network="mlp",
            hidden=(),
            posterior="full",
            min_scale=min(1e-3, 0.5 * (sigma / unit).min().item()),
        )
        with torch.random.fork_rng(devices=[]):  # initial weights, which are all replaced
            vae = VAE(config).to(device=self.loc.device, dtype=self.loc.dtype)
        S = self._posterior_scale_tril
        below = torch.tril_indices(self.latent_dim, self.latent_dim, -1)
        gain = S @ S.T @ (self._whitened_weight / sigma[:, None]).T  # M⁻¹Wᵀ Ψ⁻¹, (d, D)
        with torch.no_grad():
            vae.data_loc.copy_(centre.reshape(data_shape))
            vae.data_scale.copy_(width.reshape(data_shape))
            decoder, encoder = vae.decoder.output, vae.encoder.output
            decoder.weight.zero_()[: self.num_values] = self.weight / unit[:, None]
            raw_scale = inverse_softplus(sigma / unit - config.min_scale)
            decoder.bias.copy_(torch.cat([mean, raw_scale]))
            encoder.weight.zero_()[: self.latent_dim] = gain * unit
            log_diagonal = raw_log_scale((widen * S.diagonal()).log())
            lower = widen * S[below[0], below[1]]
            encoder.bias.copy_(torch.cat([shift * S.sum(1), log_diagonal, lower]))
        return vae

    def proposal_kl(self, shift: float, widen: float) -> float:
        """KL(q || p(z|x)) in nats, the same for every x, of `as_vae(shift=…, widen=…)`'s encoder:
        ½ d (widen² - 1 - 2 log widen + shift²)."""
        return 0.5 * self.latent_dim * (widen**2 - 1 - 2 * math.log(widen) + shift**2)


class _Covariance:
    """S = Σ (x - loc)(x - loc)ᵀ / N of rows x (N, D), in float64: its diagonal and its products.

    Up to DENSE values S is a matrix; above, where it would need more memory than the data, a
    product with it is two passes over the rows, a block of them at a time.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        num_examples, self.num_values = x.shape
        self.rows = max(1, BLOCK_VALUES // self.num_values)
        total = torch.zeros(self.num_values, dtype=torch.float64, device=x.device)
        for block in x.split(self.rows):
            total += block.sum(0, dtype=torch.float64)
        self.loc = total / num_examples
        squares = torch.zeros_like(total)
        for block in x.split(self.rows):
            squares += self._centred(block).square_().sum(0)
        self.diagonal = squares / num_examples
        self.matrix: Tensor | None = None
        if self.num_values <= DENSE:
            matrix = total.new_zeros(self.num_values, self.num_values)
            for block in x.split(self.rows):
                centred = self._centred(block)
                matrix.addmm_(centred.T, centred)
            self.matrix = matrix / num_examples

    def _centred(self, block: Tensor) -> Tensor:
        return block.to(torch.float64) - self.loc

    def __matmul__(self, other: Tensor) -> Tensor:
        """S other, (D, d)."""
        if self.matrix is not None:
            return self.matrix @ other
        total = torch.zeros_like(other)
        for block in self.x.split(self.rows):
            centred = self._centred(block)
            total.addmm_(centred.T, centred @ other)
        return total / len(self.x)


def _em_step(
    S: _Covariance, weight: Tensor, noise: Tensor, min_noise: float
) -> tuple[float, Tensor, Tensor]:
    """Mean log-likelihood per example at (weight, noise) in nats, and the next weight and noise."""
    scaled = weight / noise[:, None]  # Ψ⁻¹ W
    M = torch.eye(weight.shape[1], dtype=noise.dtype, device=noise.device) + weight.T @ scaled
    chol = torch.linalg.cholesky(M)
    projected = S @ scaled
    Exz = torch.cholesky_solve(projected.T, chol).T  # E[(x - loc) zᵀ], (D, d)
    Ezz = torch.cholesky_inverse(chol) + torch.cholesky_solve(scaled.T @ Exz, chol)

    trace = (S.diagonal / noise).sum() - (Exz * scaled).sum()
    log_det = noise.log().sum() + 2 * chol.diagonal().log().sum()
    log_likelihood = -0.5 * (S.num_values * LOG_2PI + log_det + trace)

    chol_zz = torch.linalg.cholesky(0.5 * (Ezz + Ezz.T))
    W = torch.cholesky_solve(Exz.T, chol_zz).T
    psi = (S.diagonal - (W * Exz).sum(1)).clamp_min(min_noise)
    return float(log_likelihood), W @ chol_zz, psi


def gaussian_moments(q: Distribution) -> tuple[Tensor, Tensor]:
    """Mean (*batch, d) and lower Cholesky factor (*batch, d, d) of a Gaussian distribution.

    Raises:
        TypeError: a distribution that isn't known to be Gaussian.
    """
    scale_tril = getattr(q, "scale_tril", None)
    if scale_tril is not None:
        return q.mean, scale_tril
    diagonal = isinstance(q, Independent) and isinstance(q.base_dist, Normal)
    if (diagonal and len(q.event_shape) == 1) or isinstance(q, DiagonalNormal):
        return q.mean, torch.diag_embed(q.stddev)
    raise TypeError(
        "a Gaussian is needed: MultivariateNormal, Independent(Normal), or anything with mean and "
        f"scale_tril; found {type(q).__name__}"
    )
