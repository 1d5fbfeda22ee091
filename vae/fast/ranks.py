"""What the ranks of one training do together in a step: `Trainer` asks a `Ranks`.

DistributedDataParallel sums gradients too, and overlaps that with the backward pass. On a CPU both
want the same cores, and to make one imports torch's compiler, seconds in each worker; so it serves
GPUs (`vae.training`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vae.system import Piece, SharedMemory, open_shared_memory

LOSS, NORM, FIRST = 0, 1, 16  # where in a rank's row its loss, its norm and its gradients begin


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
        memory.meet()
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
        self.memory.meet()

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
        self.memory.meet()
        total = mine[self.own_values]
        for rank, row in enumerate(self.rows):
            if rank != self.rank:
                total += row[self.own_values]
        return self.rows[:, LOSS].sum()

    def norm(self) -> Tensor:
        self.rows[self.rank, NORM] = super().norm()
        self.memory.meet()
        return torch.linalg.vector_norm(self.rows[:, NORM])

    def end_update(self) -> None:
        for parameter in self.weights:
            parameter.grad = None  # else `Module.to` would move the row's part out of the row
        self.memory.meet()

    def close(self, state: dict[str, Tensor]) -> None:
        for parameter in self.weights:
            parameter.data, parameter.grad = parameter.data.clone(), None
        for key, tensor in state.items():
            state[key] = tensor.clone()
        self.weights, self.gradients, self.rows = {}, {}, torch.empty(0)
        self.memory.close()


def join_ranks(
    model: nn.Module, parameters: Mapping[str, Tensor], state: dict[str, Tensor]
) -> Ranks:
    """Give all ranks the weights of rank 0; returns how they train on together.

    parameters: by name, those that are trained; state: the optimiser's, the same on all ranks,
    whose tensors may be replaced. All ranks take part.
    """
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, src=0)
    memory = None
    if _may_move(list(parameters.values())):
        memory = open_shared_memory(pieces_of(parameters, state, dist.get_world_size()))
    if memory is None:
        return SummingRanks(parameters)
    return SharingRanks(parameters, state, memory)


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
