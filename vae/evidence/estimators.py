"""Evidence: log p(x) by prior Monte Carlo, importance sampling and annealed importance sampling.

    p(x) = E_q[w],    w = p(x|z) p(z) / q(z|x),    log p(x) ≈ log (1/K) Σ_k w_k,    z_k ~ q(z|x)

The estimate of p(x) is unbiased, so that of log p(x) is a lower bound in expectation (Jensen). It
tightens with K (Burda, Grosse and Salakhutdinov 2016, arXiv:1509.00519, theorem 1), but no sample
size makes a bad proposal good; hence every estimate carries its standard error, its effective
sample size and the Pareto shape k̂ of its largest weights.

Shapes: B examples, K samples, C samples in a chunk, D data values, d latent values. All in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.distributions import Distribution

from vae import acceleration
from vae.checks import check_name
from vae.evidence.annealing import Bounds, annealed_importance_sampling, bidirectional
from vae.evidence.noise import (
    Generators,
    block_by_block,
    noise_blocks,
    normal_blocks,
    seeded_sample,
)
from vae.evidence.proposals import make_proposal
from vae.evidence.weights import Evidence, WeightStream, draw_with_log_prob, joined
from vae.models import PRECISIONS, VAE, CholeskyNormal
from vae.system import in_threads, keep_freed_memory, samples_at_once
from vae.trust import KHAT_LIMIT

__all__ = [
    "KHAT_LIMIT",
    "Bounds",
    "Evidence",
    "annealed_importance_sampling",
    "bidirectional",
    "importance_sampling",
    "prior_monte_carlo",
]

CHUNK_VALUES = {"cpu": 2**20, "cuda": 2**26}
"""Decoder outputs that a thread holds at a time by default: the fastest on a CPU, a few hundred MB
on a GPU."""

FIRST_STOP = 256
STOP_ESS, STOP_KHAT = 200.0, 0.5
"""When adaptive sampling may stop, besides the standard error; the first number of samples is a
multiple of `NOISE_BLOCK`, so that an example's noise is the same as without stops."""


def importance_sampling(
    model: VAE,
    x: Tensor,
    num_samples: int,
    *,
    generator: Generators = None,
    chunk_size: int | None = None,
    proposal: str = "encoder",
    target_se: float | None = None,
    precision: str = "fp32",
    fast: bool = True,
) -> Evidence:
    """log p(x) with the model's posterior q(z|x) as proposal (Rezende et al. 2014, appendix E).

    Encodes x once and decodes num_samples x B latents, `chunk_size` samples of every example at a
    time; the sums are streamed, so memory does not grow with num_samples. A call with much work for
    a perceptron of Bernoulli pixels compiles it (`vae.fast.compiled_decoder`).

    Args:
        model: a VAE; its parameters' dtype and device decide.
        x: (B, *data_shape), in data units and any numeric dtype.
        num_samples: K, exactly the number of weights for each example; with target_se the most.
        generator: source of the noise, torch's default one if None; or one for each example, so
            that its estimate does not depend on the others in the batch. The same generator state
            gives the same noise whatever the chunk size.
        chunk_size: samples of each example decoded at a time; by default as many as keep the
            decoder's outputs within a fixed memory for each thread.
        proposal: encoder (q as it is), or laplace or refined: a Gaussian fitted to each example's
            posterior first. `elbo` and `log_px_z` are then the proposal's.
        target_se: stop sampling an example at 256, 512, 1024, … samples once its standard error
            (nats) is at most that, with an effective sample size of at least 200 and khat below
            0.5, so that the standard error means something. An example with a heavy tail goes on:
            its estimate is too low until a large weight comes, and looks precise meanwhile.
        precision: of the decoder's matrix products, a name in `vae.models.vae.PRECISIONS`.
        fast: whether a fast path may take the decoder's place (`vae.fast`).

    Raises:
        ValueError: num_samples or chunk_size below 1, target_se not above 0, or an unknown
            proposal or precision.
    """
    for fault in check_name("precision", precision, PRECISIONS):
        raise ValueError(fault)
    if target_se is not None and not target_se > 0:
        raise ValueError(f"target_se must be above 0; found {target_se}")
    keep_freed_memory()
    like = next(model.parameters())
    x = _on(x, like)
    q = make_proposal(proposal, model, x)
    with acceleration.allowed(fast), torch.inference_mode():
        source = _Source(model, model.prior(), x, q, generator, precision)
        stream = _new_stream(model, num_samples, x)
        places = torch.arange(len(x), device=like.device)
        parts: list[tuple[Tensor, Evidence]] = []
        for stop in _stops(num_samples, target_se):
            for log_w, log_px_z in joined(source.weights(stop - stream.seen, chunk_size)):
                stream.add(log_w, log_px_z)
            evidence = stream.evidence()
            done = torch.ones_like(places, dtype=torch.bool)
            if stop < num_samples and target_se is not None:
                done = _is_precise(evidence, target_se)
            parts.append((places[done], evidence.map(lambda value, done=done: value[done])))
            if done.all():
                break
            stream.keep(~done)
            places, source = places[~done], source.only(~done)
    return Evidence.join(parts)


