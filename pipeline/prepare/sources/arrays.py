"""`npz` and `npy`: images, or the rows of a table, as numpy wrote them; nothing is unpickled.

Images are (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels, whole numbers 0…255 or
floats in [0, 1]; tables are (N, columns). Names that are understood: x, images or data, or the
only array of a file; label, labels or y; id; group; and the same in parts, as x_train, y_train,
train_images, train_labels, with test, val or valid for train (`pipeline.prepare.sources.splits`).
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.params import DataParams
from pipeline.prepare.sources.examples import (
    Examples,
    check_room,
    data_root,
    encode_labels,
    is_whole,
    label_texts,
    slug,
)
from pipeline.prepare.sources.splits import SPLIT_ORDER, file_name, split_files, split_of
from pipeline.stage import UserError

VALUES = ("x", "images", "image", "data", "arr_0")
LABELS = ("label", "labels", "y")
SUFFIXES = (".npz", ".npy")
BATCH_ROWS = 4096


def load(data: DataParams, scratch: Path) -> Examples:
    """Every array file that `data.root` names or holds."""
    root = data_root(data)
    parts = []
    for split, path in split_files(root, SUFFIXES, "numpy file"):
        arrays = read_arrays(path)
        for own, part in _split_parts(arrays, path).items():
            if split is not None and own is not None and own != split:
                raise UserError(f"data.root: {path} is of the {split} split, and holds {own} data")
            parts.append((own or split, path, part))
    several = len({path for _, path, _ in parts}) > 1
    found = [
        examples_of(
            part,
            where=f"data.root: {path}",
            label=data.label,
            group=data.group,
            split=split,
            prefix="-".join(filter(None, (file_name(path, root) if several else None, split))),
        )
        for split, path, part in parts
    ]
    raw = [_labels_of(part, data.label) for _, _, part in parts]
    _check_label_kinds(raw, [path for _, path, _ in parts])
    return joined(found, raw, slug(root.resolve().stem))


def _labels_of(arrays: Mapping[str, np.ndarray], label: str | None) -> np.ndarray | None:
    """The labels as they are in a file, or None; `label` names the array."""
    name = label or next((name for name in LABELS if name in arrays), None)
    return None if name is None else arrays[name]


def _check_label_kinds(raw: list[np.ndarray | None], paths: list[Path]) -> None:
    """Raise UserError where some parts number their classes, and others name them."""
    kinds: dict[str, Path] = {}
    for values, path in zip(raw, paths, strict=True):
        present = [] if values is None else [t for t in label_texts(values).tolist() if t]
        if present:
            kinds.setdefault("numbers" if all(map(is_whole, present)) else "names", path)
    if len(kinds) > 1:
        raise UserError(
            f"data.root: labels are {' and '.join(f'{k} in {p}' for k, p in kinds.items())}; use "
            "one or the other"
        )


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz or .npy file by name ("x" in a .npy file); raises UserError.

    A .npy file is mapped, not read.
    """
    try:
        if path.suffix.lower() == ".npy":
            return {"x": np.load(path, mmap_mode="r", allow_pickle=False)}
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        check_room(path, unpacked, "save it as .npy, which is read page by page")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"data.root: {path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # zipfile and numpy raise whatever they stumble over
        if any(word in str(error) for word in ("allow_pickle", "pickled", "Python objects")):
            raise UserError(
                f"data.root: {path} holds pickled objects, which could run code and are not read; "
                "save arrays of numbers, such as np.savez(path, x=x)"
            ) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"data.root: {path} is no numpy file, or a damaged one: {reason}") from None


def iterate_arrays(path: Path, rows: int = BATCH_ROWS) -> Iterator[np.ndarray]:
    """The values of an array file in data units, `rows` at a time: images uint8, tables float64."""
    arrays = read_arrays(path)
    x = arrays[_values_name(arrays, path)]
    where = f"{path}"
    layout = image_layout(x.shape, where) if x.ndim > 2 else None
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        yield to_images(part, layout, where) if layout else to_table(part, where)


