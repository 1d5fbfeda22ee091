"""Ranks that train one model on CPUs: they start from equal weights and sum their gradients.

DistributedDataParallel does the same, and overlaps the sums with the backward pass. On a CPU both
want the same cores, and to make one imports torch's compiler, seconds in each worker; so it serves
GPUs (`vae.training`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vae.shared_sum import SharedSum, open_shared_sum


def take_weights_of_first(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    for tensor in module.state_dict().values():
        dist.broadcast(tensor, src=0)


class GradientSum:
    """Sums over all ranks, the same to the bit on each of them.

    In memory that the ranks share where they are processes of one machine, else through
    torch.distributed. To make one is a call that all ranks take part in.
    """

    shared: SharedSum | None

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        most = 1 + sum(one.numel() for one in self.parameters)
        self.shared = open_shared_sum(most, self.parameters[0].dtype)

    def __call__(self, loss: Tensor) -> Tensor:
        """Replace each gradient by its sum over all ranks; returns that of the loss, a scalar.

        The same parameters must have gradients on every rank. Raises ConnectionError, or
        torch.distributed's RuntimeError, where another rank is gone.
        """
        given = [(one, one.grad) for one in self.parameters if one.grad is not None]
        mine = [loss.detach().view(1), *(gradient.flatten() for _, gradient in given)]
        if self.shared is not None:
            total = self.shared(mine)
        else:
            total = torch.cat(mine)
            dist.all_reduce(total)
        loss, *parts = total.split([part.numel() for part in mine])
        for (parameter, gradient), part in zip(given, parts, strict=True):
            parameter.grad = part.view_as(gradient)
        return loss.view(())

    def close(self) -> None:
        """Give the shared memory back."""
        if self.shared is not None:
            self.shared.close()