@dataclass(frozen=True)
class _Source:
    """Where the weights of examples x (B, *data_shape) come from: noise, and the proposal q."""

    model: VAE
    p: Distribution
    x: Tensor
    q: Distribution
    generator: Generators
    precision: str

    def noise(self, count: int) -> Tensor:
        shape = (count, *self.q.batch_shape, *self.q.event_shape)
        like = next(self.model.parameters())
        return normal_blocks(shape, like=like, generator=self.generator)

    def weights(self, count: int, chunk_size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """log w and log p(x|z) of so many samples, in chunks (C, B)."""
        chunk = _chunk_size(self.x, chunk_size)
        noise = noise_blocks(self.noise, count, chunk)
        compiled = None
        # The first chunks of a thread cost as much as it saves, and what is compiled has one core.
        if count >= 4 * torch.get_num_threads() * chunk:
            compiled = acceleration.compiled_decoder(self.model, self.x, self.precision, count)
        with self.model.products_in(self.precision):
            if compiled is not None:
                yield from in_threads(partial(self.weigh, compiled), noise)
            else:
                yield from map(partial(self.weigh, self.log_px_z), noise)

    def log_px_z(self, z: Tensor) -> Tensor:
        """The model's own log p(x|z), (C, B), of z (C, B, d)."""
        return self.model.likelihood(z).log_prob(self.x)

    @torch.inference_mode()
    def weigh(self, log_px_z_at: Callable[[Tensor], Tensor], eps: Tensor) -> tuple[Tensor, Tensor]:
        """log w and log p(x|z), each (C, B), of noise (C, B, d)."""
        z, log_q = draw_with_log_prob(self.q, eps)
        log_px_z = log_px_z_at(z)
        return log_px_z + self.p.log_prob(z) - log_q, log_px_z

    def only(self, chosen: Tensor) -> _Source:
        """The same of some examples. chosen: (B,) bool."""
        x, q, generator = self.x[chosen], self.q, self.generator
        # A refined Gaussian is kept; an encoder's posterior is cheaper made again than cut.
        q = q.take(chosen) if isinstance(q, CholeskyNormal) else self.model.posterior(x)
        if isinstance(generator, Sequence):
            generator = [own for own, kept in zip(generator, chosen, strict=True) if kept]
        return replace(self, x=x, q=q, generator=generator)


def _stops(num_samples: int, target_se: float | None) -> list[int]:
    """The numbers of samples after which an example may be done."""
    stops = [num_samples]
    if target_se is not None:
        stop = FIRST_STOP
        while stop < num_samples:
            stops.insert(-1, stop)
            stop *= 2
    return stops


def _is_precise(evidence: Evidence, target_se: float) -> Tensor:
    """Whether an example needs no more samples, (B,) bool."""
    enough = (evidence.ess >= STOP_ESS) & (evidence.khat < STOP_KHAT)
    return enough & (evidence.se <= target_se)


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

        stream = _new_stream(model, num_samples, x)
        chunk = _chunk_size(x, chunk_size)
        latents = noise_blocks(partial(block_by_block, draw), num_samples, chunk)
        for log_w, log_px_z in joined(map(weigh, latents)):
            stream.add(log_w, log_px_z)
    return stream.evidence().map(torch.clone)


def _on(x: Tensor, like: Tensor) -> Tensor:
    """x beside the model; integers become floats here, once, and not in every chunk."""
    return x.to(like.device) if x.is_floating_point() else x.to(like)


def _new_stream(model: VAE, num_samples: int, x: Tensor) -> WeightStream:
    resolution = torch.finfo(next(model.parameters()).dtype).eps
    return WeightStream(num_samples, len(x), resolution=resolution, device=x.device)


def _chunk_size(x: Tensor, wanted: int | None) -> int:
    """Samples of each example of x that are decoded at a time."""
    if wanted is None:
        return samples_at_once(x, CHUNK_VALUES)
    if wanted < 1:
        raise ValueError(f"chunk_size must be at least 1; found {wanted}")
    return wanted
