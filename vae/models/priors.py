"""Priors p(z), and the Gaussian building block that priors and posteriors share.

Shapes: B batch, L latent values, M mixture components; * any leading (sample) dimensions.
All log-densities are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vae.models.latent_distributions import DiagonalNormal, Mixture, Reparameterized, StandardNormal
from vae.models.networks import mlp

LOG_SCALE_BOUND = 10.0


def bounded_log_scale(raw: Tensor) -> Tensor:
    """A network's number -> the log of a standard deviation, between -10 and 10.

    10 tanh(raw / 10), nearly the identity where it matters: an outlier far from the training data
    must not make exp(log scale) overflow, nor a scale so small that z - loc loses its digits.
    """
    return LOG_SCALE_BOUND * torch.tanh(raw / LOG_SCALE_BOUND)


def raw_log_scale(log_scale: Tensor) -> Tensor:
    """The inverse of `bounded_log_scale`: what a network must put out for this log scale.

    Raises ValueError where no number gives it, |log scale| >= 10.
    """
    if not bool((log_scale.abs() < LOG_SCALE_BOUND).all()):
        worst = log_scale.abs().max().item()
        raise ValueError(
            f"posterior scales lie between exp(-10) and exp(10); found |log scale| {worst:.3g}"
        )
    return LOG_SCALE_BOUND * torch.atanh(log_scale / LOG_SCALE_BOUND)


class ConditionalNormal(nn.Module):
    """p(lower | upper): a diagonal Gaussian whose parameters an MLP computes."""

    def __init__(self, upper: int, lower: int, hidden: Sequence[int], activation: str) -> None:
        super().__init__()
        self.network = mlp(upper, hidden, 2 * lower, activation)

    def forward(self, z: Tensor) -> DiagonalNormal:
        loc, log_scale = self.network(z).to(z.dtype).chunk(2, -1)
        return DiagonalNormal(loc, bounded_log_scale(log_scale))


Encode = Callable[[Tensor], Reparameterized]


class NormalPrior(nn.Module):
    """p(z) = N(0, I)."""

    def __init__(self, *, latent_dim: int, num_components: int, input_shape: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.loc: Tensor

    def forward(self, encode: Encode) -> StandardNormal:
        return StandardNormal(self.loc)


class GaussianMixturePrior(nn.Module):
    """p(z) = Σ_m weight_m N(loc_m, diag(scale_m)²), all learned."""

    def __init__(self, *, latent_dim: int, num_components: int, input_shape: Sequence[int]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.loc = nn.Parameter(torch.randn(num_components, latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(num_components, latent_dim))

    def forward(self, encode: Encode) -> Mixture:
        components = DiagonalNormal(self.loc, self.log_scale)
        return Mixture(components, self.logits.log_softmax(0))


class VampPrior(nn.Module):
    """p(z) = 1/M Σ_m q(z | u_m) with learned pseudo-inputs u_m.

    Tomczak and Welling (2018), eq. 9. `pseudo_inputs` are in standardised units; `encode` says
    what they mean.
    """

    def __init__(self, *, latent_dim: int, num_components: int, input_shape: Sequence[int]) -> None:
        super().__init__()
        self.pseudo_inputs = nn.Parameter(torch.randn(num_components, *input_shape))

    def forward(self, encode: Encode) -> Mixture:
        num_components = len(self.pseudo_inputs)
        log_weights = self.pseudo_inputs.new_full((num_components,), -math.log(num_components))
        return Mixture(encode(self.pseudo_inputs), log_weights)


PRIORS: dict[str, type[NormalPrior] | type[GaussianMixturePrior] | type[VampPrior]] = {
    "normal": NormalPrior,
    "mixture": GaussianMixturePrior,
    "vamp": VampPrior,
}
