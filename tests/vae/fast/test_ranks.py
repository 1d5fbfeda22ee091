"""Ranks: in memory that they share and through torch.distributed, in real processes."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from vae.fast.ranks import SharingRanks, _may_move
from vae.parallel import Ranks, SummingRanks
from vae.system import shared_memory
from vae.training.trainer import join_ranks

RANKS, STEPS = 3, 20
WAYS = ("shared", "one elsewhere", "no memory", "too large")
SHAPES = {"first": (7, 5), "second": (5,), "third": (2, 3, 4), "unused": (3,)}
OWN = [{"first"}, {"third"}, {"second"}]


def values(rank: int, step: int) -> list[Tensor]:
    """The loss and the gradients of one rank in one step; the last parameter has none."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    shapes = [(), *list(SHAPES.values())[:-1]]
    return [torch.randn(shape, generator=generator) for shape in shapes]


class Rank:
    """A model of some parameters and a buffer, with a state for each, as an optimiser's."""

    def __init__(self, rank: int) -> None:
        self.module = nn.Module()
        for name, shape in SHAPES.items():
            self.module.register_parameter(name, nn.Parameter(torch.full(shape, float(rank))))
        self.module.register_buffer("statistic", torch.full((2,), float(rank)))
        self.parameters = dict(self.module.named_parameters())
        self.state = {f"{name}/step": torch.full((), 10.0 * rank) for name in SHAPES}
        self.ranks = join_ranks(self.module, self.parameters, self.state)

    def set_gradients(self, gradients: list[Tensor], *, in_place: bool = False) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
        *used, _ = self.parameters.values()
        if in_place:
            self.ranks.lend_gradients(used)
        for parameter, gradient in zip(used, gradients, strict=True):
            if in_place and parameter.grad is not None:
                parameter.grad.copy_(gradient)
            else:
                parameter.grad = gradient

    def update(self) -> None:
        """Each parameter less its gradient, and its steps counted, where it has one."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if parameter.grad is not None:
                    parameter -= parameter.grad
                    self.state[f"{name}/step"] += 1
        self.ranks.end_update()

    def found(self) -> dict[str, Tensor]:
        tensors = {**self.module.state_dict(), **self.state}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def start(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def _patch(way: str, rank: int, patch: pytest.MonkeyPatch) -> None:
    if way == "one elsewhere" and rank == 1:
        patch.setattr(shared_memory, "_connect", lambda address, rank: None)  # another machine's
    if way == "no memory" and rank == 0:
        patch.setattr(shared_memory._Host, "start", lambda size, ranks: None)
    if way == "too large":
        patch.setattr(shared_memory, "LARGEST", 100)


def _train(rank: int, folder: str) -> None:
    """What this rank has after each step, in every way, into a file."""
    start(rank, RANKS, folder)
    for way in WAYS:
        before = open_files()
        with pytest.MonkeyPatch.context() as patch:
            _patch(way, rank, patch)
            one = Rank(rank)
        assert type(one.ranks) is (SharingRanks if way == "shared" else SummingRanks)
        rows = []
        for step in range(STEPS):
            loss, *gradients = values(rank, step)
            one.set_gradients(gradients, in_place=step % 2 == 1)
            time.sleep(0.002 * ((rank + step) % RANKS))  # each is early, and each is late
            total = one.ranks.sum(loss)
            norm = one.ranks.norm()
            assert one.parameters["unused"].grad is None
            own = {name for name, value in one.parameters.items() if value.grad is not None}
            assert own == (OWN[rank] if way == "shared" else {"first", "second", "third"})
            one.update()
            rows.append({"loss": total.clone(), "norm": norm.clone(), **one.found()})
            if step == STEPS // 2:
                one.module.double().float()  # moves them in memory
            one.ranks.begin_epoch()
            dist.barrier()
        one.ranks.close(one.state)
        with torch.no_grad():
            for parameter in one.parameters.values():
                parameter += rank  # each has its own from here on
        rows.append(one.found())
        dist.barrier()
        assert all(torch.equal(rows[-1][name], value) for name, value in one.found().items())
        assert open_files() == before
        torch.save(rows, f"{folder}/{way}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    spawn(_train, args=(str(folder),), nprocs=RANKS)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_every_rank_has_what_all_gradients_make_of_the_first_ones_weights(
    three_ranks: Path, way: str
):
    """To the bit the same on all ranks, from weights and a state that differed."""
    first, *others = (torch.load(three_ranks / f"{way}-{rank}.pt") for rank in range(RANKS))
    expected = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(STEPS):
        of_each_rank = zip(*(values(rank, step) for rank in range(RANKS)), strict=True)
        loss, *gradients = (torch.stack(parts).sum(0) for parts in of_each_rank)
        for name, gradient in zip(SHAPES, gradients, strict=False):
            expected[name] = expected[name] - gradient
        row = first[step]
        torch.testing.assert_close(row["loss"], loss)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        torch.testing.assert_close(row["norm"], norm)
        for name, value in expected.items():
            torch.testing.assert_close(row[name], value, rtol=1e-5, atol=1e-5)
            assert row[f"{name}/step"] == (0 if name == "unused" else step + 1)
        assert torch.equal(row["statistic"], torch.zeros(2))
        for other in others:
            for name, value in row.items():
                is_own = way != "shared" and name.endswith("/step")
                assert is_own or torch.equal(other[step][name], value)


def test_a_rank_updates_as_much_as_another():
    shapes = {"a": (3,), "b": (100,), "c": (40,), "d": (60,), "e": (2,)}
    parameters = {name: torch.zeros(shape) for name, shape in shapes.items()}
    assert SharingRanks.owners(parameters, 2) == {"b": 0, "d": 1, "c": 1, "a": 0, "e": 1}
    assert set(SharingRanks.owners(parameters, 7).values()) == set(range(5))


def test_parameters_that_would_lose_something_stay_where_they_are():
    weight = torch.zeros(4, 3)
    assert _may_move([weight, torch.zeros(3)])
    assert not _may_move([weight, weight[0]])  # tied
    assert not _may_move([weight.t()])
    assert not _may_move([weight, torch.zeros(0)])
    assert not _may_move([weight, torch.zeros(3, dtype=torch.float64)])


def test_one_rank_alone_keeps_its_gradients():
    parameters = {"one": nn.Parameter(torch.zeros(2)), "unused": nn.Parameter(torch.zeros(3))}
    parameters["one"].grad = gradient = torch.tensor([3.0, 4.0])
    ranks = Ranks(parameters)
    ranks.begin_epoch()
    ranks.lend_gradients(parameters.values())
    assert ranks.sum(torch.tensor(2.0, requires_grad=True)) == 2
    assert ranks.norm() == 5
    ranks.end_update()
    ranks.close({})
    assert parameters["one"].grad is gradient
    assert parameters["unused"].grad is None


def _one_is_killed(rank: int, folder: str) -> None:
    start(rank, 2, folder)
    one = Rank(rank)
    assert isinstance(one.ranks, SharingRanks)
    loss, *gradients = values(rank, 0)
    for step in range(1_000_000):
        if rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        one.set_gradients(gradients)
        try:
            one.ranks.sum(loss)
            one.update()
        except ConnectionError as error:
            Path(folder, "told").write_text(str(error))
            raise


def test_a_killed_rank_ends_the_others_wait(tmp_path: Path):
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_one_is_killed, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [1, -signal.SIGKILL]
    assert (tmp_path / "told").read_text() == "another worker of this training ended"
