"""Ranks of one machine that train with one copy of the weights, in memory that they share.

Shapes: one row of memory for each rank, with its loss, its norm and its gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from vae.parallel import Ranks
from vae.system import Piece, SharedMemory, open_shared_memory

LOSS, NORM, FIRST = 0, 1, 16  # where in a rank's row its loss, its norm and its gradients begin


class SharingRanks(Ranks):
    """Ranks of one machine, with one copy of the parameters and of the optimiser's state.

    Each writes its gradients into its row, adds to them the other ranks' of those parameters that
    are its own to update, and updates these. So what a step moves between two cores is each
    gradient and each parameter once, and the optimiser's work is shared too.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], state: dict[str, Tensor], memory: SharedMemory
    ) -> None:
        """memory: the tensors of `pieces_of` these; rank 0's values are taken."""
        super().__init__(parameters)
        self.memory, self.rank = memory, memory.rank
        *tensors, self.rows = memory.tensors
        if self.rank == 0:
            for tensor, value in zip(tensors, _shared(parameters, state), strict=True):
                tensor.copy_(value.detach())
        memory.barrier()
        self.weights = dict(zip(parameters.values(), tensors, strict=False))
        for parameter, weight in self.weights.items():
            parameter.data = weight
        state.update(zip(sorted(state), tensors[len(parameters) :], strict=True))

        owners = self.owners(parameters, len(self.rows))
        order = sorted(parameters, key=lambda name: owners[name])
        flats = self.rows[self.rank, FIRST:].split([parameters[name].numel() for name in order])
        self.gradients = {  # where this rank writes them
            parameters[name]: flat.view_as(parameters[name])
            for name, flat in zip(order, flats, strict=True)
        }
        self.own = {parameters[name] for name in order if owners[name] == self.rank}
        first = sum(parameters[name].numel() for name in order if owners[name] < self.rank)
        count = sum(parameter.numel() for parameter in self.own)
        self.own_values = slice(FIRST + first, FIRST + first + count)

    @staticmethod
    def owners(parameters: Mapping[str, Tensor], ranks: int) -> dict[str, int]:
        """The rank that updates each parameter: about as many values on each."""
        loads, owners = [0] * ranks, {}
        for name in sorted(parameters, key=lambda name: -parameters[name].numel()):
            owners[name] = loads.index(min(loads))
            loads[owners[name]] += parameters[name].numel()
        return owners

    def begin_epoch(self) -> None:
        for parameter, weight in self.weights.items():
            if parameter.data_ptr() != weight.data_ptr():  # replaced since, by `VAE.to`, say
                weight.copy_(parameter.detach())
                parameter.data = weight
        self.memory.barrier()

    def lend_gradients(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.grad = self.gradients.get(parameter)

    def sum(self, loss: Tensor) -> Tensor:
        mine = self.rows[self.rank]
        mine[LOSS] = loss.detach()
        for parameter, gradient in self.gradients.items():
            if parameter.grad is not None:
                gradient.copy_(parameter.grad)  # nothing to do where it was lent
                parameter.grad = gradient if parameter in self.own else None
        self.memory.barrier()
        total = mine[self.own_values]
        for rank, row in enumerate(self.rows):
            if rank != self.rank:
                total += row[self.own_values]
        return self.rows[:, LOSS].sum()

    def norm(self) -> Tensor:
        self.rows[self.rank, NORM] = super().norm()
        self.memory.barrier()
        return torch.linalg.vector_norm(self.rows[:, NORM])

    def end_update(self) -> None:
        for parameter in self.weights:
            parameter.grad = None  # else `Module.to` would move the row's part out of the row
        self.memory.barrier()

    def close(self, state: dict[str, Tensor]) -> None:
        for parameter in self.weights:
            parameter.data, parameter.grad = parameter.data.clone(), None
        for key, tensor in state.items():
            state[key] = tensor.clone()
        self.weights, self.gradients, self.rows = {}, {}, torch.empty(0)
        self.memory.close()


def sharing_ranks(
    parameters: Mapping[str, Tensor], state: dict[str, Tensor]
) -> SharingRanks | None:
    """`SharingRanks`, where all ranks are on this machine and their parameters may move; else None.

    parameters: by name, those that are trained, the same on all ranks; state: the optimiser's,
    whose tensors may be replaced. All ranks take part.
    """
    memory = None
    if _may_move(list(parameters.values())):
        memory = open_shared_memory(pieces_of(parameters, state, dist.get_world_size()))
    return None if memory is None else SharingRanks(parameters, state, memory)


def _may_move(parameters: Sequence[Tensor]) -> bool:
    """Whether each may have a place of its own in memory, in rows of one type, and lose nothing."""
    return (
        all(one.is_contiguous() and one.numel() for one in parameters)
        and len({one.untyped_storage().data_ptr() for one in parameters}) == len(parameters)
        and len({one.dtype for one in parameters}) == 1
    )


def _shared(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[Tensor]:
    return [*parameters.values(), *(state[key] for key in sorted(state))]


def pieces_of(
    parameters: Mapping[str, Tensor], state: Mapping[str, Tensor], ranks: int
) -> list[Piece]:
    """Parameters, state, and a row for each rank: its loss, its norm and its gradients."""
    count = sum(one.numel() for one in parameters.values())
    dtype = next(iter(parameters.values())).dtype
    shared = [Piece(one.shape, one.dtype) for one in _shared(parameters, state)]
    return [*shared, Piece((ranks, FIRST + count), dtype)]
