"""What training maximises, and the gradient estimators behind it.

Shapes: K samples, B batch, L latent values. log w = log p(x,z) - log q(z|x), in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vae import acceleration
from vae.acceleration import ManualElbo
from vae.checks import check_name
from vae.models import VAE, LatentDistribution, Reparameterized, kl_per_dimension
from vae.resampling import draw_by_weight
from vae.system import samples_at_once

CHUNK_VALUES = {"cpu": 2**22, "cuda": 2**26}
"""Data values decoded at a time where samples are weighed without a gradient."""


class ObjectiveTerms(NamedTuple):
    """Per example, (B,), nats, larger is better (except `kl`).

    `surrogate` is what is differentiated: its gradient is the estimator, its value means nothing.
    `bound` is the objective's value; `log_px_z` and `kl` are the K-sample ELBO terms, without β
    and free bits. Only `surrogate` carries a gradient.
    """

    surrogate: Tensor
    bound: Tensor
    log_px_z: Tensor
    kl: Tensor


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The objective and its gradient estimator.

    elbo: K samples, KL in closed form where there is one (Kingma and Welling, 2014).
    iwae: log 1/K Σ w (Burda, Grosse and Salakhutdinov, 2016).
    stl: the ELBO, log q without its score (Roeder, Wu and Duvenaud, 2017).
    dreg: the IWAE bound, doubly reparameterised (Tucker, Lawson, Gu and Maddison, 2019).
    score_function: the ELBO by REINFORCE with a leave-one-out baseline (Mnih and Rezende, 2016).

    With `backward_samples` M below K, iwae and dreg take the K samples' weights without a gradient
    and the gradient through M of them, drawn by weight: it has the same mean, and of the cost of a
    step little more than the forward passes stays (Burda et al., section 3).

    Raises ValueError naming every faulty key of params.yaml at once.
    """

    name: str = "elbo"
    num_samples: int = 1  # K
    backward_samples: int | None = None  # M, of iwae and dreg; None: all K
    beta: float = 1.0  # weight of the KL (Higgins et al., 2017)
    beta_warmup_epochs: int = 0  # the weight rises linearly from 0 over so many epochs
    free_bits: float = 0.0  # nats per latent dimension and example (Kingma et al., 2016)
    reduction: str = "mean"  # mean | sum over the batch

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise ValueError("\n".join(faults))

    def _faults(self) -> Iterable[str]:
        yield from check_name("objective.name", self.name, ESTIMATORS)
        yield from check_name("objective.reduction", self.reduction, ("mean", "sum"))
        if not _is_integer(self.num_samples) or self.num_samples < 1:
            yield f"objective.num_samples: expected a positive integer, got {self.num_samples!r}"
        elif self.name == "score_function" and self.num_samples < 2:
            yield (
                "objective.num_samples: score_function needs at least 2 samples, since each is "
                "the other's baseline; got 1"
            )
        if self.backward_samples is not None:
            yield from self._faults_of_backward_samples(self.backward_samples)
        if not _is_integer(self.beta_warmup_epochs) or self.beta_warmup_epochs < 0:
            yield (
                "objective.beta_warmup_epochs: expected an integer of at least 0, got "
                f"{self.beta_warmup_epochs!r}"
            )
        for name in ("beta", "free_bits"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and value >= 0):
                yield f"objective.{name}: expected a number of at least 0, got {value!r}"
        if self.name in ("iwae", "dreg") and (self.beta != 1 or self.beta_warmup_epochs):
            yield (
                f"objective.beta: {self.name} has no KL term of its own to weigh; use beta 1 and "
                "beta_warmup_epochs 0, or objective.name: elbo"
            )
        if self.name in ESTIMATORS and self.name != "elbo" and self.free_bits:
            yield (
                f"objective.free_bits: {self.name} has no KL per dimension; use free_bits 0, or "
                "objective.name: elbo"
            )

    def _faults_of_backward_samples(self, count: int) -> Iterable[str]:
        if not _is_integer(count) or count < 1:
            yield (
                f"objective.backward_samples: expected a positive integer, or null, got {count!r}"
            )
        elif _is_integer(self.num_samples) and count > self.num_samples:
            yield (
                f"objective.backward_samples: expected at most objective.num_samples, which is "
                f"{self.num_samples}, got {count}"
            )
        elif self.name in ESTIMATORS and self.name not in SUBSAMPLED_ESTIMATORS:
            yield (
                f"objective.backward_samples: {self.name} weighs its samples equally; use null and "
                f"a smaller num_samples, or objective.name: {' or '.join(SUBSAMPLED_ESTIMATORS)}"
            )

    @property
    def num_drawn(self) -> int | None:
        """M, where the gradient goes through fewer than all samples, else None."""
        if self.backward_samples is None or self.backward_samples >= self.num_samples:
            return None
        return self.backward_samples

    def beta_at(self, epoch: int) -> float:
        """The KL's weight in this epoch; epochs count from 1."""
        if self.beta_warmup_epochs == 0:
            return self.beta
        return self.beta * min(1.0, epoch / self.beta_warmup_epochs)


