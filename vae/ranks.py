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


def take_weights_of_first(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    for tensor in module.state_dict().values():
        dist.broadcast(tensor, src=0)


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace each gradient by its sum over all ranks, all in one message.

    The same parameters must have gradients on every rank.
    """
    given = [(one, one.grad) for one in parameters if one.grad is not None]
    total = torch.cat([gradient.flatten() for _, gradient in given])
    dist.all_reduce(total)
    parts = total.split([gradient.numel() for _, gradient in given])
    for (parameter, gradient), part in zip(given, parts, strict=True):
        parameter.grad = part.view_as(gradient)
