"""What a trained model does with its latent variables: use, collapse, and what the bound loses.

Every function takes a whole split, x (N, *data_shape) in data units, and encodes it batch by batch.
Shapes: N examples, L latent values, K samples. All information is in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vae.evidence import Evidence, draw_with_log_prob, importance_sampling, standard_normal
from vae.models import VAE, kl

ACTIVE_VARIANCE = 0.01
"""A unit u is active when Var_x E_q[u] exceeds this (Burda et al. 2016, arXiv:1509.00519)."""

BATCH = 1024  # examples encoded at a time
PAIR_VALUES = 2**22  # latent values of pairs of examples held at a time


def active_units(model: VAE, x: Tensor, *, threshold: float = ACTIVE_VARIANCE) -> Tensor:
    """Which latent units carry information about x: Var_x E_q(u|x)[u] > threshold, (L,) bool.

    Burda, Grosse and Salakhutdinov (2016), section 5.2. The variance is over the whole split.
    """
    return posterior_means(model, x).var(0, correction=0) > threshold


def posterior_means(model: VAE, x: Tensor) -> Tensor:
    """E_q(z|x)[z] of every example, (N, L)."""
    with torch.no_grad():
        return torch.cat([q.mean for q in _posteriors(model, x)])


def kl_per_dimension(model: VAE, x: Tensor) -> Tensor | None:
    """KL(q(z|x) || p(z)) by latent dimension, its mean over the split, (L,), nats.

    The terms sum to the mean KL; with a full covariance they follow its chain rule. None where
    the KL has no closed form (a flow, a learned prior, several stochastic layers).
    """
    with torch.no_grad():
        prior = model.prior()
        total, count = None, 0
        for q in _posteriors(model, x):
            terms = kl.kl_per_dimension(q, prior)  # pyright: ignore[reportArgumentType]
            if terms is None:
                return None
            batch_sum = terms.double().sum(0)
            total = batch_sum if total is None else total + batch_sum
            count += len(terms)
    return None if total is None else total / count


def posterior_gap(evidence: Evidence) -> Tensor:
    """log p(x) - elbo = KL(q(z|x) || p(z|x)), (B,), nats: what the bound loses to the encoder."""
    return evidence.log_px - evidence.elbo


def pruned_evidence(
    model: VAE,
    x: Tensor,
    num_samples: int,
    *,
    active: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Evidence:
    """log p(x) of the model without its inactive units, by importance sampling.

    The decoder reads each inactive unit's mean over the split instead of the unit, so the estimate
    is that of ∫ p(x | z_active, mean) p(z) dz. Where the units are truly unused it equals the whole
    model's. With several stochastic layers, it prunes the one that the decoder reads.

    Args:
        active: (L,) bool; `active_units(model, x)` if None.
        num_samples, generator: as in `importance_sampling`.
    """
    means = posterior_means(model, x)
    if active is None:
        active = means.var(0, correction=0) > ACTIVE_VARIANCE
    pruned = cast(VAE, _Pruned(model, active.to(means.device), means.mean(0)))
    return importance_sampling(pruned, x, num_samples, generator=generator)


class _Pruned(nn.Module):
    """A VAE whose decoder reads constants in place of its inactive units."""

    def __init__(self, model: VAE, active: Tensor, constants: Tensor) -> None:
        super().__init__()
        self.model, self.active, self.constants = model, active, constants

    def products_in(self, precision: str) -> AbstractContextManager[None]:
        return self.model.products_in(precision)

    def posterior(self, x: Tensor) -> Distribution:
        return self.model.posterior(x)

    def prior(self) -> Distribution:
        return self.model.prior()

    def likelihood(self, z: Tensor) -> Distribution:
        return self.model.likelihood(torch.where(self.active, z, self.constants))


@dataclass(frozen=True, kw_only=True)
class AggregateTerms:
    """The mean KL of a split in two parts, mutual_information + aggregate_kl, in nats.

    Attributes:
        mutual_information: of x and z under q(z|x), a lower bound in expectation, and at most
            log N: with x from N examples no more can be seen (Poole et al. 2019, eq. 12).
        most_information: an upper bound in expectation, that with each example left out of its own
            mixture (Poole et al. 2019, eq. 13), or the mean KL where that is lower.
        aggregate_kl: KL(q(z) || p(z)) of the aggregate posterior q(z) = 1/N Σ q(z|x_n): how far
            the codes of the data are from what the prior would draw; where the mutual information
            stops at log N, this has the rest.
        num_examples: N.
    """

    mutual_information: float
    most_information: float
    aggregate_kl: float
    num_examples: int

    @property
    def is_saturated(self) -> bool:
        """Whether the split is too small to see the mutual information: its bounds are 1 nat or
        more apart."""
        return self.most_information - self.mutual_information >= 1


def aggregate_terms(
    model: VAE,
    x: Tensor,
    *,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> AggregateTerms:
    """Mutual information and KL of the aggregate posterior (Hoffman and Johnson 2016).

    The mutual information is bounded from both sides (Poole, Ozair, van den Oord, Alemi and Tucker
    2019, *On variational bounds of mutual information*, arXiv:1905.06922).

    z ~ q(z|x_n) for every example, num_samples times; q(z) is the exact mixture over the split, so
    the cost is num_samples x N² densities of q.
    """
    like = next(model.parameters())
    with torch.no_grad():
        x = x.to(like.device)
        q, p = model.posterior(x), model.prior()
        count, size = len(x), q.event_shape[0]
        eps = standard_normal((num_samples, count, size), like=like, generator=generator)
        z, log_q_given_x = draw_with_log_prob(q, eps)
        z = z.flatten(0, 1)
        rows = max(1, PAIR_VALUES // (count * size))
        own = torch.arange(count, device=z.device).repeat(num_samples)
        sums, others = [], []
        for part, places in zip(z.split(rows), own.split(rows), strict=True):
            pairs = q.log_prob(part[:, None]).double()
            sums.append(pairs.logsumexp(1))
            others.append(pairs.scatter(1, places[:, None], -math.inf).logsumexp(1))
        log_q = torch.cat(sums) - math.log(count)
        log_q_of_others = torch.cat(others) - math.log(max(1, count - 1))
        log_q_given_x, log_p = log_q_given_x.flatten().double(), p.log_prob(z).double()
        without_own = (log_q_given_x - log_q_of_others).mean().item()
        return AggregateTerms(
            mutual_information=(log_q_given_x - log_q).mean().item(),
            most_information=min(without_own, (log_q_given_x - log_p).mean().item()),
            aggregate_kl=(log_q - log_p).mean().item(),
            num_examples=count,
        )


def collapse_verdict(model: VAE, x: Tensor) -> str:
    """Whether the posterior has collapsed on this split, in words for the report."""
    active = active_units(model, x)
    found, of = int(active.sum()), len(active)
    units = f"{found} of {of} latent units {'is' if found == 1 else 'are'} active"
    if found == 0:
        return (
            f"posterior collapse: {units}, so the decoder ignores z; try "
            "objective.beta_warmup_epochs or objective.free_bits"
        )
    if 2 * found < of:
        return f"partial collapse: {units}; a smaller model.latent_dim would serve as well"
    return f"no collapse: {units}"


def _posteriors(model: VAE, x: Tensor) -> Iterator[Distribution]:
    device = next(model.parameters()).device
    for part in x.split(BATCH):
        yield model.posterior(part.to(device))
