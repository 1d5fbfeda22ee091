"""From importance weights to evidence: streamed sums, effective sample size, Pareto tail.

Every estimator of log p(x) here ends in K weights for each of B examples with mean p(x). This file
turns them into an `Evidence`.

Shapes: B examples, K samples, C samples in a chunk, M weights in the tail, d latent values. Nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from vae.evidence.pareto import pareto_shape, pareto_unit
from vae.models import Reparameterized
from vae.trust import KHAT_LIMIT

JOINED_SAMPLES = 256
"""Samples of each example that are taken into the sums at a time, at least."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """An estimate of log p(x) from K weights for each example, with its errors; all (B,), in nats.

    Attributes:
        log_px: log (1/K) Σ w, a lower bound on log p(x) in expectation.
        se: Monte-Carlo standard error of log_px by the delta method, √(1/ess - 1/K); NaN at K = 1.
        ess: effective sample size (Σ w)² / Σ w², in 1 … K.
        khat: Pareto shape of the largest min(K/5, 3√K) weights: above 0.7 the estimate is not to
            be trusted; 0 for constant weights; inf where the tail spans more than floats can hold,
            or rounding alone moves log weights by a nat; NaN with fewer than 5 such weights
            (K < 25).
        ladder: {k: log (1/k) Σ w over the first k weights, or all if there are fewer} for
            k = 1, 10, 100, … and K.
        elbo: (1/K) Σ log w, the K-sample estimate of the evidence lower bound.
        log_px_z: (1/K) Σ log p(x|z).
        samples: K of each example, int64: one number unless sampling was adaptive.
    """

    log_px: Tensor
    se: Tensor
    ess: Tensor
    khat: Tensor
    ladder: dict[int, Tensor]
    elbo: Tensor
    log_px_z: Tensor
    samples: Tensor

    @property
    def num_samples(self) -> int:
        """K; the largest that was allowed, if sampling was adaptive."""
        return max(self.ladder)

    @property
    def kl(self) -> Tensor:
        """Monte-Carlo estimate of KL(q(z|x) || p(z)), (B,): log_px_z - elbo."""
        return self.log_px_z - self.elbo

    @property
    def trustworthy(self) -> Tensor:
        """Whether khat is at most 0.7, (B,); False where khat is NaN (too few samples to tell)."""
        return self.khat <= KHAT_LIMIT

    def map(self, change: Callable[[Tensor], Tensor]) -> Evidence:
        """The same evidence with every tensor changed, such as sliced."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        ladder = {k: change(value) for k, value in values.pop("ladder").items()}
        return Evidence(ladder=ladder, **{name: change(value) for name, value in values.items()})

    @staticmethod
    def join(parts: Sequence[tuple[Tensor, Evidence]]) -> Evidence:
        """One evidence from parts, each with the places of its examples in the whole, (B',)."""
        order = torch.cat([places for places, _ in parts]).argsort()
        pieces = [part for _, part in parts]
        columns = {
            field.name: torch.cat([getattr(piece, field.name) for piece in pieces])
            for field in fields(Evidence)
            if field.name != "ladder"
        }
        ladder = {k: torch.cat([piece.ladder[k] for piece in pieces]) for k in pieces[0].ladder}
        return Evidence(ladder=ladder, **columns).map(lambda value: value[order])


