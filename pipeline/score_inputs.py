"""New data for a registered model, read in chunks: a folder of images, npz, csv or Parquet.

Nothing is held whole, so the data may be of any size. A chunk's name depends on its place alone, so
that an interrupted run knows what is done. Shapes: N examples of a chunk, D data values.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.loading import PackedModel
from pipeline.sources.images import SUFFIXES, PictureError, decode_picture
from pipeline.stage import UserError

IMAGES = set(SUFFIXES)
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
        streams = [
            Stream(i, file, (), f"{file.name}:" if len(files) > 1 else "", _READERS[file.suffix])
            for i, file in enumerate(files)
        ]
        total = sum(_COUNTS[file.suffix](file) for file in files)
    return Input(streams=streams, rows=total, fingerprint=_fingerprint(files), layout=layout)


def _files(path: Path) -> list[Path]:
    """The files of one kind that a path holds, in the order of their names."""
    if path.is_file():
        if path.suffix not in _READERS and path.suffix.lower() not in IMAGES:
            raise UserError(f"--data: {path} is no image, and none of {', '.join(_READERS)}")
        return [path]
    found = [file for file in path.rglob("*") if file.is_file() and file.name[:1] != "."]
    kinds = [IMAGES, *({suffix} for suffix in _READERS)]
    present = [[file for file in found if file.suffix.lower() in kind] for kind in kinds]
    present = [files for files in present if files]
    if len(present) != 1:
        words = "files of several kinds" if present else "no image, npz, csv or Parquet file"
        raise UserError(f"--data: the folder {path} holds {words}; expected one kind")
    return sorted(present[0])


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


def read_npz(stream: Stream, layout: Layout, done: Collection[str]) -> Iterator[Chunk]:
    """Rows of the array `x`, or of the only one of the model's shape, straight from the file."""
    with zipfile.ZipFile(stream.path) as archive:
        member = _npz_member(archive, layout, stream.path)
        ids = _npz_ids(archive)
        with archive.open(member) as file:
            shape, dtype = _npy_header(file)
            size = math.prod(shape[1:]) * dtype.itemsize
            for number, start in enumerate(range(0, shape[0], layout.rows)):
                count = min(layout.rows, shape[0] - start)
                content = file.read(count * size)
                name = _chunk_name(stream, number)
                if name in done:
                    continue
                x = np.frombuffer(content, dtype).reshape(count, *shape[1:])
                if x.shape[1:] == _channels_last(layout) != layout.data_shape:
                    x = np.moveaxis(x, -1, 1)
                rows = range(start, start + count)
                known = [f"{stream.prefix}{row}" if ids is None else ids[row] for row in rows]
                yield Chunk(name, x, known)


def _npz_member(archive: zipfile.ZipFile, layout: Layout, path: Path) -> str:
    shapes = {}
    for name in archive.namelist():
        with archive.open(name) as file:
            shapes[name] = _npy_header(file)[0]
    flat = (math.prod(layout.data_shape),)
    plain = tuple(size for size in layout.data_shape if size > 1)
    accepted = (layout.data_shape, _channels_last(layout), flat, plain)
    fits = [name for name, shape in shapes.items() if shape[1:] in accepted]
    if f"{TENSOR}.npy" in fits:
        return f"{TENSOR}.npy"
    if len(fits) != 1:
        found = ", ".join(f"{Path(name).stem} {shape}" for name, shape in shapes.items())
        raise UserError(
            f"{path}: expected one array of shape (N, {', '.join(map(str, layout.data_shape))}), "
            f"or one named {TENSOR}; found {found or 'none'}"
        )
    return fits[0]


def _channels_last(layout: Layout) -> tuple[int, ...]:
    return (*layout.data_shape[1:], *layout.data_shape[:1])


def _npz_ids(archive: zipfile.ZipFile) -> list[str] | None:
    if f"{ID}.npy" not in archive.namelist():
        return None
    with archive.open(f"{ID}.npy") as file:
        return [str(value) for value in np.lib.format.read_array(file, allow_pickle=False)]


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
        version, np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read(file)
    if fortran and len(shape) > 1:
        raise UserError("npz: an array in Fortran order can't be read in parts; save it in C order")
    return shape, dtype


