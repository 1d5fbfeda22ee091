"""data/prepared: Parquet shards of each split, and meta.json; written by prepare, read by all.

A shard's columns: `x`, a fixed-shape tensor as the data space says; `label`, an integer, -1 where
there is none; `id`, text that names the example in its source; `content`, a hash of what the source
holds. Shapes: N examples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.stage.faults import UserError
from pipeline.stage.files import read_json, write_json
from vae.system import listed

SPLITS = ("train", "valid", "test")
META_FILE = "meta.json"
MEGABYTE = 2**20
# Of a shard, at most; what reads one holds about ten times its bytes while it is decoded.
ROWS_PER_SHARD, SHARD_BYTES = 8192, 16 * MEGABYTE


@dataclass(frozen=True, kw_only=True)
class Split:
    """Examples in the order of their content's hash.

    x: (N, *data_shape), uint8 for `binary` and `grey8`, float64 for `continuous`; 0/1 for
    `binary`, but grey levels 0…255 in the training split of dynamic binarisation.
    label: (N,) int64, -1 where there is none. id: (N,) text, the same whatever else is added.
    content: (N,) uint64, a hash of the example before it is binarised or filled, so that it is
    known again under another seed, split or id.
    """

    x: np.ndarray
    label: np.ndarray
    id: np.ndarray
    content: np.ndarray

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
    # examples beyond the first of equal content: in "all", and "across_splits"
    duplicates: dict[str, int]
    own_test_split: bool  # the source's, rather than by content hash
    num_classes: int | None  # None: no labels
    hash: str
    columns: tuple[str, ...] | None = None  # names of a table's values
    classes: tuple[str, ...] | None = None  # names of the labels 0, 1, …
    filled: dict[str, float] | None = None  # column → what stands for its missing values
    repeated_columns: tuple[str, ...] = ()  # with more than 5% repeated values

    @property
    def num_values(self) -> int:
        """D, the number of data dimensions."""
        return math.prod(self.data_shape)

    @property
    def value_bytes(self) -> int:
        """Bytes of a data value: uint8, or float64 in `continuous`."""
        return 8 if self.space == "continuous" else 1

    @property
    def grey_binarized(self) -> bool:
        """Whether the training split holds grey levels that each visit binarises anew."""
        return self.space == "binary" and self.binarization == "dynamic"


def load_meta(folder: str | Path) -> Meta:
    """Read meta.json; raises UserError when it is missing or of another version."""
    path = Path(folder) / META_FILE
    content = read_json(path)
    known = {field.name for field in fields(Meta)}
    if not isinstance(content, dict) or set(content) != known:
        raise UserError(
            f"{path} is not what prepare writes; `dvc repro --force prepare` remakes it"
        )
    lists: dict[str, Any] = {k: tuple(v) for k, v in content.items() if isinstance(v, list)}
    values: dict[str, Any] = content | lists
    return Meta(**values)


def load_split(folder: str | Path, split: str) -> Split:
    """Read one of `train`, `valid`, `test`; one copy at most between the file and numpy.

    Raises UserError naming a shard that is missing, damaged, or not of meta.json's shape.
    """
    meta = load_meta(folder)
    parts = [read_shard(path, meta) for path in shard_paths(folder, split)]
    found = sum(map(len, parts))
    if found != meta.counts[split]:
        raise UserError(
            f"{Path(folder) / split} holds {found} examples; meta.json says {meta.counts[split]}; "
            "`dvc checkout` restores it"
        )
    if len(parts) == 1:
        return parts[0]
    return Split(
        x=np.concatenate([part.x for part in parts]),
        label=np.concatenate([part.label for part in parts]),
        id=np.concatenate([part.id for part in parts]),
        content=np.concatenate([part.content for part in parts]),
    )


def shard_paths(folder: str | Path, split: str) -> list[Path]:
    """The Parquet files of a split, in order. Raises UserError when one is missing."""
    paths = listed(Path(folder) / split, "[0-9]*.parquet")
    if any(int(path.stem) != number for number, path in enumerate(paths)):
        raise UserError(
            f"{Path(folder) / split} lacks a file between {paths[0].name} and {paths[-1].name}; "
            "`dvc checkout` restores it"
        )
    if not paths:
        raise UserError(f"{Path(folder) / split} holds no Parquet file; `dvc repro` makes it")
    return paths


def training_mb(meta: Meta) -> float:
    """Size of the training array in memory, MB (2^20 bytes)."""
    return meta.counts["train"] * meta.num_values * meta.value_bytes / MEGABYTE


def read_shard(path: Path, meta: Meta) -> Split:
    """Read one file. Raises UserError when it is damaged or not of meta.json's shape."""
    shape = meta.data_shape
    try:
        with pq.ParquetFile(path) as file:
            table = file.read().combine_chunks()
        column = table.column("x").chunk(0) if len(table) else None
        x = column.to_numpy_ndarray() if column is not None else np.empty((0, *shape), np.uint8)
        label, id = table.column("label").to_numpy(), table.column("id").to_pylist()
        content = table.column("content").to_numpy()
    except (pa.ArrowException, OSError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); `dvc checkout` restores it") from None
    if x.shape[1:] != shape:
        raise UserError(f"{path} holds examples of shape {x.shape[1:]}; meta.json says {shape}")
    return Split(x=x, label=label, id=np.array(id, dtype=str), content=content)


