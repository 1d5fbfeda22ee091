"""Two workers of one thread against one worker of two threads: the speed of data-parallel training.

    python -m bench.ddp --root ../shared/data/torchvision

Whole MNIST, the default network, at several global batch sizes. Both sides run the training loop
of `vae.training`; the two workers share one copy of the weights, with `--gloo` they sum gradients
through sockets and each has its own. They train in turn, a few steps at a time, in processes that
live on, so that a busy machine disturbs both alike; figures are medians over turns.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import statistics
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.train import build_model
from vae.data import Dataset
from vae.models import VAEConfig
from vae.objectives import Objective
from vae.system import shared_memory
from vae.training import Trainer, TrainingConfig, TrainingState

VALID = 5000


@dataclass(frozen=True)
class Side:
    """One way to train: so many ranks of so many threads."""

    ranks: int
    threads: int


ONE_WORKER, TWO_WORKERS = Side(ranks=1, threads=2), Side(ranks=2, threads=1)


def mnist(root: Path) -> Dataset:
    from torchvision.datasets import MNIST

    images = MNIST(str(root), train=True).data.unsqueeze(1)
    return Dataset(train=images[VALID:], valid=images[:VALID])


def work(side: Side, rank: int, meet: str, args: argparse.Namespace, turns: Connection) -> None:
    """A rank's process: for each (batch size, steps) that arrives, the seconds that they take."""
    torch.set_num_threads(side.threads)
    if args.gloo:
        shared_memory.LARGEST = 0
    if side.ranks > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meet}", rank=rank, world_size=side.ranks
        )
    data = mnist(args.root)
    config = VAEConfig(
        data_shape=(1, 28, 28),
        space="grey8",
        latent_dim=args.latent_dim,
        likelihood=args.likelihood,
    )
    trainers: dict[int, Trainer] = {}
    while (order := turns.recv()) is not None:
        batch_size, steps = order
        if batch_size not in trainers:
            trainers[batch_size] = Trainer(
                build_model(config, data, seed=0),
                data,
                TrainingConfig(batch_size=batch_size),
                Objective(),
                TrainingState(),
            )
        trainer = trainers[batch_size]
        batches = trainer.train_batches(epoch=1)
        first = next(batches)
        trainer.train_step(first, epoch=1, step=0, beta=1.0)
        if side.ranks > 1:
            dist.barrier()
        start = time.perf_counter()
        for step, batch in zip(range(1, steps + 1), batches, strict=False):
            trainer.train_step(batch, epoch=1, step=step, beta=1.0)
        turns.send(time.perf_counter() - start)


def start(side: Side, args: argparse.Namespace) -> list[Connection]:
    context = mp.get_context("spawn")
    meet = tempfile.mktemp()
    ends = []
    for rank in range(side.ranks):
        here, there = context.Pipe()
        context.Process(target=work, args=(side, rank, meet, args, there), daemon=True).start()
        ends.append(here)
    return ends


def turn(ends: list[Connection], order: tuple[int, int]) -> float:
    for end in ends:
        end.send(order)
    return max(end.recv() for end in ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("../shared/data/torchvision"))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2048, 1024, 512, 128])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--gloo", action="store_true", help="as workers of several machines")
    parser.add_argument("--latent-dim", type=int, default=16)
    parser.add_argument("--likelihood", default="gaussian")
    args = parser.parse_args()
    one, two = start(ONE_WORKER, args), start(TWO_WORKERS, args)
    print("global batch   1 × 2 threads   2 × 1 thread   ratio   (images/s, medians in turn)")
    for batch_size in args.batch_sizes:
        steps = max(5, 20_000 // batch_size)
        order = (batch_size, steps)
        turn(one, order)
        turn(two, order)
        seconds = [(turn(one, order), turn(two, order)) for _ in range(args.turns)]
        alone, together = (
            steps * batch_size / statistics.median(s) for s in zip(*seconds, strict=True)
        )
        print(
            f"{batch_size:12d} {alone:15.0f} {together:14.0f} {together / alone:7.2f}", flush=True
        )
    for end in (*one, *two):
        end.send(None)


if __name__ == "__main__":
    main()
