"""New data for a registered model, read in chunks: a folder of images, npz, npy, csv or Parquet.

Files are read by the readers of `prepare`, so that a file means the same to both. Nothing is held
whole, so the data may be of any size. A chunk's name depends on its place alone, so that an
interrupted run knows what is done. Shapes: N examples of a chunk, D data values.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.prepare.sources.arrays import ArrayFile, as_read, open_arrays
from pipeline.prepare.sources.columns import texts
from pipeline.prepare.sources.images import SUFFIXES, PictureError, decode_picture
from pipeline.prepare.sources.table import row_number_columns, table_values
from pipeline.prepare.sources.table_files import (
    SUFFIXES as TABLES,
    TableFile,
    batches,
    is_parquet,
    open_table,
    told,
)
from pipeline.score.packed_model import PackedModel
from pipeline.stage import UserError

IMAGES = set(SUFFIXES)
ARRAYS = (".npz", ".npy")
FILES_IN_STREAM = 2048
CHUNK_DRAWS = 2**17  # examples times importance samples
CHUNK_VALUES = 2**22
SMALLEST_CHUNK, LARGEST_CHUNK = 16, 4096
ID, LABEL, TENSOR = "id", "label", "x"


@dataclass(frozen=True)
class Chunk:
    """Examples as the model's data space has them: x (N, *data_shape), id (N,) text."""

    name: str
    x: np.ndarray
    id: list[str]


@dataclass(frozen=True)
class Stream:
    """A part of the input that is read in one go; `read` is a function of this module."""

    number: int
    path: Path
    files: tuple[str, ...]
    prefix: str  # of row numbers as ids: tells several files apart
    read: Callable[[Stream, Layout, Collection[str]], Iterator[Chunk]]


@dataclass(frozen=True)
class Layout:
    """What the model takes, and how many examples make a chunk."""

    space: str
    data_shape: tuple[int, ...]
    columns: tuple[str, ...] | None
    rows: int
    filled: dict[str, float] | None = None  # what stands for a column's missing values
    converts: bool = False  # pictures to the model's size and channels, as its own were


@dataclass(frozen=True)
class Input:
    """The data at a path: its streams, its number of examples, and a hash of what they are."""

    streams: list[Stream]
    rows: int
    fingerprint: str
    layout: Layout