def write_prepared(folder: Path, splits: Mapping[str, Split], **facts: Any) -> Meta:
    """Write splits and meta.json into `folder`, which exists; `facts`: the other fields of Meta."""
    return write_shards(folder, {name: shards(splits[name]) for name in SPLITS}, **facts)


def write_shards(folder: Path, splits: Mapping[str, Iterable[Split]], **facts: Any) -> Meta:
    """`write_prepared` from the shards of each split, one of which is in memory at a time."""
    digest = ContentHash(facts["space"])
    counts: dict[str, int] = dict.fromkeys(SPLITS, 0)
    shape: tuple[int, ...] = ()
    for name in SPLITS:
        for number, part in enumerate(splits[name]):
            path = folder / name / f"{number:05d}.parquet"
            path.parent.mkdir(exist_ok=True)
            pq.write_table(_table(part), path, compression="zstd", use_dictionary=False)
            digest.update(name, part)
            counts[name] += len(part)
            shape = part.x.shape[1:]
    meta = Meta(data_shape=shape, counts=counts, hash=digest.hexdigest(), **facts)
    write_json(folder / META_FILE, asdict(meta))
    return meta


def shards(split: Split) -> Iterator[Split]:
    """A split in the parts that become files; at least one."""
    for rows in shard_rows(len(split), split.x[:1].nbytes):
        yield Split(
            x=split.x[rows],
            label=split.label[rows],
            id=split.id[rows],
            content=split.content[rows],
        )


def shard_rows(count: int, example_bytes: int) -> Iterator[slice]:
    """The rows of each shard of a split of `count` examples of so many bytes."""
    most = min(ROWS_PER_SHARD, max(1, SHARD_BYTES // max(1, example_bytes)))
    for start in range(0, max(count, 1), most):
        yield slice(start, min(start + most, count))


def _table(split: Split) -> pa.Table:
    x = np.ascontiguousarray(split.x)
    return pa.table(
        {
            "x": pa.FixedShapeTensorArray.from_numpy_ndarray(x),
            "label": pa.array(split.label.astype(np.int64)),
            "id": pa.array(split.id.tolist(), pa.string()),
            "content": pa.array(split.content, pa.uint64()),
        }
    )


class ContentHash:
    """SHA-256 of space, shapes, values, labels and ids, whatever files they lie in."""

    def __init__(self, space: str) -> None:
        self._space = space
        self._parts: dict[str, Any] = {}

    def update(self, split: str, part: Split) -> None:
        """Add examples to a split."""
        shape = f"{part.x.dtype.str}{part.x.shape[1:]}"
        ids = "".join(f"{id}\0" for id in part.id.tolist())
        fields = {
            "x": np.ascontiguousarray(part.x).data,
            "label": part.label.astype("<i8").tobytes(),
            "id": ids.encode(),
        }
        for name, content in fields.items():
            self._parts.setdefault(f"{split} {shape} {name} ", hashlib.sha256()).update(content)

    def hexdigest(self) -> str:
        digest = hashlib.sha256(self._space.encode())
        for name, part in self._parts.items():
            digest.update(name.encode() + part.digest())
        return digest.hexdigest()


def content_hash(splits: Mapping[str, Split], space: str) -> str:
    """`ContentHash` of whole splits."""
    digest = ContentHash(space)
    for name in SPLITS:
        digest.update(name, splits[name])
    return digest.hexdigest()
