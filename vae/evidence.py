"""Evidence: log p(x) by prior Monte Carlo, importance sampling and annealed importance sampling.

    p(x) = E_q[w],    w = p(x|z) p(z) / q(z|x),    log p(x) ≈ log (1/K) Σ_k w_k,    z_k ~ q(z|x)

The estimate of p(x) is unbiased, so that of log p(x) is a lower bound in expectation (Jensen). It
tightens with K (Burda, Grosse and Salakhutdinov 2016, arXiv:1509.00519, theorem 1), but no sample
size makes a bad proposal good; hence every estimate carries its standard error, its effective
sample size and the Pareto shape k̂ of its largest weights.

Shapes: B examples, K samples, C samples in a chunk, D data values, d latent values. All in nats.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vae.annealing import Bounds, annealed_importance_sampling, bidirectional
from vae.importance_weights import (
    KHAT_LIMIT,
    Evidence,
    Generators,
    WeightStream,
    draw_with_log_prob,
    noise_blocks,
    seeded_sample,
    standard_normal,
)
from vae.model import VAE
from vae.proposals import make_proposal

__all__ = [
    "KHAT_LIMIT",
    "Bounds",
    "Evidence",
    "annealed_importance_sampling",
    "bidirectional",
    "importance_sampling",
    "prior_monte_carlo",
]

CHUNK_VALUES = {"cpu": 2**18, "cuda": 2**26}
"""Decoder outputs held at a time by default: about a cache on a CPU, a few hundred MB on a GPU."""


def importance_sampling(
    model: VAE,
    x: Tensor,
    num_samples: int,
    *,
    generator: Generators = None,
    chunk_size: int | None = None,
    proposal: str = "encoder",
) -> Evidence:
    """log p(x) with the model's posterior q(z|x) as proposal (Rezende et al. 2014, appendix E).

    Encodes x once and decodes num_samples x B latents, `chunk_size` samples of every example at a
    time; the sums are streamed, so memory does not grow with num_samples.

    Args:
        model: a VAE; its parameters' dtype and device decide.
        x: (B, *data_shape), in data units and any numeric dtype.
        num_samples: K, exactly the number of weights for each example.
        generator: source of the noise, torch's default one if None; or one for each example, so
            that its estimate does not depend on the others in the batch. The same generator state
            gives the same noise whatever the chunk size.
        chunk_size: samples of each example decoded at a time; by default as many as keep the
            decoder's outputs within a fixed memory.
        proposal: encoder (q as it is), or laplace or refined: a Gaussian fitted to each example's
            posterior first (`vae.proposals`). `elbo` and `log_px_z` are then the proposal's.

    Raises:
        ValueError: num_samples or chunk_size below 1, or an unknown proposal.
    """
    like = next(model.parameters())
    x = _on(x, like)
    q = make_proposal(proposal, model, x)
    with torch.inference_mode():
        p = model.prior()
        shape = (*q.batch_shape, *q.event_shape)

        def draw(count: int) -> Tensor:
            return standard_normal((count, *shape), like=like, generator=generator)

        def weigh(eps: Tensor) -> tuple[Tensor, Tensor]:
            z, log_q = draw_with_log_prob(q, eps)
            log_px_z = model.likelihood(z).log_prob(x)
            return log_px_z + p.log_prob(z) - log_q, log_px_z

        evidence = _stream(model, x, num_samples, draw, weigh, chunk_size)
    return _ordinary(evidence)


def prior_monte_carlo(
    model: VAE,
    x: Tensor,
    num_samples: int,
    *,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Evidence:
    """log p(x) ≈ log (1/K) Σ p(x|z_k), z_k ~ p(z): importance sampling with the prior as proposal.

    Kept to show what it costs to sample z blindly: its effective sample size falls exponentially
    with the latent dimension. Arguments, result and errors as in `importance_sampling`; each
    example has latents of its own.
    """
    like = next(model.parameters())
    with torch.inference_mode():
        x = _on(x, like)
        p = model.prior()

        def draw(count: int) -> Tensor:
            return seeded_sample(p, (count, x.shape[0]), device=like.device, generator=generator)

        def weigh(z: Tensor) -> tuple[Tensor, Tensor]:
            log_px_z = model.likelihood(z).log_prob(x)
            return log_px_z, log_px_z

        evidence = _stream(model, x, num_samples, draw, weigh, chunk_size)
    return _ordinary(evidence)


def _on(x: Tensor, like: Tensor) -> Tensor:
    """x beside the model; integers become floats here, once, and not in every chunk."""
    return x.to(like.device) if x.is_floating_point() else x.to(like)


def _stream(
    model: VAE,
    x: Tensor,
    num_samples: int,
    draw: Callable[[int], Tensor],
    weigh: Callable[[Tensor], tuple[Tensor, Tensor]],
    chunk_size: int | None,
) -> Evidence:
    if chunk_size is None:
        values = max(1, x[:1].numel()) * max(1, x.shape[0])
        chunk_size = max(1, CHUNK_VALUES.get(x.device.type, CHUNK_VALUES["cpu"]) // values)
    elif chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; found {chunk_size}")
    resolution = torch.finfo(next(model.parameters()).dtype).eps
    stream = WeightStream(num_samples, x.shape[0], resolution=resolution, device=x.device)
    for chunk in noise_blocks(draw, num_samples, chunk_size):
        stream.add(*weigh(chunk))
    return stream.evidence()


def _ordinary(evidence: Evidence) -> Evidence:
    """The same values as tensors that may be used outside inference mode too."""
    return Evidence(
        log_px=evidence.log_px.clone(),
        se=evidence.se.clone(),
        ess=evidence.ess.clone(),
        khat=evidence.khat.clone(),
        ladder={k: value.clone() for k, value in evidence.ladder.items()},
        elbo=evidence.elbo.clone(),
        log_px_z=evidence.log_px_z.clone(),
    )