def open_input(path: Path, model: PackedModel, num_samples: int) -> Input:
    """Look at the data without reading it. Raises UserError where nothing can be read there."""
    if not path.exists():
        raise UserError(f"--data: {path} is not there")
    files = _files(path)
    values = math.prod(model.data_shape)
    rows = min(max(CHUNK_DRAWS // num_samples, SMALLEST_CHUNK), LARGEST_CHUNK)
    layout = Layout(
        space=model.space,
        data_shape=model.data_shape,
        columns=None if model.columns is None else tuple(model.columns),
        rows=max(1, min(rows, CHUNK_VALUES // values)),
        filled=model.filled,
        converts=model.converts and len(model.data_shape) == 3,
    )
    if files[0].suffix.lower() in IMAGES:
        names = [str(file.relative_to(path)) if path.is_dir() else file.name for file in files]
        root = path if path.is_dir() else path.parent
        parts = [names[i : i + FILES_IN_STREAM] for i in range(0, len(names), FILES_IN_STREAM)]
        streams = [Stream(i, root, tuple(part), "", read_images) for i, part in enumerate(parts)]
        total = len(names)
    else:
        several = len(files) > 1
        parts = [
            part
            for file in files
            for part in _file_streams(file, f"{file.name}:" if several else "", layout)
        ]
        streams = [replace(stream, number=i) for i, (stream, _) in enumerate(parts)]
        total = sum(count for _, count in parts)
    return Input(streams=streams, rows=total, fingerprint=_fingerprint(files), layout=layout)


def _files(path: Path) -> list[Path]:
    """The files of one kind that a path holds, in the order of their names; none is hidden."""
    known = (*ARRAYS, *TABLES)
    if path.is_file():
        if path.suffix.lower() not in (*known, *IMAGES):
            raise UserError(f"--data: {path} is no image, and none of {', '.join(known)}")
        return [path]
    found = [
        file
        for file in path.rglob("*")
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(path).parts)
    ]
    kinds = (IMAGES, ARRAYS, TABLES)
    present = [[file for file in found if file.suffix.lower() in kind] for kind in kinds]
    present = [files for files in present if files]
    if len(present) != 1:
        words = "files of several kinds" if present else "no image, npz, npy, csv or Parquet file"
        raise UserError(f"--data: the folder {path} holds {words}; expected one kind")
    return sorted(present[0])


def _file_streams(file: Path, prefix: str, layout: Layout) -> Iterator[tuple[Stream, int]]:
    """The streams of an array file or a table, each with its number of examples."""
    if file.suffix.lower() in TABLES:
        yield Stream(0, file, (), prefix, read_rows), _count_rows(file)
        return
    opened = open_arrays(file, str(file))
    for part, member in _members(opened, layout):
        before = f"{prefix}{part}-" if part else prefix
        yield Stream(0, file, (part or "", member), before, read_arrays), opened.shapes[member][0]


def _fingerprint(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        facts = file.stat()
        digest.update(json.dumps([str(file), facts.st_size, facts.st_mtime_ns]).encode())
    return digest.hexdigest()


def read_images(stream: Stream, layout: Layout, done: Collection[str]) -> Iterator[Chunk]:
    for start in range(0, len(stream.files), layout.rows):
        name = _chunk_name(stream, start // layout.rows)
        if name in done:
            continue
        files = stream.files[start : start + layout.rows]
        x = np.stack([_read_image(stream.path / file, layout) for file in files])
        yield Chunk(name, x, list(files))


def _read_image(path: Path, layout: Layout) -> np.ndarray:
    channels, size = None, None
    if layout.converts:
        channels, height, width = layout.data_shape
        size = (height, width)
    try:
        pixels = decode_picture(path, channels=channels, size=size)
    except PictureError as error:
        raise UserError(f"{path} cannot be read as an image ({error})") from None
    if pixels.shape != layout.data_shape:
        raise UserError(
            f"{path} has shape {pixels.shape} (channels, height, width); the model takes "
            f"{layout.data_shape}"
        )
    return _in_space(pixels, layout, path)


def _in_space(pixels: np.ndarray, layout: Layout, path: Path) -> np.ndarray:
    """Black-and-white pictures as 0 and 1 for a binary model; all else as it is."""
    if layout.space != "binary" or pixels.max() <= 1:
        return pixels
    if np.isin(pixels, (0, 255)).all():
        return pixels // 255
    raise UserError(f"{path} has grey levels; the model takes black and white (0/1 or 0/255) only")


def read_arrays(stream: Stream, layout: Layout, done: Collection[str]) -> Iterator[Chunk]:
    """Rows of an array, straight from the file."""
    part, member = stream.files
    with told(stream.path, str(stream.path)):
        opened = open_arrays(stream.path, str(stream.path))
        ids = opened.ids(part or None)
        start = 0
        for number, values in enumerate(opened.rows(member, layout.rows)):
            name, before, start = _chunk_name(stream, number), start, start + len(values)
            if name in done:
                continue
            x = as_read(values, layout.space, f"{stream.path}", before)
            if x.shape[1:] == _channels_last(layout) != layout.data_shape:
                x = np.moveaxis(x, -1, 1)
            if layout.space == "binary":
                x = np.stack([_in_space(pixels, layout, stream.path) for pixels in x])
            rows = range(before, start)
            known = [f"{stream.prefix}{row}" if ids is None else ids[row] for row in rows]
            yield Chunk(name, x, known)


def _members(opened: ArrayFile, layout: Layout) -> list[tuple[str | None, str]]:
    """The arrays that hold examples, with the split that each is of (None: the file has none)."""
    flat = (math.prod(layout.data_shape),)
    plain = tuple(size for size in layout.data_shape if size > 1)
    accepted = (layout.data_shape, _channels_last(layout), flat, plain)
    fits = {name for name, shape in opened.shapes.items() if shape[1:] in accepted}
    parts = [(part, name) for part, name in opened.parts() if name in fits]
    if not parts and len(fits) == 1:
        parts += [(None, fits.pop())]
    if not parts:
        found = ", ".join(f"{name} {shape}" for name, shape in opened.shapes.items())
        raise UserError(
            f"{opened.path}: expected one array of shape "
            f"(N, {', '.join(map(str, layout.data_shape))}), or one named {TENSOR}; found "
            f"{found or 'none'}"
        )
    return parts


def _channels_last(layout: Layout) -> tuple[int, ...]:
    return (*layout.data_shape[1:], *layout.data_shape[:1])


def read_rows(stream: Stream, layout: Layout, done: Collection[str]) -> Iterator[Chunk]:
    """Rows of a table by column names, or of a column `x` of tensors, as in data/prepared."""
    where = str(stream.path)
    file = open_table(stream.path, where)
    names = _columns_of(file, layout)
    start = 0
    for number, batch in enumerate(batches(file, where, layout.rows)):
        name, before, start = _chunk_name(stream, number), start, start + len(batch)
        if name in done:
            continue
        known = [f"{stream.prefix}{row}" for row in range(before, start)]
        if ID in file.names:
            given = texts(batch.column(ID)).tolist()
            known = [own or row for own, row in zip(given, known, strict=True)]
        if names is None:
            x = _tensors(batch.column(TENSOR), layout, where, before)
        else:
            x = _filled(table_values(batch, names, file, where, before), names, layout)
        yield Chunk(name, x, known)


def _columns_of(file: TableFile, layout: Layout) -> list[str] | None:
    """The columns that the model takes, or None for the column of tensors.

    Without names of its own, a model takes all but ids, labels and row numbers.
    """
    if is_parquet(file.path) and TENSOR in file.names:
        schema = pq.read_schema(file.path)
        if isinstance(schema.field(TENSOR).type, pa.FixedShapeTensorType):
            return None
    if layout.columns is not None:
        return list(layout.columns)
    others = {ID, LABEL, *file.index} | row_number_columns(file, str(file.path))
    names = [name for name in file.names if name not in others]
    if len(names) != math.prod(layout.data_shape):
        raise UserError(
            f"{file.path}: expected {math.prod(layout.data_shape)} columns; found {len(names)}"
        )
    return names


def _filled(x: np.ndarray, names: Sequence[str], layout: Layout) -> np.ndarray:
    """Missing values as the model's own data had them filled, or left as they are (NaN)."""
    for place, name in enumerate(names):
        if (value := (layout.filled or {}).get(name)) is not None:
            x[np.isnan(x[:, place]), place] = value
    return x


def _tensors(column: pa.Array, layout: Layout, where: str, start: int) -> np.ndarray:
    """A column of tensors as an array; a null, of a value or a row, is a missing value."""
    missing = np.zeros((len(column), math.prod(column.type.shape)), bool)
    storage = column.storage
    if storage.null_count:
        missing[storage.is_null().to_numpy(zero_copy_only=False)] = True
    for row in np.flatnonzero(~missing.any(1)) if storage.flatten().null_count else ():
        missing[row] = storage[int(row)].values.is_null().to_numpy(zero_copy_only=False)
    if not missing.any():
        return column.to_numpy_ndarray()
    if layout.space != "continuous":
        row = start + int(missing.any(1).argmax())
        raise UserError(f"{where}: values of {TENSOR} are missing in row {row}; pictures have none")
    x = np.full(missing.shape, np.nan)
    for row, gaps in enumerate(missing):
        if not gaps.all():
            x[row] = [np.nan if value is None else value for value in storage[row].as_py()]
    names = layout.columns or [str(place) for place in range(x.shape[1])]
    return _filled(x, names, layout).reshape(len(x), *column.type.shape)


def _chunk_name(stream: Stream, number: int) -> str:
    return f"{stream.number:06d}-{number:06d}"


def _count_rows(path: Path) -> int:
    """Rows of a table; of a CSV file its lines, at least as many: a quoted value may span some."""
    if is_parquet(path):
        with told(path, str(path)):
            return pq.read_metadata(path).num_rows
    with path.open("rb") as file:
        count, last = 0, b"\n"
        while part := file.read(2**24):
            count, last = count + part.count(b"\n"), part[-1:]
    return max(count + (last != b"\n") - 1, 0)
