"""Training on data larger than memory: Parquet shards through Ray Data, batch by batch.

Each example is seen once an epoch, by one worker; the files' order and a buffer of examples are
shuffled anew each epoch. The order depends on how fast readers and workers are, so a streamed run
is not repeatable to the bit. Validation reads the shards in their order, as data in memory does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.cluster import require_seen
from pipeline.stage import MEGABYTE, Meta, read_shard, shard_paths, training_mb
from pipeline.train.worker import TrainingArrays, load_arrays
from vae.data import TRAIN, VALID_BATCH, Batch, NoiseShape, shares_of, statistics_of, with_noise

BUFFER_BYTES = 64 * MEGABYTE  # of a worker's shuffle buffer, at most
BUFFER_EXAMPLES = 16384
BLOCK_BYTES = 16 * MEGABYTE  # that are read and handed to a worker at a time, at most
BLOCKS_PER_WORKER = 16  # at least: workers' shares differ by a block at most
NAME = "train"


def load_training(prepared: Path, meta: Meta, limit_mb: int | None) -> TrainingArrays | Stream:
    """The prepared arrays, or a stream of them where they exceed `training.memory_limit_mb`."""
    if limit_mb is None or training_mb(meta) <= limit_mb:
        return load_arrays(prepared, meta)
    parts = (torch.tensor(read_shard(path, meta).x) for path in shard_paths(prepared, NAME))
    mean, std = statistics_of(parts, binarize=meta.grey_binarized)
    return Stream(prepared=str(prepared.resolve()), meta=meta, mean=mean.numpy(), std=std.numpy())


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Where the examples lie and what a model must know of them beforehand.

    prepared: an absolute folder that every node sees. mean, std: of each training value, in data
    units, (*data_shape).
    """

    prepared: str
    meta: Meta
    mean: np.ndarray
    std: np.ndarray

    @property
    def nbytes(self) -> int:
        """What Ray's object store must hold at a time, besides its usual size."""
        return 0

    def ray_datasets(self, num_workers: int, seed: int) -> dict[str, Any]:
        """The training split for Ray Train, in blocks that spread evenly over the workers.

        Raises UserError where a node of the connected cluster doesn't see the shards.
        """
        from pipeline.train.ray_data import read_shuffled

        require_seen(
            [path for split in (NAME, "valid") for path in shard_paths(Path(self.prepared), split)],
            "a stream is read on every node, so run in a folder that all of them mount, or let "
            "the data fit in memory (training.memory_limit_mb of params.yaml)",
        )
        rows = max(1, self.meta.counts[NAME] // (BLOCKS_PER_WORKER * num_workers))
        example = self.meta.num_values * self.meta.value_bytes
        paths = shard_paths(Path(self.prepared), NAME)
        block_bytes = min(rows * example, BLOCK_BYTES)
        dataset = read_shuffled(
            paths, column="x", block_bytes=block_bytes, readers=max(2, num_workers), seed=seed
        )
        return {NAME: dataset}

    def dataset(self) -> StreamedDataset:
        """The batches of the Ray Train worker that calls this."""
        import ray.train

        return StreamedDataset(stream=self, shard=ray.train.get_dataset_shard(NAME))


@dataclass(frozen=True, kw_only=True)
class StreamedDataset:
    """One worker's batches; a `vae.data.Source`. shard: a ray.data.DataIterator."""

    stream: Stream
    shard: Any
    device: torch.device | str = "cpu"

    @property
    def num_train(self) -> int:
        return self.stream.meta.counts[NAME]

    @property
    def _nothing(self) -> Tensor:
        meta = self.stream.meta
        dtype = torch.float64 if meta.space == "continuous" else torch.uint8
        return torch.empty((0, *meta.data_shape), dtype=dtype)

    def to(self, device: torch.device | str) -> StreamedDataset:
        return replace(self, device=device)

    def statistics(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.stream.mean), torch.tensor(self.stream.std)

    def train_batches(
        self,
        noise: NoiseShape,
        *,
        batch_size: int,
        seed: int,
        epoch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Batch]:
        """As `Source`: each example once an epoch, until no worker has any left."""
        own = max(1, (rank + 1) * batch_size // world_size - rank * batch_size // world_size)
        examples = self._examples(own, seed + epoch)
        step = 0
        while True:
            x = next(examples, self._nothing)
            if (global_size := self._over_all_workers(len(x), world_size)) == 0:
                return
            yield with_noise(
                x.to(self.device),
                noise,
                key=(seed, TRAIN, epoch, step, rank),
                binarize=self.stream.meta.grey_binarized,
                global_size=global_size,
            )
            step += 1

    def valid_batches(
        self, noise: NoiseShape, *, seed: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """As `Source`; every worker reads the shards and keeps its share of each batch."""
        for batch in shares_of(self._valid(), noise, seed, rank, world_size):
            yield batch._replace(x=batch.x.to(self.device), eps=batch.eps.to(self.device))

    def _examples(self, batch_size: int, seed: int) -> Iterator[Tensor]:
        """This worker's examples of one epoch, shuffled, `batch_size` at a time."""
        meta = self.stream.meta
        example = meta.num_values * meta.value_bytes
        buffer = max(batch_size, min(BUFFER_EXAMPLES, BUFFER_BYTES // example))
        for table in self.shard.iter_batches(
            batch_size=batch_size,
            batch_format="pyarrow",
            local_shuffle_buffer_size=buffer,
            local_shuffle_seed=seed,
        ):
            yield torch.from_numpy(_array(table, meta))

    def _valid(self) -> Iterator[Tensor]:
        """The validation split in batches of VALID_BATCH, whatever the shards' sizes."""
        rest = self._nothing
        for path in shard_paths(Path(self.stream.prepared), "valid"):
            rest = torch.cat([rest, torch.tensor(read_shard(path, self.stream.meta).x)])
            while len(rest) >= VALID_BATCH:
                yield rest[:VALID_BATCH]
                rest = rest[VALID_BATCH:]
        if len(rest):
            yield rest

    def _over_all_workers(self, count: int, world_size: int) -> int:
        if world_size == 1:
            return count
        total = torch.tensor([count], device=self.device)
        dist.all_reduce(total)
        return int(total.item())


def _array(table: pa.Table, meta: Meta) -> np.ndarray:
    """A table's column `x`, (B, *data_shape)."""
    column = table.column("x").combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0)
    return np.array(column.to_numpy_ndarray()).reshape(-1, *meta.data_shape)