def examples_of(
    arrays: Mapping[str, np.ndarray],
    *,
    where: str,
    label: str | None = None,
    group: str | None = None,
    split: str | None = None,
    prefix: str = "",
) -> Examples:
    """Examples from arrays by name; raises UserError, beginning with `where`.

    label, group: names of those arrays (None: the usual ones, or none). split: of them all.
    prefix: of the ids, where the arrays bring none.
    """
    x = arrays[_values_name(arrays, where)]
    if x.ndim < 2 or x.size == 0:
        raise UserError(
            f"{where}: expected images (N, H, W), (N, H, W, C) or (N, C, H, W), or rows "
            f"(N, columns), N at least 1; found {x.shape}"
        )
    for name in filter(None, (label, group)):
        if name not in arrays:
            raise UserError(f"{where} holds no array {name!r}; it holds {', '.join(arrays)}")
    columns = None
    if x.ndim == 2:
        columns = tuple(f"x{index}" for index in range(x.shape[1]))
    labels = _labels_of(arrays, label)
    labels = np.full(len(x), -1) if labels is None else labels
    groups = None if group is None else arrays[group].astype(str)
    ids = arrays.get("id")
    ids = number_rows(len(x), prefix) if ids is None else ids.astype(str)
    for name, values in (("label", labels), ("group", groups), ("id", ids)):
        if values is not None and values.size != len(x):
            raise UserError(f"{where}: {len(x)} examples and {values.size} values of {name}")
    number, classes = encode_labels(labels)
    return Examples(
        dataset="data",
        x=to_table(x, where) if columns else to_images(x, image_layout(x.shape, where), where),
        label=number,
        id=ids.reshape(-1),
        split=None if split is None else np.full(len(x), split),
        group=None if groups is None else groups.reshape(-1),
        columns=columns,
        classes=classes or None,
    )


def joined(parts: list[Examples], labels: list[np.ndarray | None], dataset: str) -> Examples:
    """Several files or parts as one set; raises UserError where they don't fit together.

    labels: of each part as its file has them, so that classes are numbered once.
    """
    first = parts[0]
    for part in parts[1:]:
        if part.x.shape[1:] != first.x.shape[1:] or part.x.dtype != first.x.dtype:
            raise UserError(
                f"data.root: its parts differ: {first.x.dtype} of shape {first.x.shape[1:]} "
                f"({first.id[0]}) and {part.x.dtype} of {part.x.shape[1:]} ({part.id[0]})"
            )

    def column(name: str) -> np.ndarray | None:
        values = [getattr(part, name) for part in parts]
        return None if any(value is None for value in values) else np.concatenate(values)

    texts = [
        np.full(len(part.id), None) if values is None else label_texts(values)
        for part, values in zip(parts, labels, strict=True)
    ]
    label, classes = encode_labels(np.concatenate(texts))
    id = column("id")
    assert id is not None
    return Examples(
        dataset=dataset,
        x=first.x if len(parts) == 1 else np.concatenate([part.x for part in parts]),
        label=label,
        id=id,
        split=column("split"),
        group=column("group"),
        columns=first.columns,
        classes=classes or None,
    )


def image_layout(shape: tuple[int, ...], where: str) -> str:
    """ "NHW", "NHWC" or "NCHW"; raises UserError where the shape is none of them, or several."""
    if len(shape) == 3:
        return "NHW"
    if len(shape) == 4:
        last, first = shape[3] in (1, 3), shape[1] in (1, 3)
        if last != first:
            return "NHWC" if last else "NCHW"
        why = "either could be the channels" if last else "neither axis 1 nor axis 3 has 1 or 3"
        raise UserError(
            f"{where}: expected images (N, H, W, C) or (N, C, H, W) with 1 or 3 channels; found "
            f"{shape}, where {why}"
        )
    raise UserError(
        f"{where}: expected images (N, H, W), (N, H, W, C) or (N, C, H, W); found {shape}"
    )


