"""What every source gives, and what they share: the user's folder, names, fault lists."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.params import DataParams
from pipeline.stage import UserError, project_root

SHOWN = 3
LARGEST_CLASS = 10_000  # whole numbers from here on are names


@dataclass(frozen=True, kw_only=True)
class Examples:
    """N examples, the fields all in one order.

    dataset: a short name for the registered model. x: (N, *data_shape), uint8 (C, H, W) for
    images, float64 (columns,) for tables, where NaN is a missing value; it may lie in a file.
    label: (N,) int64, -1 where there is none. id: (N,) text, unique, and the same when others are
    added. split: (N,) of "train", "valid", "test", the source's own; None where it has none.
    group: (N,) text; examples of one group stay in one split. columns: names of a table's values.
    classes: names of the labels 0, 1, …. notes: lines for the person at the terminal.
    """

    dataset: str
    x: np.ndarray
    label: np.ndarray
    id: np.ndarray
    split: np.ndarray | None = None
    group: np.ndarray | None = None
    columns: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def data_root(data: DataParams) -> Path:
    """`data.root`, which must be there; raises UserError where it isn't."""
    try:
        path = resolve_root(data.root)
        if path.is_file() or path.is_dir():
            return path
        fault = "is neither a file nor a folder" if path.exists() else "does not exist"
    except (OSError, ValueError) as error:
        fault = f"is no path ({error})"
    raise UserError(
        f"data.root: {data.root!r:.80} {fault} (in {project_root()}); name the file or folder that "
        f"data.source {data.source} reads"
    )


def resolve_root(root: str) -> Path:
    """`data.root`; a relative one is the project's, also from DVC's temporary copy of it."""
    path = project_root() / root
    return path if path.exists() else Path(root)


def files_of(root: Path, suffixes: tuple[str, ...], what: str) -> list[Path]:
    """`root` itself, or the files with these suffixes in the folder `root`, sorted by name."""
    if not root.is_dir():
        return [root]
    found = sorted(
        path
        for path in root.iterdir()
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        raise UserError(
            f"data.root: {root} holds no {what} ({', '.join(suffixes)}); put one there, or name "
            "its file or folder in data.root"
        )
    return found


def check_room(path: Path, size: int, instead: str) -> None:
    """Raise UserError where a file unpacks to more bytes than half of this machine's memory."""
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if size > room:
        raise UserError(
            f"data.root: {path} unpacks to {size / 1e9:,.1f} GB, and half of this machine's memory "
            f"is {room / 1e9:,.1f} GB; {instead}"
        )


def slug(text: str) -> str:
    """A name that a registered model may have: lower case, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "data"


def some(items: Iterable[object], shown: int = SHOWN) -> str:
    """ "a, b, c and 5 more"."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - shown} more" if len(texts) > shown else ""
    return ", ".join(texts[:shown]) + more


def encode_labels(values: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Values of any kind → label (N,) int64, -1 for a missing one, and the names of the classes.

    Whole numbers from 0 on stay what they are, also as text. Missing are NaN, None, -1 and empty
    text; "NA" and "None" are names.
    """
    texts = label_texts(values)
    missing = np.array([text is None for text in texts.tolist()], bool)
    names = sorted(set(texts[~missing].tolist()))
    if all(map(is_whole, names)):
        whole = [int(name) for name in names]
        if min(whole, default=0) >= -1 and max(whole, default=0) < LARGEST_CLASS:
            label = np.full(len(texts), -1)
            label[~missing] = texts[~missing].astype(np.int64)
            return label, tuple(str(number) for number in range(max(whole, default=-1) + 1))
    number = {name: index for index, name in enumerate(names)}
    label = np.full(len(texts), -1)
    label[~missing] = [number[text] for text in texts[~missing].tolist()]
    return label, tuple(names)


def label_texts(values: np.ndarray) -> np.ndarray:
    """Labels as text, (N,) objects: whole numbers without a point; None for a missing one."""
    values = np.asarray(values).reshape(-1)
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8")

    def text(value: object) -> str | None:
        if value is None or value != value:
            return None
        if isinstance(value, float):
            return str(int(value)) if value == int(value) else repr(value)
        return str(value) or None

    return np.array([*map(text, values.tolist()), None], dtype=object)[:-1]


def is_whole(text: str) -> bool:
    """Whether a text is a whole number as Python writes it, "7" and not "007" or "7.0"."""
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and (digits[0] != "0" or text == "0")
