"""KL divergences between latent distributions, in closed form where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributions import register_kl

from vae.models.latent_distributions import (
    CholeskyNormal,
    DiagonalNormal,
    LatentDistribution,
    StandardNormal,
)


def kl_per_dimension(q: LatentDistribution, p: LatentDistribution) -> Tensor | None:
    """Closed-form KL(q‖p) in nats as a sum over latent dimensions, (*batch, L), or None.

    Each term is at least 0. For a full covariance they follow the chain rule of the KL, in the
    order of the dimensions: E KL(q(z_j | z_<j) ‖ p(z_j)).
    """
    formula = _CLOSED_FORMS.get((type(q), type(p)))
    return None if formula is None else formula(q, p)


def kl_divergence(q: LatentDistribution, p: LatentDistribution) -> Tensor | None:
    """Closed-form KL(q‖p) in nats, (*batch), where there is one, else None."""
    terms = kl_per_dimension(q, p)
    return None if terms is None else terms.sum(-1)


def _diagonal_standard(q: DiagonalNormal, p: StandardNormal) -> Tensor:
    """Kingma and Welling (2014), appendix B."""
    return 0.5 * (q.loc.square() + q.scale.square() - 1) - q.log_scale


def _diagonal_diagonal(q: DiagonalNormal, p: DiagonalNormal) -> Tensor:
    ratio = (q.scale / p.scale).square()
    distance = ((q.loc - p.loc) / p.scale).square()
    return 0.5 * (ratio + distance - 1) - (q.log_scale - p.log_scale)


def _cholesky_standard(q: CholeskyNormal, p: StandardNormal) -> Tensor:
    return 0.5 * (q.loc.square() + q.variance - 1) - q.log_diagonal


_CLOSED_FORMS: dict[tuple[type, type], Callable[[Any, Any], Tensor]] = {
    (DiagonalNormal, StandardNormal): _diagonal_standard,
    (DiagonalNormal, DiagonalNormal): _diagonal_diagonal,
    (CholeskyNormal, StandardNormal): _cholesky_standard,
}


def _register(q: type, p: type, formula: Callable[[Any, Any], Tensor]) -> None:
    """Let torch.distributions.kl_divergence know the closed form too."""
    register_kl(q, p)(lambda q, p: formula(q, p).sum(-1))
