"""The one door to `vae.fast`: the same numbers sooner where it can, nothing where it can't.

Everything runs without `vae.fast`: it may be deleted, or switched off for a process by
`TIGHTBOUND_PLAIN=1` and for a call by `fast=False`. Each function here gives what takes the plain
way's place, or None. What it gives follows from its arguments alone.

Shapes: B batch, K samples, L latent values.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from vae.fast.compiled_decoder import CompiledDecoder
    from vae.fast.cuda_graphs import GraphedSteps
    from vae.models import VAE
    from vae.parallel import Ranks

PLAIN_VARIABLE = "TIGHTBOUND_PLAIN"
_allowed: ContextVar[bool] = ContextVar("allowed", default=True)


def is_allowed() -> bool:
    """Whether fast paths may be taken here."""
    return _allowed.get() and os.environ.get(PLAIN_VARIABLE) != "1"


@contextmanager
def allowed(fast: bool) -> Iterator[None]:
    """Within the block fast paths are taken only if `fast`, and if they were before."""
    token = _allowed.set(_allowed.get() and fast)
    try:
        yield
    finally:
        _allowed.reset(token)


def _module(name: str) -> Any:
    """A module of `vae.fast`, or None where it is switched off or not there."""
    if not is_allowed():
        return None
    try:
        return import_module(f"vae.fast.{name}")
    except ModuleNotFoundError as error:
        if error.name in ("vae.fast", f"vae.fast.{name}"):
            return None
        raise


def compiled_decoder(
    model: VAE, x: Tensor, precision: str, num_samples: int
) -> CompiledDecoder | None:
    """log p(x|z) as a compiled function of z (C, B, L), where one call has work enough for it."""
    module = _module("compiled_decoder")
    return module and module.compiled_decoder(model, x, precision, num_samples)


def decoder_node(model: VAE) -> Callable[[Tensor, Tensor], Tensor] | None:
    """log p(x|z), (K, B), of x and z (K, B, L) as one node of autograd."""
    module = _module("perceptron")
    if module is None or not module.supports_decoder(model):
        return None
    return lambda x, z: module.log_px_z(model, x, z)


class ManualElbo(NamedTuple):
    """`elbo_and_gradient` of `vae.fast.perceptron`, and the parameters that it writes gradients
    for."""

    elbo_and_gradient: Callable[..., tuple[Tensor, Tensor]]
    parameters: list[Tensor]


def manual_elbo(model: VAE, num_values: int) -> ManualElbo | None:
    """The ELBO with its gradient, without autograd; num_values: K B D of a step."""
    module = _module("perceptron")
    if module is None or num_values > module.CACHED_VALUES or not module.supports(model):
        return None
    return ManualElbo(module.elbo_and_gradient, module.parameters_of(model))


def graphed_steps(
    model: VAE,
    gradient: Callable[..., tuple[Tensor, ...]],
    update: Callable[..., None],
    parameters: Sequence[Tensor],
    batch_size: int,
) -> GraphedSteps | None:
    """Training steps as CUDA graphs."""
    module = _module("cuda_graphs")
    if module is None or not module.may_be_graphed(model):
        return None
    return module.GraphedSteps(gradient, update, parameters, batch_size)


def sharing_ranks(parameters: Mapping[str, Tensor], state: dict[str, Tensor]) -> Ranks | None:
    """Ranks of one machine with one copy of the weights in memory. All ranks take part."""
    module = _module("ranks")
    return module and module.sharing_ranks(parameters, state)
