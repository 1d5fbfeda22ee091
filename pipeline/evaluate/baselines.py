"""Classical density models that a VAE must beat, fitted on the training split.

`grey8` and `continuous`: factor analysis of the same latent size. `binary`, where that doesn't
apply: independent Bernoulli values and a mixture of Bernoulli vectors. Each is scored in the
space's own unit, so that its log p(x) and the VAE's may be subtracted.

Shapes: N examples, D data values, M mixture components. All in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vae.evidence import FactorAnalysis, importance_sampling
from vae.models import VAE

# Noise floors to choose from, in units of `model.min_scale`: with one floor for all data, a pixel
# that is constant in training would make the baseline worthless on the first test image that isn't.
FLOORS = (1.0, 3.0, 10.0, 30.0, 100.0)
FLOOR_EXAMPLES, FLOOR_SAMPLES = 200, 20
# The encoder of factor analysis is its exact posterior but for the width of a bin, so its weights
# hardly vary: more samples than these move its log p(x) by less than 0.001 nats.
MOST_SAMPLES = 100
COMPONENTS = (10, 20, 40)
SCORING_BATCH = 100


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A fitted baseline and its log p(x) on the test split, (N,), float64, nats."""

    name: str
    log_px: Tensor


def fit_baselines(
    train: Tensor,
    valid: Tensor,
    test: Tensor,
    *,
    space: str,
    latent_dim: int,
    min_scale: float,
    num_samples: int,
    seed: int,
    binarize: bool = False,
) -> list[Baseline]:
    """Fit on `train`, choose settings on `valid`, score `test`; the strongest comes first.

    Args:
        train, valid, test: (N, *data_shape), what the space says.
        space: binary, grey8 or continuous.
        latent_dim: size of z; factor analysis takes as many factors, or D - 1 where that is fewer.
        min_scale: smallest noise floor, in units of the data's range (grey8) or of each column's
            standard deviation (continuous).
        num_samples: K of the importance sampling that scores factor analysis in grey8; 100 are
            enough for it, whatever is asked.
        seed: of the fits, of that sampling, and of the binarisation.
        binarize: `train` holds grey levels 0…255 and x ~ Bernoulli(grey / 255).
    """
    if space == "binary":
        found = _binary_baselines(train, valid, test, seed=seed, binarize=binarize)
    elif space == "grey8":
        found = [
            _grey_factor_analysis(train, valid, test, latent_dim, min_scale, num_samples, seed)
        ]
    else:
        found = [_factor_analysis(train, valid, test, latent_dim, min_scale, seed)]
    return sorted(found, key=lambda baseline: -baseline.log_px.mean().item())


# --- factor analysis -----------------------------------------------------------------------------


def _grey_factor_analysis(
    train: Tensor,
    valid: Tensor,
    test: Tensor,
    latent_dim: int,
    min_scale: float,
    num_samples: int,
    seed: int,
) -> Baseline:
    """Factor analysis on y = (x + 0.5) / 256, scored by the exact mass of each pixel's bin.

    Fitted in grey levels, as they lie in memory: a copy of large pictures in float64 may not fit.
    """
    data_shape = tuple(test.shape[1:])
    factors = _num_factors(latent_dim, data_shape)
    best, best_score = None, -math.inf
    for floor in FLOORS:
        scale = min(min_scale * floor, 0.5)
        fitted = FactorAnalysis.fit(
            train, factors, min_noise=(256 * scale) ** 2, tol=1e-4, seed=seed
        )
        vae = _on_unit_interval(fitted).as_vae("grey8", data_shape)
        log_px = _importance_sampled(vae, valid[:FLOOR_EXAMPLES], FLOOR_SAMPLES, seed)
        score = log_px.mean().item()
        if score > best_score:
            best, best_score = vae, score
    assert best is not None
    log_px = _importance_sampled(best, test, min(num_samples, MOST_SAMPLES), seed)
    return Baseline(name=_named(factors), log_px=log_px)


def _factor_analysis(
    train: Tensor, valid: Tensor, test: Tensor, latent_dim: int, min_scale: float, seed: int
) -> Baseline:
    """Factor analysis by its exact density in raw units; fitted on standardised columns."""
    factors = _num_factors(latent_dim, tuple(test.shape[1:]))
    x = train.flatten(1).double()
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    jacobian = std.log().sum()
    standardised = {
        name: (part.flatten(1).double() - mean) / std
        for name, part in (("train", train), ("valid", valid), ("test", test))
    }
    fits = [
        FactorAnalysis.fit(
            standardised["train"], factors, min_noise=(min_scale * floor) ** 2, seed=seed
        )
        for floor in FLOORS
    ]
    best = max(fits, key=lambda fitted: fitted.log_prob(standardised["valid"]).mean().item())
    return Baseline(name=_named(factors), log_px=best.log_prob(standardised["test"]) - jacobian)


