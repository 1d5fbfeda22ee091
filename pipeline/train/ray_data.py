"""Parquet files → Ray Data → the workers of Ray Train, every row to one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray.data
from ray.train import DataConfig

from pipeline.cluster import data_context


def read_shuffled(
    paths: list[Path], *, column: str, block_bytes: int, readers: int, seed: int
) -> Any:
    """A ray.data.Dataset of one column, its files in another order at each pass.

    block_bytes: about so much is read and handed to a worker at a time. readers: files that are
    decoded at a time, at most.
    """
    context = data_context()
    context.target_max_block_size = block_bytes
    context.use_datasource_v2 = False  # its listing of files waits for a CPU of its own
    return ray.data.read_parquet(
        [str(path) for path in paths],
        columns=[column],
        shuffle=ray.data.FileShuffleConfig(seed=seed),
        # The workers have taken the CPUs; readers that waited for one would wait for ever.
        num_cpus=0,
        concurrency=readers,
    )


class EveryRow(DataConfig):
    """Splits a dataset without dropping the rows that would make the shares unequal."""

    def configure(
        self,
        datasets: dict[str, Any],
        world_size: int,
        worker_handles: list[Any] | None,
        worker_node_ids: list[Any] | None,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """One iterator for each dataset and worker."""
        shares: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            dataset = dataset.copy(dataset)
            dataset.context.execution_options = self._resolve_execution_options(name)
            splits = dataset.streaming_split(world_size, equal=False, locality_hints=None)
            for share, split in zip(shares, splits, strict=True):
                share[name] = split
        return shares
