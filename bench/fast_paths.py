"""Each fast path (`vae.fast`) beside the plain way, in turn: what it earns.

    python -m bench.fast_paths

Binary 28 × 28 pictures made up here, the default network (200-200, tanh), 32 latent values, one
thread a process. Rates are medians over turns of both, a second each, and so are their ratios.
"""

from __future__ import annotations

import multiprocessing as mp
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from vae import VAE, VAEConfig, acceleration
from vae.data import Dataset
from vae.evidence import importance_sampling
from vae.objectives import Objective
from vae.training import Trainer, TrainingConfig, TrainingState

BATCHES = (128, 512, 2048)
TURNS, SECONDS = 7, 1.0
CONFIG = VAEConfig(
    data_shape=(1, 28, 28), space="binary", latent_dim=32, likelihood="bernoulli", hidden=(200, 200)
)


def data() -> Dataset:
    x = torch.rand(6144, 1, 28, 28, generator=torch.Generator().manual_seed(0)) < 0.2
    return Dataset(train=x.byte(), valid=x[:100].byte())


def steps(batch_size: int, objective: Objective, fast: bool) -> Iterator[int]:
    """Training steps without end; yields the examples of each."""
    torch.manual_seed(0)
    config = TrainingConfig(batch_size=batch_size, epochs=10**6, seed=0)
    trainer = Trainer(VAE(CONFIG), data(), config, objective, TrainingState(), fast)
    with acceleration.allowed(fast):
        trainer.manual = trainer._manual_parameters()
        for epoch in cycle(range(1, 100)):
            for step, batch in enumerate(trainer.train_batches(epoch)):
                trainer.train_step(batch, epoch, step, 1.0)
                yield len(batch.x)


def estimates(batch_size: int, fast: bool) -> Iterator[int]:
    """Importance sampling with K = 1,000 of batches without end."""
    torch.manual_seed(0)
    model, x = VAE(CONFIG).eval(), data().train[: min(batch_size, 256)]
    while True:
        importance_sampling(model, x, 1000, fast=fast)
        yield len(x)


def rate(work: Iterator[int]) -> float:
    """Examples a second over a turn."""
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        count += next(work)
    return count / (time.perf_counter() - start)


def in_turn(make: Callable[[bool], Iterator[int]]) -> tuple[float, float, float]:
    """Rates of the fast and the plain way, and the median of their ratios."""
    works = [make(True), make(False)]
    for work in works:
        next(work)
    pairs = [(rate(works[0]), rate(works[1])) for _ in range(TURNS)]
    fast, plain = (statistics.median(side) for side in zip(*pairs, strict=True))
    return fast, plain, statistics.median(one / other for one, other in pairs)


def rank_process(rank: int, fast: bool, folder: str, batch_size: int, turns: Connection) -> None:
    """One of two ranks: as many steps as it is told, for each number that arrives."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{fast}-{batch_size}", rank=rank, world_size=2
    )
    work = steps(batch_size, Objective(), fast)
    while (count := turns.recv()) > 0:
        start = time.perf_counter()
        for _ in range(count):
            next(work)
        turns.send(time.perf_counter() - start)


def two_ranks(batch_size: int) -> tuple[float, float, float]:
    """Ranks that share their memory beside ranks that sum gradients by gloo."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        sides: list[list[Connection]] = []
        processes = []
        for fast in (True, False):
            ends = []
            for rank in range(2):
                own, theirs = context.Pipe()
                arguments = (rank, fast, folder, batch_size, theirs)
                process = context.Process(target=rank_process, args=arguments, daemon=True)
                process.start()
                processes.append(process)
                ends.append(own)
            sides.append(ends)

        def turn(ends: list[Connection], count: int) -> float:
            for end in ends:
                end.send(count)
            return count * batch_size / max(end.recv() for end in ends)

        for ends in sides:
            turn(ends, 3)
        count = max(5, 4000 // batch_size)
        pairs = [(turn(sides[0], count), turn(sides[1], count)) for _ in range(TURNS)]
        for ends in sides:
            for end in ends:
                end.send(0)
        for process in processes:
            process.join(30)
    fast_rate, plain_rate = (statistics.median(side) for side in zip(*pairs, strict=True))
    return fast_rate, plain_rate, statistics.median(one / other for one, other in pairs)


def main() -> None:
    torch.set_num_threads(1)
    iwae = Objective(name="iwae", num_samples=5)
    ways: dict[str, Callable[[int], tuple[float, float, float]]] = {
        "manual backward, ELBO": lambda b: in_turn(lambda fast: steps(b, Objective(), fast)),
        "decoder node, IWAE of 5": lambda b: in_turn(lambda fast: steps(b, iwae, fast)),
        "compiled decoder, K = 1,000": lambda b: in_turn(lambda fast: estimates(b, fast)),
        "shared memory, two ranks": two_ranks,
    }
    print("| path | batch | examples a second | plain | ratio |\n|---|---|---|---|---|")
    for name, measure in ways.items():
        for batch_size in BATCHES if "K =" not in name else (256,):
            fast, plain, ratio = measure(batch_size)
            row = (name, batch_size, f"{fast:,.0f}", f"{plain:,.0f}", f"{ratio:.2f}")
            print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