def _importance_sampled(model: VAE, x: Tensor, num_samples: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = [
        importance_sampling(model, part, num_samples, generator=generator).log_px
        for part in x.split(SCORING_BATCH)
    ]
    return torch.cat(parts).double()


def _on_unit_interval(fitted: FactorAnalysis) -> FactorAnalysis:
    """The model of x as one of y = (x + 0.5) / 256, in float32: decoding is twice as fast."""
    loc, weight = (fitted.loc + 0.5) / 256, fitted.weight / 256
    return FactorAnalysis(loc.float(), weight.float(), (fitted.noise_variance / 256**2).float())


def _num_factors(latent_dim: int, data_shape: tuple[int, ...]) -> int:
    return max(1, min(latent_dim, math.prod(data_shape) - 1))


def _named(factors: int) -> str:
    return f"factor analysis with {factors} factor{'s' if factors != 1 else ''}"


# --- binary data ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BernoulliMixture:
    """p(x) = Σ_m weight_m Π_d Bernoulli(x_d; prob_md). log_weight (M,), logits (M, D)."""

    log_weight: Tensor
    logits: Tensor

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, m) in nats for x (N, D) in {0, 1}: (N, M)."""
        off = torch.nn.functional.logsigmoid(-self.logits).sum(-1)
        return x @ self.logits.T + off + self.log_weight

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, exact: x (N, D) in {0, 1} -> (N,), float64.

        In float64, for `log_joint` cancels: of 196,608 values at odds of 100 it is off by 3 nats.
        """
        exact = BernoulliMixture(log_weight=self.log_weight.double(), logits=self.logits.double())
        parts = x.split(SCORING_BATCH)
        return torch.cat([exact.log_joint(part.double()).logsumexp(-1) for part in parts])

    @classmethod
    def fit(
        cls, x: Tensor, num_components: int, *, seed: int, max_iter: int = 200, tol: float = 1e-2
    ) -> BernoulliMixture:
        """Expectation-maximisation with Laplace smoothing (Bishop 2006, section 9.3.3).

        Args:
            x: (N, D) in {0, 1}.
            num_components: M; with 1 it is independent Bernoulli values.
            seed: of the responsibilities that it starts from.
            tol: stops when the mean log-likelihood rises by less, in nats per example.
        """
        x = x.to(torch.float32)
        generator = torch.Generator().manual_seed(seed)
        # Each component starts from one example's neighbourhood, halfway to the overall mean.
        starts = x[torch.randint(len(x), (num_components,), generator=generator)]
        prob = (0.5 * starts + 0.5 * x.mean(0)).clamp(0.01, 0.99)
        model = cls(
            log_weight=torch.full((num_components,), -math.log(num_components)),
            logits=torch.logit(prob),
        )
        previous = -math.inf
        for _ in range(max_iter):
            joint = model.log_joint(x)
            log_px = joint.logsumexp(-1)
            score = log_px.double().mean().item()
            if score - previous < tol:
                break
            previous = score
            model = cls._maximised((joint - log_px[:, None]).exp(), x)
        return model

    @classmethod
    def _maximised(cls, responsibility: Tensor, x: Tensor) -> BernoulliMixture:
        count = responsibility.sum(0)
        prob = (responsibility.T @ x + 1) / (count + 2)[:, None]
        return cls(log_weight=((count + 1) / (count + 1).sum()).log(), logits=torch.logit(prob))


def independent_bernoulli(mean: Tensor, count: int) -> BernoulliMixture:
    """Each value by itself: probability (N mean + 1) / (N + 2), by Laplace's rule. mean (D,)."""
    prob = (mean.double() * count + 1) / (count + 2)
    return BernoulliMixture(
        log_weight=torch.zeros(1), logits=torch.logit(prob)[None].to(torch.float32)
    )


def _binary_baselines(
    train: Tensor, valid: Tensor, test: Tensor, *, seed: int, binarize: bool
) -> list[Baseline]:
    train, valid, test = (part.flatten(1).to(torch.float32) for part in (train, valid, test))
    if binarize:
        train = train / 255
    independent = independent_bernoulli(train.double().mean(0), len(train))
    if binarize:
        generator = torch.Generator().manual_seed(seed)
        train = (torch.rand(train.shape, generator=generator) < train).to(torch.float32)
    sizes = [size for size in COMPONENTS if size <= len(train)] or [1]
    fits = [BernoulliMixture.fit(train, size, seed=seed) for size in sizes]
    best = max(fits, key=lambda fitted: fitted.log_prob(valid).mean().item())
    name = f"a mixture of {len(best.log_weight)} Bernoulli vectors"
    return [
        Baseline(name="independent Bernoulli values", log_px=independent.log_prob(test).double()),
        Baseline(name=name, log_px=best.log_prob(test).double()),
    ]
