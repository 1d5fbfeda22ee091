"""The shape of a heavy tail: a generalised Pareto distribution fitted to many examples at once.

The fit of arviz-stats, which takes one example after another.

Shapes: B examples, M values above each one's threshold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PRIOR_SHAPE, PRIOR_WEIGHT = 0.5, 10  # as much as 10 of the M values
LEAST_CANDIDATES = 30


def pareto_unit(count: int) -> int:
    """Which of M ascending values the fit takes for its unit of scale: about the first quartile."""
    return int(count / 4 + 0.5) - 1


def pareto_shape(excess: Tensor) -> Tensor:
    """Shape k̂, (B,), by the empirical-Bayes estimate of Zhang and Stephens (2009).

    With the weak prior of Vehtari et al. (arXiv:1507.02646, appendix C): k̂ of few values is drawn
    to 0.5.

    Args:
        excess: (B, M) values less their threshold, ascending, float64; that at `pareto_unit` and
            all behind it above 0.
    """
    count = excess.shape[-1]
    num_candidates = LEAST_CANDIDATES + int(math.sqrt(count))
    places = torch.arange(num_candidates, dtype=excess.dtype, device=excess.device) + 0.5
    unit, largest = excess[:, pareto_unit(count)], excess[:, -1]
    # Of -shape / scale, each with its shape and the likelihood of both.
    candidates = (1 - (num_candidates / places).sqrt()) / (3 * unit.unsqueeze(-1))
    candidates += 1 / largest.unsqueeze(-1)
    shapes = torch.stack([_shape(excess, b) for b in candidates.unbind(-1)], -1)
    rates = torch.where(candidates == 0, 1 / excess.mean(-1, keepdim=True), -candidates / shapes)
    log_likelihood = count * (rates.log() - shapes - 1)
    weights = log_likelihood.softmax(-1)
    weights = torch.where(weights < 10 * torch.finfo(weights.dtype).eps, 0.0, weights)
    shape = _shape(excess, (candidates * weights).sum(-1) / weights.sum(-1))
    return (count * shape + PRIOR_WEIGHT * PRIOR_SHAPE) / (count + PRIOR_WEIGHT)


def _shape(excess: Tensor, b: Tensor) -> Tensor:
    """The likeliest shape, (B,), for b = -shape / scale, (B,)."""
    return torch.mul(excess, -b.unsqueeze(-1)).log1p_().mean(-1)
