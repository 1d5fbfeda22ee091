"""Sums over ranks: in shared memory and through torch.distributed, of real processes."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from vae import shared_sum
from vae.ranks import GradientSum

RANKS, STEPS = 3, 20
WAYS = ("shared", "one elsewhere", "no memory", "too large")
SHAPES = [(7, 5), (5,), (2, 3, 4)]


def values(rank: int, step: int) -> list[Tensor]:
    """The loss and the gradients of one rank in one step."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    return [torch.randn(shape, generator=generator) for shape in [(), *SHAPES]]


def start(rank: int, ranks: int, folder: str) -> list[Tensor]:
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
    return [torch.zeros(shape, requires_grad=True) for shape in [*SHAPES, (3,)]]


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def _patch(way: str, rank: int, patch: pytest.MonkeyPatch) -> None:
    if way == "one elsewhere" and rank == 1:
        patch.setattr(shared_sum, "_connect", lambda address, rank: None)  # another machine's
    if way == "no memory" and rank == 0:
        patch.setattr(shared_sum._Host, "start", lambda size, ranks: None)
    if way == "too large":
        patch.setattr(shared_sum, "LARGEST", 100)


def _sums(rank: int, folder: str) -> None:
    """Every way's sums of this rank into a file."""
    parameters = start(rank, RANKS, folder)
    for way in WAYS:
        before = open_files()
        with pytest.MonkeyPatch.context() as patch:
            _patch(way, rank, patch)
            sums = GradientSum(parameters)
        assert (sums.shared is not None) == (way == "shared")
        found = []
        for step in range(STEPS):
            loss, *gradients = values(rank, step)
            for parameter, gradient in zip(parameters, gradients, strict=False):
                parameter.grad = gradient  # the last one has none
            time.sleep(0.002 * ((rank + step) % RANKS))  # each is early, and each is late
            total = sums(loss)
            assert parameters[-1].grad is None
            found.append([total, *(parameter.grad for parameter in parameters[:-1])])
        sums.close()
        assert open_files() == before
        torch.save(found, f"{folder}/{way}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sums_of_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sums")
    spawn(_sums, args=(str(folder),), nprocs=RANKS)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_sums_are_those_of_all_ranks_and_equal_to_the_bit(sums_of_three: Path, way: str):
    first, *others = (torch.load(sums_of_three / f"{way}-{rank}.pt") for rank in range(RANKS))
    for step in range(STEPS):
        of_each_rank = zip(*(values(rank, step) for rank in range(RANKS)), strict=True)
        for total, parts, *others_total in zip(
            first[step], of_each_rank, *(other[step] for other in others), strict=True
        ):
            torch.testing.assert_close(total, sum(parts))
            assert all(torch.equal(total, one) for one in others_total)


def _one_is_killed(rank: int, folder: str) -> None:
    parameters = start(rank, 2, folder)
    sums = GradientSum(parameters)
    assert sums.shared is not None
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    sums(torch.ones(()))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while True:
            sums(torch.ones(()))
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
