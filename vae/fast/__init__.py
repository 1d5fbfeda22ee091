"""The same numbers, sooner: the one list of fast paths. All of it may be switched off, or deleted.

Only `vae.acceleration` imports this package. A path stays here while it earns 15% or more
(bench/fast_paths.py), and while `tests/vae/fast` finds its numbers within the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vae.models import VAE


@dataclass(frozen=True, kw_only=True)
class FastPath:
    """name: in words. applies: whether a model may take it, as far as the model decides.
    tolerance: largest relative difference from the plain way's numbers; 0: the same bits."""

    name: str
    applies: Callable[[VAE], bool]
    tolerance: float


def _asked(module: str, function: str) -> Callable[[VAE], bool]:
    return lambda model: getattr(import_module(f"vae.fast.{module}"), function)(model)


PATHS = (
    FastPath(
        name="compiled decoder",  # log p(x|z) of perceptrons of Bernoulli pixels on CPUs
        applies=_asked("perceptron", "supports_decoder"),
        tolerance=1e-5,
    ),
    FastPath(
        name="decoder node",  # the same with its gradient, one node of autograd
        applies=_asked("perceptron", "supports_decoder"),
        tolerance=1e-5,
    ),
    FastPath(
        name="manual backward",  # the whole ELBO with its gradient, without autograd
        applies=_asked("perceptron", "supports"),
        tolerance=1e-5,
    ),
    FastPath(
        name="shared memory",  # ranks of one machine have one copy of the weights
        applies=lambda model: next(model.parameters()).device.type == "cpu",
        tolerance=1e-5,
    ),
    FastPath(
        name="CUDA graphs",  # a step on a GPU in two launches
        applies=_asked("cuda_graphs", "may_be_graphed"),
        tolerance=1e-6,
    ),
)
