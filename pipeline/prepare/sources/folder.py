"""`folder`: a tree of picture files.

Folders named train, valid and test at the top, in any usual spelling, are splits, the source's own
(`splits.py`). The folders at the top (or in those) are the labels, numbered in the order of their
names.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.params import DataParams
from pipeline.prepare.sources.examples import Examples, data_root, slug, some
from pipeline.prepare.sources.images import (
    SUFFIXES,
    Header,
    PictureError,
    decode_picture,
    read_header,
)
from pipeline.prepare.sources.splits import split_names, split_of
from pipeline.stage import UserError, say

# From so many files on, starting Ray costs less than it saves.
RAY_FILES = 50_000
BATCH_FILES = 256


def load(data: DataParams, scratch: Path) -> Examples:
    """Every picture under `data.root`, decoded into a file in `scratch`."""
    root = data_root(data)
    paths, others = find_pictures(root)
    if not paths:
        found = f"; it holds {_counted(others)}" if others else ""
        raise UserError(
            f"data.root: {root} holds no picture ({', '.join(SUFFIXES)}){found}; put pictures "
            "there, or name their folder in data.root"
        )
    files = [root / path for path in paths]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pillow's, of what is refused or mended here
        shape = common_shape(files, paths, data)
        x = decode_all(files, paths, shape, scratch)
    split, label, classes = places(paths, f"data.root: {root}")
    left_out = f"left out, being no pictures: {_counted(others)}"
    return Examples(
        dataset=slug(root.resolve().name),
        x=x,
        label=label,
        id=np.array(paths),
        split=split,
        classes=classes,
        notes=(left_out,) if others else (),
    )


def find_pictures(root: Path) -> tuple[list[str], Counter[str]]:
    """Paths below `root` of all files with a picture's suffix, sorted; the others' suffixes.

    Hidden files and folders are passed over, links are followed. Raises UserError for names that
    are not UTF-8, for links that lead back or nowhere, and for folders that can't be read.
    """
    if not root.is_dir():
        raise UserError(f"data.root: {root} is a file; data.source folder reads a folder")
    found: list[str] = []
    others: Counter[str] = Counter()
    _walk(root, "", (), found, others)
    return sorted(found), others


def _walk(
    folder: Path,
    below: str,
    above: tuple[tuple[int, int], ...],
    found: list[str],
    others: Counter[str],
) -> None:
    try:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:
            raise UserError(f"data.root: {folder} is a link that leads back to a folder above it")
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                _check_name(folder, entry.name)
                path = f"{below}{entry.name}"
                if entry.is_dir():
                    _walk(folder / entry.name, f"{path}/", (*above, here), found, others)
                elif Path(entry.name).suffix.lower() in SUFFIXES:
                    if not entry.is_file():
                        raise UserError(
                            f"data.root: {folder / entry.name} is no file (a link to nowhere, or a "
                            "device); remove it"
                        )
                    found.append(path)
                else:
                    others[Path(entry.name).suffix or entry.name] += 1
    except OSError as error:
        raise UserError(
            f"data.root: {error.filename or folder} cannot be read: {error.strerror}"
        ) from None


def _check_name(folder: Path, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"data.root: the name {os.fsencode(name)!r} in {str(folder)!r} is not UTF-8; rename it"
        ) from None


def places(
    paths: Sequence[str], where: str
) -> tuple[np.ndarray | None, np.ndarray, tuple[str, ...] | None]:
    """Splits (N,), labels (N,) and their names, from the folders that the paths lie in.

    Splits lie at the top, or within one folder that holds all, or within each label's folder.
    Raises UserError, beginning with `where`, where it is in doubt what is of which split.
    """
    parts = [path.split("/")[:-1] for path in paths]
    names = [path.split("/") for path in paths]
    split, above = None, 0
    for depth in (0, 1):
        if any(len(part) <= depth for part in parts) and not any(
            len(part) > depth and split_of(part[depth]) for part in parts
        ):
            break
        found = split_names({name[depth] if len(name) > depth else "" for name in names}, where)
        if found is not None:
            split, above = np.array([found[part[depth]] for part in parts]), depth
            break
    if split is not None:
        one = len({tuple(part[:above]) for part in parts}) == 1
        parts = [part[above + 1 :] if one else part[:above] for part in parts]
    names = sorted({part[0] for part in parts if part})
    number = {name: index for index, name in enumerate(names)}
    label = np.array([number[part[0]] if part else -1 for part in parts], np.int64)
    return split, label, tuple(names) or None


def common_shape(files: Sequence[Path], names: Sequence[str], data: DataParams) -> Header:
    """What every picture becomes: `data.channels` and `data.size`, or what they all are.

    Where colour and grey are mixed, all become RGB. Raises UserError for mixed sizes.
    """
    if data.channels is not None and data.image_size is not None:
        return Header(data.channels, *data.image_size)
    faults: dict[str, str] = {}
    headers: list[Header] = []
    for batch in run_in_parallel(_read_headers, files):
        for header in batch:
            if isinstance(header, str):
                faults[names[len(headers) + len(faults)]] = header
            else:
                headers.append(Header(*header))  # Ray Data makes lists of tuples
    _refuse(faults, len(files))
    channels = data.channels or max(header.channels for header in headers)
    if data.image_size is not None:
        return Header(channels, *data.image_size)
    sizes = Counter((header.height, header.width) for header in headers)
    if len(sizes) > 1:
        by_size = {tuple(header[1:]): name for header, name in zip(headers, names, strict=True)}
        seen = [f"{h} by {w} ({by_size[h, w]})" for (h, w), _ in sizes.most_common()]
        raise UserError(
            f"data.root: the pictures have {len(sizes)} sizes, height by width: {some(seen)}; "
            "data.size: [height, width] scales and crops them to one"
        )
    ((height, width),) = sizes
    return Header(channels, height, width)


def decode_all(
    files: Sequence[Path], names: Sequence[str], shape: Header, scratch: Path
) -> np.ndarray:
    """Every file as (N, C, H, W) uint8 in an unnamed file, so that memory does not grow with N."""
    x = unnamed_array((len(files), *shape), scratch)
    faults: dict[str, str] = {}
    done = 0
    for batch in run_in_parallel(_Decode(shape), files):
        for picture in batch:
            if isinstance(picture, str):
                faults[names[done]] = picture
            else:
                x[done] = picture
            done += 1
    _refuse(faults, len(files))
    return x


def unnamed_array(shape: tuple[int, ...], folder: Path) -> np.ndarray:
    """uint8 zeros in a file that vanishes with the process, however that ends.

    Raises OSError at once where the disk has no room for it; a memory map would die by a signal.
    """
    size = int(np.prod(shape, dtype=np.int64))
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, np.uint8, mode="r+", shape=shape)


def run_in_parallel(
    work: Callable[[Sequence[Path]], list[Any]], files: Sequence[Path]
) -> Iterator[list[Any]]:
    """`work` on batches of files, results in the files' order: by threads, or by Ray Data.

    Few batches are held at a time.
    """
    from pipeline.cluster import connect as cluster, unseen

    batches = [files[start : start + BATCH_FILES] for start in range(0, len(files), BATCH_FILES)]
    if len(files) >= RAY_FILES:
        with cluster.connect():
            if not unseen([files[0], files[-1]]):
                yield from _by_ray(work, batches)
                return
        say("prepare    by this machine alone, since not all nodes of the cluster see the pictures")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        width = 2 * (os.cpu_count() or 1)
        for start in range(0, len(batches), width):
            yield from pool.map(work, batches[start : start + width])


def _by_ray(
    work: Callable[[Sequence[Path]], list[Any]], batches: Sequence[Sequence[Path]]
) -> Iterator[list[Any]]:
    import ray.data

    from pipeline.cluster import data_context

    data_context().execution_options.preserve_order = True
    rows = ray.data.from_items(
        [{"files": [str(file.resolve()) for file in batch]} for batch in batches]
    )
    for row in rows.map(_Work(work)).iter_rows():
        yield row["found"]


class _Work(NamedTuple):
    """`work` on a row of Ray Data."""

    work: Callable[[Sequence[Path]], list[Any]]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"found": self.work([Path(file) for file in row["files"]])}


def _read_headers(files: Sequence[Path]) -> list[Header | str]:
    return [_or_fault(read_header, file) for file in files]


class _Decode(NamedTuple):
    """Decode files to a shape; for a faulty one its fault."""

    shape: Header

    def __call__(self, files: Sequence[Path]) -> list[np.ndarray | str]:
        channels, *size = self.shape
        return [
            _or_fault(decode_picture, file, channels=channels, size=tuple(size)) for file in files
        ]


def _or_fault(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return function(*arguments, **options)
    except PictureError as error:
        return str(error)


def _refuse(faults: dict[str, str], total: int) -> None:
    if faults:
        lines = some((f"{name}: {fault}" for name, fault in faults.items()), 5)
        raise UserError(
            f"data.root: {len(faults)} of {total} pictures cannot be used: {lines}; mend or "
            "remove them"
        )


def _counted(others: Counter[str]) -> str:
    return some(f"{count} {suffix}" for suffix, count in sorted(others.items()))
