"""Drawing few of many weighted samples, so that what is linear in the weights keeps its mean."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_by_weight(weights: Tensor, count: int, v: Tensor) -> tuple[Tensor, Tensor]:
    """`count` different samples of each example, and the probability that each had to be drawn.

    Σ weight / probability over the drawn ones has the mean of Σ weight over all. The probability
    is min(1, weight / c), c such that they add up to `count`: samples above the threshold c are
    kept, the others drawn in proportion to their weights, which changes the weights least in mean
    square (Fearnhead and Clifford, 2003). One uniform number draws all of an example's.

    Args: weights (K, B), at least 0, with Σ_k = 1; count, from 1 to K; v (B,), uniform on [0, 1).
    Returns: places (count, B) in 0 … K - 1, and probabilities (count, B), float64.
    """
    if not 1 <= count <= len(weights):
        raise ValueError(f"count: expected 1 to {len(weights)}, got {count}")
    weights = weights.double().clamp_min(torch.finfo(torch.float64).tiny)
    largest = weights.sort(0, descending=True).values
    left = torch.arange(count, 0, -1, dtype=weights.dtype, device=weights.device)  # for the rest
    rest = largest.flip(0).cumsum(0).flip(0)[:count]
    thresholds = rest / left.unsqueeze(-1)
    first = (largest[:count] <= thresholds).to(torch.uint8).argmax(0, keepdim=True)
    probabilities = (weights / thresholds.gather(0, first)).clamp_max(1.0)
    ends = probabilities.t().cumsum(-1)
    marks = v.double().unsqueeze(-1) + torch.arange(count, device=v.device)
    places = torch.searchsorted(ends, marks, right=True).clamp_max(len(weights) - 1).t()
    return places, probabilities.gather(0, places)