def to_images(x: np.ndarray, layout: str, where: str) -> np.ndarray:
    """(N, C, H, W) uint8, by `grey_levels`."""
    x = grey_levels(x, where)
    if layout == "NHW":
        return x[:, None]
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if layout == "NHWC" else x


def grey_levels(x: np.ndarray, where: str, start: int = 0) -> np.ndarray:
    """uint8 from whole numbers 0…255, floats in [0, 1] by round(255 x), or true and false (255, 0).

    The type decides, so a part is read as the whole is. start: the number of the first row.
    Raises UserError for other values, beginning with `where`.
    """
    if x.dtype == np.bool_:
        return x.astype(np.uint8) * np.uint8(255)
    if x.dtype == np.uint8:
        return x
    kind = x.dtype.kind
    if kind not in "iuf":
        raise UserError(f"{where}: expected whole numbers 0…255 or floats; found {x.dtype}")
    top = 1 if kind == "f" else 255
    out = np.empty(x.shape, np.uint8)
    for place in range(0, len(x), BATCH_ROWS):
        part = np.asarray(x[place : place + BATCH_ROWS])
        _check_finite(part, start + place, where)
        if part.min() < 0 or part.max() > top:
            allowed = "floats in [0, 1] (or whole numbers of type uint8)" if top == 1 else "0…255"
            raise UserError(
                f"{where}: expected {allowed}; found values from {part.min():g} to {part.max():g}"
            )
        out[place : place + BATCH_ROWS] = np.rint(part * np.float64(255 / top))
    return out


def to_table(x: np.ndarray, where: str) -> np.ndarray:
    """(N, columns) float64; raises UserError for what is no finite number."""
    _check_real(x, where)
    values = np.asarray(x, np.float64)
    _check_finite(values, 0, where)
    return values


def _check_real(x: np.ndarray, where: str) -> None:
    if x.dtype.kind not in "iuf":
        raise UserError(f"{where}: expected numbers; found {x.dtype}")


def _check_finite(x: np.ndarray, start: int, where: str) -> None:
    if x.dtype.kind != "f":
        return
    bad = ~np.isfinite(x.reshape(len(x), -1)).all(1)
    if bad.any():
        row = start + int(bad.argmax())
        raise UserError(f"{where}: NaN or infinity in row {row} and {int(bad.sum()) - 1} more")


def number_rows(count: int, prefix: str = "") -> np.ndarray:
    """Ids of rows that bring none: their place in the file."""
    return np.array([f"{prefix}-{index:07d}".lstrip("-") for index in range(count)])


def _values_name(arrays: Mapping[str, np.ndarray], where: object) -> str:
    named = [name for name in VALUES if name in arrays]
    if named:
        return named[0]
    if len(arrays) == 1:
        return next(iter(arrays))
    raise UserError(
        f"{where}: expected an array named x; found {', '.join(arrays) or 'no array at all'}"
    )


def _split_parts(
    arrays: dict[str, np.ndarray], path: Path
) -> dict[str | None, dict[str, np.ndarray]]:
    """x_train, y_train, x_test … → {"train": {"x": …, "y": …}, "test": …}; else {None: arrays}."""
    parts: dict[str | None, dict[str, np.ndarray]] = {}
    for split, plain, name in part_names(arrays):
        part = parts.setdefault(split, {})
        if split is not None and plain in part:
            raise UserError(f"data.root: {path} holds two arrays of {split} {plain}, one is {name}")
        part[plain] = arrays[name]
    if not parts:
        return {None: {}}
    beside = parts.pop(None, {}) if len(parts) > 1 else {}
    known = [name for name in beside if name in VALUES]
    if known:
        raise UserError(
            f"data.root: {path} holds {known[0]} beside arrays of splits; is it data of one of "
            "them? Take it out, or into one"
        )
    return parts


