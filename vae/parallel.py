"""What the ranks of one training do together in a step: `Trainer` asks a `Ranks`.

DistributedDataParallel sums gradients too, and overlaps that with the backward pass. On a CPU both
want the same cores, and to make one imports torch's compiler, seconds in each worker; so it serves
GPUs (`vae.training`). Ranks of one machine share their memory instead (`vae.fast.ranks`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Ranks:
    """One rank alone, or ranks whose gradients DistributedDataParallel sums.

    Gradients are the `.grad` of the parameters that have one: those that this rank is to update.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = dict(parameters)

    def begin_epoch(self) -> None:
        """To be called before the first step of an epoch; returns once all ranks have."""

    def lend_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Give these parameters a `.grad` to be overwritten, where that saves a copy."""

    def sum(self, loss: Tensor) -> Tensor:
        """Make gradients sums over ranks; returns that of the loss, (), the same on all of them.

        Only parameters that this rank is to update keep one. The same must have one on every rank.
        Raises ConnectionError, or torch.distributed's RuntimeError, where another rank is gone.
        """
        return loss.detach()

    def norm(self) -> Tensor:
        """The norm of the whole gradient, after `sum`: (), the same on all ranks."""
        return nn.utils.get_total_norm(
            [one.grad for one in self.parameters.values() if one.grad is not None]
        )

    def end_update(self) -> None:
        """To be called once this rank has updated its parameters; then all are, on all ranks."""

    def close(self, state: dict[str, Tensor]) -> None:
        """Leave the parameters and the optimiser's state to this rank alone."""


class SummingRanks(Ranks):
    """Ranks of several machines, or without shared memory: every one updates all parameters."""

    def sum(self, loss: Tensor) -> Tensor:
        given = [(one, one.grad) for one in self.parameters.values() if one.grad is not None]
        mine = [loss.detach().view(1), *(gradient.flatten() for _, gradient in given)]
        total = torch.cat(mine)
        dist.all_reduce(total)
        loss, *sums = total.split([part.numel() for part in mine])
        for (parameter, gradient), total in zip(given, sums, strict=True):
            parameter.grad = total.view_as(gradient)
        return loss.view(())