class WeightStream:
    """Sums over log weights that arrive in chunks (C, B): O(B √K) memory, in float64.

    Args:
        num_samples: K, the number of weights that will arrive for each example, at most.
        batch_size: B.
        resolution: relative rounding of the arriving log weights; a smaller spread than that
            counts as constant weights.
        device: where the sums live.
    """

    def __init__(
        self, num_samples: int, batch_size: int, *, resolution: float, device: torch.device
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1; found {num_samples}")
        self.num_samples = num_samples
        self.resolution = resolution
        self.seen = 0
        self.rungs = ladder_rungs(num_samples)
        self.ladder: dict[int, Tensor] = {}
        self.tail_length = tail_length(num_samples)
        like = {"dtype": torch.float64, "device": device}
        self.log_sum = torch.full((batch_size,), -math.inf, **like)
        self.log_sum_squares = torch.full((batch_size,), -math.inf, **like)
        self.sum_bound = torch.zeros(batch_size, **like)
        self.sum_log_px_z = torch.zeros(batch_size, **like)
        self.tail = torch.empty((0, batch_size), **like)

    def add(self, log_w: Tensor, log_px_z: Tensor, log_bound: Tensor | None = None) -> None:
        """Take in C weights for each example; all arguments are (C, B).

        `log_bound` holds log p(x, z) - log q(z|x) where that isn't log_w itself.
        """
        log_w = log_w.double()
        before = self.log_sum
        self.log_sum = torch.logaddexp(before, log_w.logsumexp(0))
        self.log_sum_squares = torch.logaddexp(self.log_sum_squares, (2 * log_w).logsumexp(0))
        self.sum_bound = self.sum_bound + (log_w if log_bound is None else log_bound.double()).sum(
            0
        )
        self.sum_log_px_z = self.sum_log_px_z + log_px_z.double().sum(0)
        for rung in self.rungs:
            if self.seen < rung < self.seen + log_w.shape[0]:
                part = log_w[: rung - self.seen].logsumexp(0)
                self.ladder[rung] = torch.logaddexp(before, part) - math.log(rung)
        self.seen += log_w.shape[0]
        if self.seen in self.rungs:
            self.ladder[self.seen] = self.log_sum - math.log(self.seen)
        if self.tail_length:
            candidates = torch.cat([self.tail, log_w])
            kept = min(self.tail_length + 1, candidates.shape[0])
            self.tail = candidates.topk(kept, dim=0).values

    def evidence(self) -> Evidence:
        """The estimate from the weights that are in; K is their number."""
        K = self.seen
        assert K > 0, "no weight yet"
        # Where every weight is 0 nothing was found: no effective sample, an infinite error.
        ess = (2 * self.log_sum - self.log_sum_squares).exp().nan_to_num(nan=0.0).clamp_max(K)
        unknown = torch.full_like(ess, math.nan)
        log_px = self.log_sum - math.log(K)
        length = tail_length(K)
        tail = self.tail[: length + 1]
        return Evidence(
            log_px=log_px,
            se=(1 / ess - 1 / K).clamp_min(0).sqrt() if K > 1 else unknown,
            ess=ess,
            khat=pareto_khat(tail, self.resolution) if length else unknown,
            ladder={rung: self.ladder.get(rung, log_px) for rung in self.rungs},
            elbo=self.sum_bound / K,
            log_px_z=self.sum_log_px_z / K,
            samples=torch.full_like(ess, K, dtype=torch.int64),
        )

    def keep(self, chosen: Tensor) -> None:
        """Go on with these of the examples only. chosen: (B,) bool."""
        for name in ("log_sum", "log_sum_squares", "sum_bound", "sum_log_px_z"):
            setattr(self, name, getattr(self, name)[chosen])
        self.tail = self.tail[:, chosen]
        self.ladder = {rung: value[chosen] for rung, value in self.ladder.items()}


def ladder_rungs(num_samples: int) -> list[int]:
    """1, 10, 100, … below num_samples, and num_samples itself."""
    rungs = [10**i for i in range(len(str(num_samples)))]
    return [rung for rung in rungs if rung < num_samples] + [num_samples]


def tail_length(num_samples: int) -> int:
    """min(K/5, 3√K), the number of weights a Pareto tail is fitted to; 0 if that is less than 5."""
    length = int(min(num_samples / 5, 3 * math.sqrt(num_samples)))
    return length if length >= 5 else 0


def pareto_khat(tail: Tensor, resolution: float) -> Tensor:
    """Shape k̂ of the generalised Pareto distribution fitted to each example's largest weights.

    Args:
        tail: the M + 1 largest log weights of each example, (M + 1, B), in descending order; the
            last of them is the threshold above which the M others lie.
        resolution: relative rounding of the log weights.

    Returns:
        k̂, (B,): 0 where the tail is constant up to rounding, inf where it spans more than floats
        can hold, holds no weight above 0, or where rounding alone moves a log weight by 1 nat or
        more, so that nothing is known of the weights; NaN where a weight is NaN.
    """
    log_w = tail.T.flip(-1)
    threshold, largest = log_w[:, 0], log_w[:, -1]
    excess = torch.exp(log_w - largest.unsqueeze(-1))
    excess = excess[:, 1:] - excess[:, :1]
    # Ties, or a few weights so large that the others vanish beside them, leave nothing to fit.
    usable = excess[:, pareto_unit(excess.shape[-1])] > 0
    spread = largest - threshold
    usable &= spread > 8 * resolution * largest.abs().clamp_min(1.0)
    khat = pareto_shape(torch.where(usable.unsqueeze(-1), excess, 1.0))
    khat = torch.where(khat.isfinite(), khat, math.inf)
    khat = torch.where(usable, khat, torch.where(spread > 1, math.inf, 0.0))
    unknown = resolution * largest.abs() >= 1
    khat = torch.where(largest.isinf() | unknown, math.inf, khat)
    return torch.where(log_w.isnan().any(-1), math.nan, khat)


def joined(weights: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what comes, pairs of (C, B), joined to a few hundred samples at a time.

    With many examples a chunk is a few samples of each, and taking it into the sums would cost as
    much as decoding it.
    """
    waiting: list[tuple[Tensor, Tensor]] = []
    count = 0
    for pair in weights:
        waiting.append(pair)
        count += pair[0].shape[0]
        if count >= JOINED_SAMPLES:
            yield _together(waiting)
            waiting, count = [], 0
    if waiting:
        yield _together(waiting)


def _together(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(pairs) == 1:
        return pairs[0]
    log_w, log_px_z = zip(*pairs, strict=True)
    return torch.cat(log_w), torch.cat(log_px_z)


def draw_with_log_prob(q: Distribution, eps: Tensor) -> tuple[Tensor, Tensor]:
    """z ~ q from standard normal noise eps (C, B, d), and log q(z), (C, B).

    q is a posterior of `vae.models.posteriors`, or one of torch's Gaussians.

    Raises:
        TypeError: q can't be drawn from given noise.
    """
    if isinstance(q, Reparameterized):
        return q.from_noise_with_log_prob(eps)
    from_noise = getattr(q, "from_noise", None)
    if from_noise is not None:
        z = from_noise(eps)
    elif isinstance(q, MultivariateNormal):
        z = q.loc + (q.scale_tril @ eps[..., None])[..., 0]
    elif isinstance(q, Independent) and isinstance(q.base_dist, Normal):
        z = q.base_dist.loc + q.base_dist.scale * eps
    else:
        raise TypeError(
            f"the posterior {type(q).__name__} can't be drawn from given noise; it needs from_noise"
        )
    return z, q.log_prob(z)
