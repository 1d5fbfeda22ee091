"""data/prepared: Parquet shards of each split, and meta.json; written by prepare, read by all.

A shard's columns: `x`, a fixed-shape tensor as the data space says; `label`, an integer, -1 where
there is none; `id`, text that names the example in its source. Shapes: N examples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.stage import UserError, read_json, write_json

SPLITS = ("train", "valid", "test")
ROWS_PER_SHARD = 8192
META_FILE = "meta.json"


@dataclass(frozen=True, kw_only=True)
class Split:
    """Examples in the order of their content's hash.

    x: (N, *data_shape), uint8 for `binary` and `grey8`, float64 for `continuous`; 0/1 for
    `binary`, but grey levels 0…255 in the training split of dynamic binarisation.
    label: (N,) int64, -1 where there is none. id: (N,) text, the same whatever else is added.
    """

    x: np.ndarray
    label: np.ndarray
    id: np.ndarray

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What data/prepared holds; `hash` changes with any example, id, label, shape or space."""

    dataset: str  # short name, as in the registered model's
    source: str  # data.source
    space: str
    binarization: str | None  # None outside `binary`
    data_shape: tuple[int, ...]
    counts: dict[str, int]  # examples in each split
    duplicates: dict[
        str, int
    ]  # examples beyond the first of equal content, in all and across splits
    own_test_split: bool  # the source's, rather than by content hash
    num_classes: int | None  # None: no labels
    hash: str

    @property
    def num_values(self) -> int:
        """D, the number of data dimensions."""
        return math.prod(self.data_shape)


def load_meta(folder: str | Path) -> Meta:
    """Read meta.json; raises UserError when it is missing or of another version."""
    path = Path(folder) / META_FILE
    content = read_json(path)
    known = {field.name for field in fields(Meta)}
    if not isinstance(content, dict) or set(content) != known:
        raise UserError(
            f"{path} is not what prepare writes; `dvc repro --force prepare` remakes it"
        )
    values: dict[str, Any] = content | {"data_shape": tuple(content["data_shape"])}
    return Meta(**values)


def load_split(folder: str | Path, split: str) -> Split:
    """Read one of `train`, `valid`, `test`; one copy at most between the file and numpy.

    Raises UserError naming a shard that is missing, damaged, or not of meta.json's shape.
    """
    shape = load_meta(folder).data_shape
    paths = sorted((Path(folder) / split).glob("*.parquet"))
    if not paths:
        raise UserError(f"{Path(folder) / split} holds no Parquet file; `dvc repro` makes it")
    parts = [_read_shard(path, shape) for path in paths]
    if len(parts) == 1:
        return parts[0]
    return Split(
        x=np.concatenate([part.x for part in parts]),
        label=np.concatenate([part.label for part in parts]),
        id=np.concatenate([part.id for part in parts]),
    )


def _read_shard(path: Path, shape: tuple[int, ...]) -> Split:
    try:
        with pq.ParquetFile(path) as file:
            table = file.read().combine_chunks()
        column = table.column("x").chunk(0) if len(table) else None
        x = column.to_numpy_ndarray() if column is not None else np.empty((0, *shape), np.uint8)
        label, id = table.column("label").to_numpy(), table.column("id").to_pylist()
    except (pa.ArrowException, OSError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); `dvc checkout` restores it") from None
    if x.shape[1:] != shape:
        raise UserError(f"{path} holds examples of shape {x.shape[1:]}; meta.json says {shape}")
    return Split(x=x, label=label, id=np.array(id, dtype=str))


def write_prepared(folder: Path, splits: Mapping[str, Split], **facts: Any) -> Meta:
    """Write splits and meta.json into `folder`, which exists; `facts`: the other fields of Meta."""
    for name in SPLITS:
        for number, part in enumerate(_shards(splits[name])):
            path = folder / name / f"{number:05d}.parquet"
            path.parent.mkdir(exist_ok=True)
            pq.write_table(_table(part), path, compression="zstd", use_dictionary=False)
    meta = Meta(
        data_shape=splits["train"].x.shape[1:],
        counts={name: len(splits[name]) for name in SPLITS},
        hash=content_hash(splits, facts["space"]),
        **facts,
    )
    write_json(folder / META_FILE, asdict(meta))
    return meta


def _shards(split: Split) -> Iterator[Split]:
    for start in range(0, max(len(split), 1), ROWS_PER_SHARD):
        rows = slice(start, start + ROWS_PER_SHARD)
        yield Split(x=split.x[rows], label=split.label[rows], id=split.id[rows])


def _table(split: Split) -> pa.Table:
    x = np.ascontiguousarray(split.x)
    return pa.table(
        {
            "x": pa.FixedShapeTensorArray.from_numpy_ndarray(x),
            "label": pa.array(split.label.astype(np.int64)),
            "id": pa.array(split.id.tolist(), pa.string()),
        }
    )


def content_hash(splits: Mapping[str, Split], space: str) -> str:
    """SHA-256 of space, shapes, values, labels and ids, whatever file they lie in."""
    digest = hashlib.sha256(space.encode())
    for name in SPLITS:
        split = splits[name]
        digest.update(f"{name}{split.x.dtype.str}{split.x.shape}".encode())
        digest.update(np.ascontiguousarray(split.x).data)
        digest.update(split.label.astype("<i8").tobytes())
        digest.update("\0".join(split.id.tolist()).encode())
    return digest.hexdigest()