def read_csv(stream: Stream, layout: Layout, done: Collection[str]) -> Iterator[Chunk]:
    with pd.read_csv(stream.path, chunksize=layout.rows, skipinitialspace=True) as frames:
        yield from _from_frames(frames, stream, layout, done)


def read_parquet(stream: Stream, layout: Layout, done: Collection[str]) -> Iterator[Chunk]:
    """Rows by column names, or by a column `x` of tensors, as in data/prepared."""
    with pq.ParquetFile(stream.path) as file:
        tensors = TENSOR in file.schema_arrow.names and isinstance(
            file.schema_arrow.field(TENSOR).type, pa.FixedShapeTensorType
        )
        if not tensors:
            frames = (batch.to_pandas() for batch in _batches(file, layout.rows))
            yield from _from_frames(frames, stream, layout, done)
            return
        start = 0
        for number, batch in enumerate(_batches(file, layout.rows)):
            name, before, start = _chunk_name(stream, number), start, start + len(batch)
            if name in done:
                continue
            known = (
                batch.column(ID).to_pylist()
                if ID in batch.schema.names
                else [f"{stream.prefix}{row}" for row in range(before, start)]
            )
            x = batch.column(TENSOR).to_numpy_ndarray()
            yield Chunk(name, x, [str(value) for value in known])


def _batches(file: pq.ParquetFile, rows: int) -> Iterator[pa.RecordBatch]:
    """Batches of exactly `rows` rows, but for the last, wherever the row groups end."""
    held: list[pa.RecordBatch] = []
    count = 0
    for batch in file.iter_batches(batch_size=rows):
        while count + len(batch) >= rows:
            held.append(batch[: rows - count])
            batch, count = batch[rows - count :], 0
            yield _joined(held)
            held = []
        if len(batch):
            held.append(batch)
            count += len(batch)
    if held:
        yield _joined(held)


def _joined(parts: list[pa.RecordBatch]) -> pa.RecordBatch:
    table = pa.Table.from_batches(parts).combine_chunks()
    return table.to_batches()[0]


def _from_frames(
    frames: Iterator[pd.DataFrame] | Any, stream: Stream, layout: Layout, done: Collection[str]
) -> Iterator[Chunk]:
    start = 0
    for number, frame in enumerate(frames):
        name, before, start = _chunk_name(stream, number), start, start + len(frame)
        if name not in done:
            known = (
                frame[ID].astype(str).tolist()
                if ID in frame.columns
                else [f"{stream.prefix}{row}" for row in range(before, start)]
            )
            yield Chunk(name, _values(frame, layout, stream.path), known)


def _values(frame: pd.DataFrame, layout: Layout, path: Path) -> np.ndarray:
    """The model's columns, (N, D), float64; without names all but `id` and `label`."""
    names = list(layout.columns or [n for n in frame.columns if n not in (ID, LABEL)])
    missing = [name for name in names if name not in frame.columns]
    if missing or len(names) != math.prod(layout.data_shape):
        expected = ", ".join(layout.columns or ()) or f"{math.prod(layout.data_shape)} columns"
        raise UserError(
            f"{path}: expected {expected}; "
            + (f"missing: {', '.join(missing)}" if missing else f"found {len(names)}")
        )
    try:
        return frame[names].fillna(layout.filled or {}).to_numpy(np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: expected numbers ({error})") from None


def _chunk_name(stream: Stream, number: int) -> str:
    return f"{stream.number:06d}-{number:06d}"


def _count_lines(path: Path) -> int:
    """Lines after the header: at least the number of rows, since a quoted value may span some."""
    with path.open("rb") as file:
        count, last = 0, b"\n"
        while part := file.read(2**24):
            count, last = count + part.count(b"\n"), part[-1:]
    return max(count + (last != b"\n") - 1, 0)


def _count_npz(path: Path) -> int:
    with zipfile.ZipFile(path) as archive:
        counts = []
        for name in archive.namelist():
            with archive.open(name) as file:
                counts += _npy_header(file)[0][:1]
    return max(counts, default=0)


def _count_parquet(path: Path) -> int:
    try:
        return pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({error})") from None


_READERS: dict[str, Callable[[Stream, Layout, Collection[str]], Iterator[Chunk]]] = {
    ".npz": read_npz,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
_COUNTS: dict[str, Callable[[Path], int]] = {
    ".npz": _count_npz,
    ".csv": _count_lines,
    ".parquet": _count_parquet,
}
