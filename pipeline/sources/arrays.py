"""`npz` and `npy`: images, or the rows of a table, as numpy wrote them; nothing is unpickled.

Images are (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels, whole numbers 0…255 or
floats in [0, 1]; tables are (N, columns). Names that are understood: x, images or data, or the
only array of a file; label, labels or y; id; group; and the same in parts, as x_train, y_train,
train_images, train_labels, with test, val or valid for train.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from pipeline.sections import DataParams
from pipeline.sources.examples import Examples, check_room, data_root, encode_labels, files_of, slug
from pipeline.stage import UserError

VALUES = ("x", "images", "image", "data", "arr_0")
LABELS = ("label", "labels", "y")
PARTS = {"train": "train", "test": "test", "val": "valid", "valid": "valid"}
BATCH_ROWS = 4096


def load(data: DataParams, scratch: Path) -> Examples:
    """Every array file that `data.root` names or holds."""
    root = data_root(data)
    parts = []
    for path in files_of(root, (".npz", ".npy"), "numpy file"):
        arrays = read_arrays(path)
        for split, part in _split_parts(arrays, path).items():
            parts.append((split, path, part))
    several = len({path for _, path, _ in parts}) > 1
    found = [
        examples_of(
            part,
            where=f"data.root: {path}",
            label=data.label,
            group=data.group,
            split=split,
            prefix="-".join(filter(None, (path.stem if several else None, split))),
        )
        for split, path, part in parts
    ]
    return joined(found, slug(root.resolve().stem))


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
    names = label or next((name for name in LABELS if name in arrays), None)
    labels = np.full(len(x), -1) if names is None else arrays[names]
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


def joined(parts: list[Examples], dataset: str) -> Examples:
    """Several files or parts as one set; raises UserError where they don't fit together."""
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

    label = column("label")
    id = column("id")
    assert label is not None
    assert id is not None
    classes = max((part.classes or () for part in parts), key=len)
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
    """(N, C, H, W) uint8 from whole numbers 0…255, or floats in [0, 1] by round(255 x)."""
    if x.dtype == np.bool_:
        x = x.astype(np.uint8) * np.uint8(255)
    if x.dtype != np.uint8:
        x = _to_bytes(x, where)
    if layout == "NHW":
        return x[:, None]
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if layout == "NHWC" else x


def _to_bytes(x: np.ndarray, where: str) -> np.ndarray:
    kind = x.dtype.kind
    if kind not in "iuf":
        raise UserError(f"{where}: expected whole numbers 0…255 or floats; found {x.dtype}")
    top = 1 if kind == "f" else 255
    out = np.empty(x.shape, np.uint8)
    for start in range(0, len(x), BATCH_ROWS):
        part = np.asarray(x[start : start + BATCH_ROWS])
        _check_finite(part, start, where)
        if part.min() < 0 or part.max() > top:
            allowed = "floats in [0, 1] (or whole numbers of type uint8)" if top == 1 else "0…255"
            raise UserError(
                f"{where}: expected {allowed}; found values from {part.min():g} to {part.max():g}"
            )
        out[start : start + BATCH_ROWS] = np.rint(part * np.float64(255 / top))
    return out


def to_table(x: np.ndarray, where: str) -> np.ndarray:
    """(N, columns) float64; raises UserError for what is no finite number."""
    if x.dtype.kind not in "iuf":
        raise UserError(f"{where}: expected numbers; found {x.dtype}")
    values = np.asarray(x, np.float64)
    _check_finite(values, 0, where)
    return values


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
    for name, values in arrays.items():
        words = name.split("_")
        split = next((PARTS[word] for word in words if word in PARTS), None)
        if split is not None:
            key = "_".join(word for word in words if word not in PARTS)
            parts.setdefault(split, {})[key] = values
    if not {"train", "test"} <= parts.keys():
        return {None: arrays}
    return {split: parts[split] for split in ("train", "valid", "test") if split in parts}
