"""What the model's log p(x) says of data that it was not made for: a weak detector, with figures.

Test examples are changed in simple ways, scored, and set against the test split by the area under
the ROC curve (AUROC): 1 where every shifted example is less likely than every test example, 0.5
where log p(x) can't tell them apart, below 0.5 where it takes the shifted ones for more likely
(Nalisnick et al. 2019, arXiv:1810.09136).

Shapes: N examples, M shifted ones.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

NUM_EXAMPLES = 64
MOST_SAMPLES = 100  # K: a shift moves log p(x) by far more than a tighter bound does


def shifted_sets(x: Tensor, space: str, seed: int) -> dict[str, Tensor]:
    """Changed copies of x (N, *data_shape), by what was done; each (M, *data_shape), same dtype."""
    generator = torch.Generator().manual_seed(seed)
    x = x[:NUM_EXAMPLES]
    if space == "continuous":
        order = torch.rand(x.flatten(1).shape, generator=generator).argsort(0)
        mean = x.double().mean(0)
        return {
            "columns shuffled": x.flatten(1).gather(0, order).reshape(x.shape),
            "three times as wide": (mean + 3 * (x - mean)).to(x.dtype),
            "all at the mean": mean.expand(x.shape).to(x.dtype),
        }
    top = 1 if space == "binary" else 255
    level = x.flatten(1).double().mean(1).round()
    noise = torch.randint(0, top + 1, x.shape, generator=generator)
    return {
        "inverted": top - x,
        "uniform noise": noise.to(x.dtype),
        "one level": level.reshape(-1, *[1] * (x.dim() - 1)).expand(x.shape).to(x.dtype),
    }


def auroc(normal: np.ndarray, shifted: np.ndarray) -> float:
    """The chance that a normal value (N,) exceeds a shifted one (M,), ties counting half."""
    ordered = np.sort(shifted)
    below = np.searchsorted(ordered, normal, side="left")
    ties = np.searchsorted(ordered, normal, side="right") - below
    return float((below + ties / 2).mean() / len(shifted))


def compare(
    x: Tensor, log_px: np.ndarray, space: str, seed: int, score: Callable[[Tensor], np.ndarray]
) -> dict[str, dict[str, float]]:
    """For each shifted set: mean log p(x) in nats, AUROC against the test split, and its size.

    Args:
        x: the test split, (N, *data_shape).
        log_px: its log p(x), (N,).
        space: of the data.
        seed: of the noise and the shuffling.
        score: log p(x) of any examples.
    """
    found = {}
    for name, changed in shifted_sets(x, space, seed).items():
        theirs = score(changed)
        found[name] = {
            "log_px": float(theirs.mean()),
            "auroc": auroc(log_px, theirs),
            "num_examples": len(theirs),
        }
    return found
