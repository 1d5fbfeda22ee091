"""Annealed importance sampling from the encoder's q(z|x) to the posterior, and two-sided bounds.

Between q and the posterior lies a path of unnormalised densities

    log f_t(z) = (1 - t) log q(z|x) + t log p(x, z),    t_k = k / T,    k = 0 … T,

along which a chain started at z ~ q moves by Hamiltonian Monte Carlo, collecting the weight
(1/T) Σ_k [log p(x, z) - log q(z|x)], whose exponential has mean p(x) (Neal 2001,
arXiv:physics/9803008). With one step, T = 1, this is importance sampling. Started at an exact
posterior sample and run backwards it bounds log p(x) from above (Grosse, Ghahramani and Adams
2015, arXiv:1511.02543; Wu, Burda, Salakhutdinov and Grosse 2017, arXiv:1611.04273).

All arithmetic is float64. Shapes: B examples, C chains of each, d latent values, T steps. Nats.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from vae.evidence.factor_analysis import gaussian_moments
from vae.evidence.noise import seeded_sample, standard_normal
from vae.evidence.weights import Evidence, WeightStream, draw_with_log_prob
from vae.models import VAE

TARGET_ACCEPTANCE = 0.9  # of pilot chains; measured: 0.65 and 0.8 leave wider weights
JITTER = (0.2, 1.2)  # range of each trajectory's step size, in adapted ones
PILOT_CHAINS = 8
CHAIN_VALUES = 2**23  # decoder outputs, their graph included, held for one gradient


def annealed_importance_sampling(
    model: VAE,
    x: Tensor,
    num_samples: int = 16,
    *,
    num_temperatures: int = 100,
    num_leapfrog: int = 10,
    generator: torch.Generator | None = None,
) -> Evidence:
    """log p(x) by chains annealed from q(z|x) to the posterior.

    Tighter than importance sampling for the same budget where that one's effective sample size is
    low. Step sizes, one for each example and temperature, are adapted on pilot chains of their own
    and then frozen, so the weights are unbiased. The cost is about num_temperatures x num_leapfrog
    gradients of the decoder for each of num_samples + 8 chains of each example.

    Args:
        model: a VAE; a float64 copy of it is used, on its device.
        x: (B, *data_shape), in data units and any numeric dtype.
        num_samples: K, the chains (and so the weights) of each example.
        num_temperatures: T, the steps from q to the posterior.
        num_leapfrog: leapfrog steps in each Hamiltonian trajectory.
        generator: source of the noise, torch's default one if None.

    Returns:
        `Evidence` of the annealed weights; its elbo and log_px_z are those of the chains' starting
        points, hence of q.

    Raises:
        ValueError: num_samples, num_temperatures or num_leapfrog below 1.
    """
    path = _Path(_float64(model), x, num_temperatures, num_leapfrog, generator)
    path.adapt()
    x = path.x
    stream = WeightStream(
        num_samples, x.shape[0], resolution=torch.finfo(x.dtype).eps, device=x.device
    )
    size = max(1, CHAIN_VALUES // max(1, x.numel()))
    for start in range(0, num_samples, size):
        state = path.start(min(size, num_samples - start))
        log_bound, log_px_z = state.log_w, state.log_px_z
        stream.add(path.forward(state), log_px_z, log_bound)
    return stream.evidence()


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """A lower and an upper bound on log p(x) of N examples *simulated from the model*.

    Both hold in expectation, and only because x was simulated: its z is then an exact sample of
    p(z|x). They say how accurate annealing is on such data; of real data they say nothing.

    Attributes:
        x: the simulated examples, (N, *data_shape), in data units.
        z: the latents that they were simulated from, (N, d).
        lower: by chains from q(z|x) to the posterior, (N,), nats.
        upper: by chains from z back to q(z|x), (N,), nats.
    """

    x: Tensor
    z: Tensor
    lower: Tensor
    upper: Tensor
    valid_for: str = "data simulated from the model only"

    @property
    def gap(self) -> Tensor:
        """upper - lower, (N,): at least 0 in expectation."""
        return self.upper - self.lower


def bidirectional(
    model: VAE,
    num_examples: int = 16,
    *,
    num_samples: int = 8,
    num_temperatures: int = 100,
    num_leapfrog: int = 10,
    generator: torch.Generator | None = None,
) -> Bounds:
    """Two-sided bounds on log p(x), for data simulated from the model only (BDMC).

    Draws z ~ p(z), x ~ p(x|z); forward chains from q(z|x) then give a stochastic lower bound, and
    reverse chains from the exact posterior sample z a stochastic upper bound.

    Args:
        model: a VAE; a float64 copy of it is used, on its device.
        num_examples: N, simulated examples.
        num_samples: chains of each example in each direction.
        num_temperatures, num_leapfrog, generator: as in `annealed_importance_sampling`.

    Raises:
        ValueError: a count below 1; a likelihood whose samples don't follow its own log_prob.
    """
    if num_examples < 1 or num_samples < 1:
        raise ValueError(
            f"num_examples and num_samples must be at least 1; found {num_examples}, {num_samples}"
        )
    model = _float64(model)
    device = next(model.parameters()).device
    with torch.no_grad():
        z = seeded_sample(model.prior(), (num_examples,), device=device, generator=generator)
        p_x = model.likelihood(z)
        if hasattr(p_x, "log_tails"):
            raise ValueError(
                "two-sided bounds need data drawn from exactly the likelihood that scores it, and "
                f"{model.config.likelihood} on 8-bit data leaves mass outside the levels 0 … 255; "
                "model.likelihood: discretized_gaussian gives it to the outermost ones"
            )
        x = seeded_sample(p_x, (), device=device, generator=generator)
    path = _Path(model, x, num_temperatures, num_leapfrog, generator)
    path.adapt()
    forward = path.forward(path.start(num_samples))
    reverse = path.reverse(path.at(z.expand(num_samples, *z.shape)))
    log_k = math.log(num_samples)
    return Bounds(x=x, z=z, lower=forward.logsumexp(0) - log_k, upper=log_k - reverse.logsumexp(0))


def _float64(model: VAE) -> VAE:
    if all(parameter.dtype == torch.float64 for parameter in model.parameters()):
        return model
    return copy.deepcopy(model).double()


@dataclass(frozen=True, kw_only=True)
class _State:
    """Chains at u (C, B, d), in q's standardised coordinates, with what a transition needs there:
    log densities (C, B) up to a constant and their gradients in u (C, B, d)."""

    u: Tensor
    log_q: Tensor
    log_joint: Tensor
    log_px_z: Tensor
    grad_q: Tensor
    grad_joint: Tensor

    @property
    def log_w(self) -> Tensor:
        return self.log_joint - self.log_q

    def log_density(self, t: float) -> Tensor:
        return (1 - t) * self.log_q + t * self.log_joint

    def gradient(self, t: float) -> Tensor:
        return (1 - t) * self.grad_q + t * self.grad_joint

    def where(self, accepted: Tensor, other: _State) -> _State:
        """`self` where accepted (C, B), else `other`."""
        merged = {}
        for name, value in vars(self).items():
            mask = accepted[..., None] if value.ndim > accepted.ndim else accepted
            merged[name] = torch.where(mask, value, getattr(other, name))
        return _State(**merged)


class _Path:
    """The annealing path of one batch: its densities, temperatures and step sizes.

    Chains move in u = S⁻¹(z - m), m the mean of q(z|x) and S its Cholesky factor (for a posterior
    that isn't Gaussian: its standard deviations), so that one scalar step size suits all of z.
    """

    def __init__(
        self,
        model: VAE,
        x: Tensor,
        num_temperatures: int,
        num_leapfrog: int,
        generator: torch.Generator | None,
    ) -> None:
        if num_temperatures < 1 or num_leapfrog < 1:
            raise ValueError(
                "num_temperatures and num_leapfrog must be at least 1; found "
                f"{num_temperatures}, {num_leapfrog}"
            )
        like = next(model.parameters())
        self.model = model
        self.generator = generator
        self.num_leapfrog = num_leapfrog
        self.x = x.to(device=like.device, dtype=like.dtype)
        with torch.no_grad():
            self.q, self.p = model.posterior(self.x), model.prior()
            self.mean, self.scale_tril = _location_and_scale(self.q)
        self.temperatures = [k / num_temperatures for k in range(num_temperatures + 1)]
        self.steps = torch.full((num_temperatures + 1, self.x.shape[0]), 0.5).to(like)

    def start(self, num_chains: int) -> _State:
        """Chains at z ~ q."""
        shape = (num_chains, *self.q.batch_shape, *self.q.event_shape)
        with torch.no_grad():
            return self.at(draw_with_log_prob(self.q, self._normal(shape))[0])

    def at(self, z: Tensor) -> _State:
        offset = (z - self.mean)[..., None]
        return self._evaluate(
            torch.linalg.solve_triangular(self.scale_tril, offset, upper=False)[..., 0]
        )

    def forward(self, state: _State) -> Tensor:
        """Log weights (C, B) of chains from q to the posterior."""
        t = self.temperatures
        log_w = torch.zeros_like(state.log_q)
        for k in range(1, len(t)):
            log_w = log_w + (t[k] - t[k - 1]) * state.log_w
            if k < len(t) - 1:
                state, _ = self._transition(state, t[k], self.steps[k])
        return log_w

    def reverse(self, state: _State) -> Tensor:
        """Log weights (C, B), of mean 1/p(x), of chains from the posterior to q."""
        t = self.temperatures
        log_w = torch.zeros_like(state.log_q)
        for k in range(len(t) - 1, 0, -1):
            if k < len(t) - 1:
                state, _ = self._transition(state, t[k], self.steps[k])
            log_w = log_w - (t[k] - t[k - 1]) * state.log_w
        return log_w

    def adapt(self, rate: float = 0.5) -> None:
        """Set the step sizes on pilot chains, by each example's mean acceptance."""
        state = self.start(PILOT_CHAINS)
        log_step = self.steps[0].log()
        for k in range(1, len(self.temperatures) - 1):
            state, accepted = self._transition(state, self.temperatures[k], log_step.exp())
            log_step = log_step + rate * (accepted.mean(0) - TARGET_ACCEPTANCE)
            self.steps[k] = log_step.exp()

    def _transition(self, state: _State, t: float, step: Tensor) -> tuple[_State, Tensor]:
        """One Hamiltonian trajectory at temperature t; also its acceptance probability (C, B).

        Each chain's step is drawn from a range, so that not all trajectories come back to where
        they began.
        """
        low, high = JITTER
        step = (step * (low + (high - low) * self._uniform(state.log_q.shape)))[..., None]
        momentum = self._normal(state.u.shape)
        end, p = state, momentum
        for _ in range(self.num_leapfrog):
            p = p + 0.5 * step * end.gradient(t)
            end = self._evaluate(end.u + step * p)
            p = p + 0.5 * step * end.gradient(t)
        change = end.log_density(t) - state.log_density(t)
        change = change + 0.5 * (momentum.square().sum(-1) - p.square().sum(-1))
        # A trajectory that left the floats' range is refused.
        accept = change.nan_to_num(nan=-math.inf).clamp_max(0).exp()
        return end.where(self._uniform(accept.shape) < accept, state), accept

    def _evaluate(self, u: Tensor) -> _State:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            z = self.mean + torch.einsum("bij,cbj->cbi", self.scale_tril, u)
            log_q = self.q.log_prob(z)
            log_px_z = self.model.likelihood(z).log_prob(self.x)
            log_joint = log_px_z + self.p.log_prob(z)
            (grad_q,) = torch.autograd.grad(log_q.sum(), u, retain_graph=True)
            (grad_joint,) = torch.autograd.grad(log_joint.sum(), u)
        return _State(
            u=u.detach(),
            log_q=log_q.detach(),
            log_joint=log_joint.detach(),
            log_px_z=log_px_z.detach(),
            grad_q=grad_q,
            grad_joint=grad_joint,
        )

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return standard_normal(shape, like=self.mean, generator=self.generator)

    def _uniform(self, shape: tuple[int, ...]) -> Tensor:
        device = self.mean.device if self.generator is None else self.generator.device
        like = {"dtype": self.mean.dtype, "device": device, "generator": self.generator}
        return torch.rand(shape, **like).to(self.mean.device)


def _location_and_scale(q: Distribution) -> tuple[Tensor, Tensor]:
    """Mean (B, d) and a triangular factor (B, d, d) of about q's covariance."""
    try:
        return gaussian_moments(q)
    except TypeError:
        return q.mean, torch.diag_embed(q.variance.sqrt())