def part_names(names: Iterable[str]) -> list[tuple[str | None, str, str]]:
    """(split, name without it, name) of each array: ("train", "x", "x_train"), in split order.

    The split is None for all unless some are training data by their name.
    """
    found: list[tuple[str | None, str, str]] = []
    for name in names:
        words = name.split("_")
        splits = {split for word in words if (split := split_of(word))}
        plain = "_".join(word for word in words if not split_of(word)).casefold()
        found.append((splits.pop() if len(splits) == 1 else None, plain or "x", name))
    if not {"train"} < {split for split, _, _ in found if split}:
        return [(None, name, name) for _, _, name in found]
    return sorted(found, key=lambda one: -1 if one[0] is None else SPLIT_ORDER.index(one[0]))


# --- a part at a time ----------------------------------------------------------------------------


@dataclass(frozen=True)
class ArrayFile:
    """The arrays of a .npz or .npy file, none of them read yet: their shapes by name."""

    path: Path
    where: str
    shapes: dict[str, tuple[int, ...]]  # of no dimension: a single value

    def parts(self) -> list[tuple[str | None, str]]:
        """The arrays of examples, as `load` takes them: each with its split, or None."""
        parts: dict[str | None, dict[str, str]] = {}
        for split, plain, name in part_names(self.shapes):
            parts.setdefault(split, {})[plain] = name
        chosen = []
        for split, names in parts.items():
            named = [names[name] for name in VALUES if name in names]
            if named or len(names) == 1:
                chosen.append((split, named[0] if named else next(iter(names.values()))))
        return chosen

    def rows(self, name: str, count: int) -> Iterator[np.ndarray]:
        """The examples of an array, `count` at a time."""
        if self.path.suffix.lower() == ".npy":
            x = np.load(self.path, mmap_mode="r", allow_pickle=False)
            yield from (x[start : start + count] for start in range(0, len(x), count))
            return
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
            shape, fortran, dtype = _header(file)
            if fortran and len(shape) > 1:
                raise UserError(
                    f"{self.where}: an array in Fortran order can't be read in parts; save it in "
                    "C order"
                )
            size = math.prod(shape[1:]) * dtype.itemsize
            total = shape[0] if shape else 0
            for start in range(0, total, count):
                rows = min(count, total - start)
                content = file.read(rows * size)
                yield np.frombuffer(content, dtype).reshape(rows, *shape[1:])

    def ids(self, split: str | None) -> list[str] | None:
        """The ids of a part, where the file has some."""
        for own, plain, name in part_names(self.shapes):
            if plain == "id" and own == split and self.path.suffix.lower() == ".npz":
                with np.load(self.path, allow_pickle=False) as file:
                    return file[name].astype(str).reshape(-1).tolist()
        return None


def open_arrays(path: Path, where: str) -> ArrayFile:
    """Look at an array file; raises UserError, beginning with `where`, where it is none."""
    try:
        if path.suffix.lower() == ".npy":
            shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
            return ArrayFile(path, where, {"x": shape})
        with zipfile.ZipFile(path) as archive:
            shapes = {}
            for name in archive.namelist():
                with archive.open(name) as file:
                    shapes[name.removesuffix(".npy")] = _header(file)[0]
        return ArrayFile(path, where, shapes)
    except Exception as error:  # zipfile and numpy raise whatever they stumble over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where} is no numpy file, or a damaged one: {reason}") from None


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    first = np.lib.format.read_array_header_1_0
    return (first if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)


def as_read(x: np.ndarray, space: str, where: str, start: int = 0) -> np.ndarray:
    """Rows of an array as prepare reads them: grey levels, or float64 in `continuous`, where NaN
    and infinity are left for the model to refuse. start: the number of the first row."""
    if space == "continuous":
        _check_real(x, where)
        return np.asarray(x, np.float64)
    return grey_levels(x, where, start)