class TrainingModule(nn.Module):
    """The whole objective in one forward, so that DDP may wrap it.

    A call around this forward, such as `manual_backward`, leaves gradients unsynchronised.
    """

    def __init__(self, model: VAE, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self._manual: ManualElbo | None = None

    def forward(
        self,
        x: Tensor,
        eps: Tensor,
        u: Tensor | None = None,
        beta: float | Tensor | None = None,
        v: Tensor | None = None,
    ) -> ObjectiveTerms:
        """Terms (B,) of the objective at x (B, *data_shape).

        Args: eps (K, B, L), standard normal; u (B, *data_shape), uniform on [0, 1), for
        likelihoods that dequantise; beta, this epoch's weight of the KL (`beta_at`), by default
        the objective's; v (B,), uniform on [0, 1), by which `backward_samples` are drawn.
        """
        self._check_noise(x, eps)
        beta = self.objective.beta if beta is None else beta
        of_parameters = torch.is_grad_enabled() and not (x.requires_grad or eps.requires_grad)
        node = acceleration.decoder_node(self.model) if of_parameters else None
        step = _Step(
            log_px_z=lambda z: (
                node(x, z)
                if node is not None and torch.is_grad_enabled()
                else self.model.log_px_z(x, z, u)
            ),
            q=self.model.posterior(x),
            p=self.model.prior(),
            eps=eps,
            beta=beta,
            free_bits=self.objective.free_bits,
        )
        num_drawn = self.objective.num_drawn
        if num_drawn is not None and torch.is_grad_enabled():
            if v is None:
                raise ValueError("v: expected shape (B,), since backward_samples is set, got None")
            subsample = _subsample(step, num_drawn, v, samples_at_once(x, CHUNK_VALUES))
            surrogate, *values = SUBSAMPLED_ESTIMATORS[self.objective.name](step, subsample)
        else:
            surrogate, *values = ESTIMATORS[self.objective.name](step)
        return ObjectiveTerms(surrogate, *(value.detach() for value in values))

    def has_manual_backward(self, batch_size: int) -> bool:
        """Whether `manual_backward` may replace forward and backward pass for so many examples.

        It may for an ELBO without free bits, of so few samples that taking them in parts gains
        nothing, and a model that `vae.fast.perceptron` supports.
        """
        self._manual = None
        if self.objective.name == "elbo" and not self.objective.free_bits:
            values = batch_size * math.prod(self.model.config.data_shape)
            self._manual = acceleration.manual_elbo(self.model, self.objective.num_samples * values)
        return self._manual is not None

    def manual_parameters(self) -> list[Tensor]:
        """Those that `manual_backward` writes a gradient for; none where there is no such way."""
        return [] if self._manual is None else self._manual.parameters

    def manual_backward(self, x: Tensor, eps: Tensor, beta: float, scale: float) -> ObjectiveTerms:
        """The same terms, and the gradient of -scale Σ surrogate written over each parameter's."""
        self._check_noise(x, eps)
        manual = self._manual or acceleration.manual_elbo(self.model, 0)
        assert manual is not None, "has_manual_backward says whether there is one"
        log_px_z, kl = manual.elbo_and_gradient(self.model, x, eps, beta=beta, scale=scale)
        log_px_z = log_px_z.mean(0)
        bound = log_px_z - beta * kl
        return ObjectiveTerms(bound, bound, log_px_z, kl)

    def _check_noise(self, x: Tensor, eps: Tensor) -> None:
        expected = (self.objective.num_samples, len(x), self.model.noise_dim)
        if tuple(eps.shape) != expected:
            raise ValueError(f"eps: expected shape (K, B, L) = {expected}, got {tuple(eps.shape)}")


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What every estimator sees of one batch."""

    log_px_z: Callable[[Tensor], Tensor]
    q: Reparameterized
    p: LatentDistribution
    eps: Tensor
    beta: float | Tensor
    free_bits: float


class _Subsample(NamedTuple):
    """M of a batch's K samples, (M, B) each, and what all K say, (B,); without a gradient."""

    eps: Tensor  # (M, B, L)
    weights: Tensor  # normalised, of all K
    shares: Tensor  # of the gradient: weight / probability of having been drawn
    bound: Tensor
    log_px_z: Tensor
    kl: Tensor

    def terms(self, surrogate: Tensor) -> ObjectiveTerms:
        return ObjectiveTerms(surrogate, self.bound, self.log_px_z, self.kl)


@torch.no_grad()
def _subsample(step: _Step, count: int, v: Tensor, at_once: int) -> _Subsample:
    parts = [_log_px_z_and_kl(step, eps) for eps in step.eps.split(at_once)]
    log_px_z, kl = (torch.cat(part) for part in zip(*parts, strict=True))
    log_w = log_px_z - kl
    weights = log_w.softmax(0)
    places, probabilities = draw_by_weight(weights, count, v)
    weights = weights.gather(0, places)
    return _Subsample(
        eps=step.eps.gather(0, places.unsqueeze(-1).expand(-1, -1, step.eps.shape[-1])),
        weights=weights,
        shares=(weights / probabilities).to(weights.dtype),
        bound=_log_mean_exp(log_w),
        log_px_z=log_px_z.mean(0),
        kl=kl.mean(0),
    )


def _elbo(step: _Step) -> ObjectiveTerms:
    terms = kl_per_dimension(step.q, step.p)
    if terms is None:
        # no KL per dimension: the floor is on the sum
        z, log_q = step.q.from_noise_with_log_prob(step.eps)
        kl = (log_q - step.p.log_prob(z)).mean(0)
        floored = kl.clamp(min=step.free_bits * z.shape[-1]) if step.free_bits else kl
    else:
        z = step.q.from_noise(step.eps)
        kl = terms.sum(-1)
        floored = terms.clamp(min=step.free_bits).sum(-1) if step.free_bits else kl
    log_px_z = step.log_px_z(z).mean(0)
    bound = log_px_z - step.beta * floored
    return ObjectiveTerms(bound, bound, log_px_z, kl)


def _stl(step: _Step) -> ObjectiveTerms:
    _, log_px_z, kl = _without_score(step, step.eps)
    log_px_z, kl = log_px_z.mean(0), kl.mean(0)
    bound = log_px_z - step.beta * kl
    return ObjectiveTerms(bound, bound, log_px_z, kl)


def _iwae(step: _Step) -> ObjectiveTerms:
    log_px_z, kl = _log_px_z_and_kl(step, step.eps)
    bound = _log_mean_exp(log_px_z - kl)
    return ObjectiveTerms(bound, bound, log_px_z.mean(0), kl.mean(0))


def _subsampled_iwae(step: _Step, subsample: _Subsample) -> ObjectiveTerms:
    log_px_z, kl = _log_px_z_and_kl(step, subsample.eps)
    return subsample.terms((subsample.shares * (log_px_z - kl)).sum(0))


def _log_px_z_and_kl(step: _Step, eps: Tensor) -> tuple[Tensor, Tensor]:
    z, log_q = step.q.from_noise_with_log_prob(eps)
    return step.log_px_z(z), log_q - step.p.log_prob(z)


def _dreg(step: _Step) -> ObjectiveTerms:
    z, log_px_z, kl = _without_score(step, step.eps)
    log_w = log_px_z - kl
    weights = log_w.detach().softmax(0)
    _weigh_once_more(z, weights)
    surrogate = (weights * log_w).sum(0)
    return ObjectiveTerms(surrogate, _log_mean_exp(log_w), log_px_z.mean(0), kl.mean(0))


def _subsampled_dreg(step: _Step, subsample: _Subsample) -> ObjectiveTerms:
    z, log_px_z, kl = _without_score(step, subsample.eps)
    _weigh_once_more(z, subsample.weights)
    return subsample.terms((subsample.shares * (log_px_z - kl)).sum(0))


def _without_score(step: _Step, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z = step.q.from_noise(eps)
    return z, step.log_px_z(z), step.q.detach().log_prob(z) - step.p.log_prob(z)


def _weigh_once_more(z: Tensor, weights: Tensor) -> None:
    """On its way into φ through z the gradient is weighted by w again: w² there, w for θ."""
    if z.requires_grad:
        z.register_hook(lambda gradient: gradient * weights.unsqueeze(-1))


def _score_function(step: _Step) -> ObjectiveTerms:
    z = step.q.from_noise(step.eps).detach()
    log_px_z, log_p, log_q = step.log_px_z(z), step.p.log_prob(z), step.q.log_prob(z)
    value = log_px_z - step.beta * (log_q - log_p)
    others = (value.sum(0) - value) / (len(value) - 1)
    score = (value - others).detach() * log_q
    surrogate = (log_px_z + step.beta * log_p + score).mean(0)
    return ObjectiveTerms(surrogate, value.mean(0), log_px_z.mean(0), (log_q - log_p).mean(0))


def _log_mean_exp(log_w: Tensor) -> Tensor:
    return torch.logsumexp(log_w, 0) - math.log(len(log_w))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


ESTIMATORS: dict[str, Callable[[_Step], ObjectiveTerms]] = {
    "elbo": _elbo,
    "iwae": _iwae,
    "stl": _stl,
    "dreg": _dreg,
    "score_function": _score_function,
}
SUBSAMPLED_ESTIMATORS: dict[str, Callable[[_Step, _Subsample], ObjectiveTerms]] = {
    "iwae": _subsampled_iwae,
    "dreg": _subsampled_dreg,
}
