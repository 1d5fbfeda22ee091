"""`table`: CSV or Parquet, one example a row, real numbers in named columns.

`data.columns` chooses columns, else every column is taken and has to be numeric. `data.id`,
`data.label` and `data.group` name columns that are no data. A missing value is NaN here: prepare
refuses or fills it. Several files in one folder are one table. Row numbers are no data: an index
that pandas wrote, or a column that counts the rows, is left out unless a key names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from pipeline.params import DataParams
from pipeline.prepare.sources.arrays import number_rows
from pipeline.prepare.sources.columns import (
    LARGEST,
    alike,
    numbers,
    numbers_of_text,
    role_kind,
    texts,
)
from pipeline.prepare.sources.examples import Examples, data_root, encode_labels, slug, some
from pipeline.prepare.sources.splits import file_name, split_files
from pipeline.prepare.sources.table_files import (
    BATCH_ROWS,
    SUFFIXES,
    TableFile,
    batches,
    is_parquet,
    open_table,
)
from pipeline.stage import UserError


@dataclass
class _Column:
    """What is known of a column as its batches go by."""

    name: str
    parts: list[np.ndarray] = field(default_factory=list)
    wrong: int = 0
    example: str = ""  # the first value that is no number, and its row
    row: int = 0

    def add(self, values: np.ndarray, bad: np.ndarray, column: pa.Array, start: int) -> None:
        if not self.wrong and bad.any():
            place = int(bad.argmax())
            self.example, self.row = repr(column[place].as_py()), start + place
        self.wrong += int(bad.sum())
        self.parts.append(values)

    @property
    def values(self) -> np.ndarray:
        return np.concatenate(self.parts) if self.parts else np.empty(0)

    @property
    def is_text(self) -> bool:
        """Whether half of its values or more are no numbers."""
        return self.wrong > 0 and 2 * self.wrong >= len(self.values)


@dataclass
class _Role:
    """A column that is no data: `data.id`, `data.label` or `data.group`. name: None where unset."""

    key: str
    name: str | None
    parts: list[np.ndarray] = field(default_factory=list)
    kinds: dict[TableFile, tuple[str, bool]] = field(default_factory=dict)

    def add(self, batch: pa.RecordBatch, file: TableFile) -> None:
        if self.name is None:
            return
        column = batch.column(self.name)
        try:
            found = texts(column)
        except UserError as error:
            raise UserError(
                f"data.{self.key}: column {self.name!r} of {file.path} {error}"
            ) from None
        kind, whole = role_kind(column, found)
        self.kinds[file] = kind, whole and self.kinds.get(file, ("", True))[1]
        self.parts.append(found)

    def texts(self) -> np.ndarray:
        """The text of all rows, (N,), None where one is missing.

        Raises UserError where files hold it in types whose texts may differ for one value: what is
        7 in one may be 007 in another.
        """
        (first, (kind, whole)), *others = self.kinds.items()
        for file, (other, other_whole) in others:
            if other != kind and not (whole and other_whole):
                raise UserError(
                    f"data.{self.key}: column {self.name!r} holds {kind} in {first.path} and "
                    f"{other} in {file.path}; save it as text everywhere"
                )
        return np.concatenate(self.parts)

    def complete(self) -> np.ndarray | None:
        """The text of all rows, of which none may lack one; None where no column has it."""
        if self.name is None:
            return None
        found = self.texts()
        empty = sum(text is None for text in found.tolist())
        if empty:
            raise UserError(f"data.{self.key}: {empty} rows have no value in column {self.name!r}")
        return found.astype(str)


def load(data: DataParams, scratch: Path) -> Examples:
    """The table that `data.root` names or holds."""
    root = data_root(data)
    placed = split_files(root, SUFFIXES, "CSV or Parquet table")
    files = _same_columns([open_table(path, f"data.root: {path}") for _, path in placed])
    columns = {name: _Column(name) for name in _candidates(files[0], data)}
    roles = {key: _Role(key, getattr(data, key)) for key in ("id", "label", "group")}
    counts: list[int] = []
    for file in files:
        counts.append(_read(file, columns, roles, sum(counts)))
    if not sum(counts):
        raise UserError(f"data.root: {some(file.path for file in files)}: no row; expected at "
                        "least 10")  # fmt: skip
    kept, notes = _without_row_numbers(columns, files[0], counts, data)
    _check_numeric(kept, data, files)
    where = f"data.root: {root}"
    label, classes = np.full(sum(counts), -1), None
    if roles["label"].name is not None:
        label, classes = encode_labels(roles["label"].texts())
    group = roles["group"].complete()
    if group is not None and (pair := alike(sorted(set(group.tolist())))):
        raise UserError(
            f"data.group: column {data.group!r} holds {pair[0]!r} and {pair[1]!r}, which may be "
            "one group written in two ways; write them alike"
        )
    ids = roles["id"].complete()
    if ids is None:
        ids = _numbered(files, counts, root)
    else:
        _check_unique(ids, str(data.id))
    return Examples(
        dataset=slug(root.resolve().stem),
        x=_values(kept, where),
        label=label,
        id=ids,
        split=_splits([split for split, _ in placed], counts),
        group=group,
        columns=tuple(column.name for column in kept),
        classes=classes or None,
        notes=notes,
    )


def _read(file: TableFile, columns: dict[str, _Column], roles: dict[str, _Role], start: int) -> int:
    """Add a file's rows, whose first is number `start`; returns how many they are."""
    count = 0
    for batch in batches(file, f"data.root: {file.path}"):
        for name, known in columns.items():
            column = batch.column(name)
            known.add(*_numbers(column, file), column, start + count)
        for role in roles.values():
            role.add(batch, file)
        count += len(batch)
    return count


def _numbered(files: list[TableFile], counts: list[int], root: Path) -> np.ndarray:
    """Ids of rows that bring none: their place, after the file's name if there are several."""
    several = len(files) > 1
    return np.concatenate(
        [
            number_rows(count, file_name(file.path, root) if several else "")
            for count, file in zip(counts, files, strict=True)
        ]
    )


def _splits(splits: list[str | None], counts: list[int]) -> np.ndarray | None:
    if None in splits:
        return None
    return np.repeat(np.array(splits), counts)


def read_table(path: Path) -> pd.DataFrame:
    """A whole CSV or Parquet file: numbers where a column holds nothing else, else text.

    Raises UserError naming the file.
    """
    return pd.concat(list(iterate_tables(path)), ignore_index=True)


def iterate_tables(path: Path, rows: int = BATCH_ROWS) -> Iterator[pd.DataFrame]:
    """`read_table`, `rows` at a time; a column is numbers where all of the file's are."""
    where = f"data.root: {path}"
    file = open_table(path, where)
    text = {
        name
        for batch in batches(file, where)
        for name in file.names
        if _numbers(batch.column(name), file)[1].any()
    }
    for batch in batches(file, where, rows):
        yield pd.DataFrame(
            {
                name: texts(batch.column(name))
                if name in text
                else _numbers(batch.column(name), file)[0]
                for name in file.names
            }
        )


def table_values(
    batch: pa.RecordBatch, columns: Sequence[str], file: TableFile, where: str, start: int = 0
) -> np.ndarray:
    """The columns of some rows, (N, columns) float64, NaN where a value is missing, infinite ones
    and those beyond `LARGEST` as they are.

    Raises UserError, beginning with `where`, for a missing column and a value that is no number.
    start: the number of the first row.
    """
    missing = [name for name in columns if name not in file.names]
    if missing:
        raise UserError(
            f"{where}: column {some(map(repr, missing), 12)} is missing; it has "
            f"{some(map(repr, file.names), 12)}"
        )
    x = np.empty((len(batch), len(columns)))
    for place, name in enumerate(columns):
        column = _Column(name)
        column.add(*_numbers(batch.column(name), file), batch.column(name), start)
        if column.wrong:
            raise UserError(f"{where}: {_stray(column)}")
        x[:, place] = column.values
    return x


def row_number_columns(file: TableFile, where: str) -> frozenset[str]:
    """The columns of one file that only number its rows, which are no data."""
    columns = {name: _Column(name) for name in file.names}
    start = 0
    for batch in batches(file, where):
        for name, column in columns.items():
            values = batch.column(name)
            column.add(*_numbers(values, file), values, start)
        start += len(batch)
    return frozenset(name for name, c in columns.items() if _counts_rows(c, [start]))


def _numbers(column: pa.Array, file: TableFile) -> tuple[np.ndarray, np.ndarray]:
    return numbers(column) if is_parquet(file.path) else numbers_of_text(column)


def _same_columns(files: list[TableFile]) -> list[TableFile]:
    first = files[0]
    known = set(first.names) - first.nameless - first.index
    for file in files[1:]:
        odd = sorted(known ^ (set(file.names) - file.nameless - file.index))
        if odd:
            raise UserError(
                f"data.root: {file.path} and {first.path} have different columns: only one of "
                f"them has {some(map(repr, odd))}"
            )
    return files


def _candidates(file: TableFile, data: DataParams) -> list[str]:
    """The columns that may be data; raises UserError where a key names one that isn't there."""
    for key in ("id", "label", "group", "columns"):
        value = getattr(data, key)
        names = (value,) if isinstance(value, str) else value or ()
        unknown = [name for name in names if name not in file.names]
        if unknown:
            raise UserError(
                f"data.{key}: there is no column {some(map(repr, unknown))}; there are "
                f"{some(map(repr, file.names), 12)}"
            )
    if data.columns is not None:
        return list(data.columns)
    others = {data.id, data.label, data.group} | file.index
    return [name for name in file.names if name not in others]


def _without_row_numbers(
    columns: dict[str, _Column], file: TableFile, counts: list[int], data: DataParams
) -> tuple[list[_Column], tuple[str, ...]]:
    """The columns that are data, and what is said of those that only number the rows."""
    named = {data.id, data.label, data.group}
    left_out = sorted(file.index - named)
    if data.columns is not None:
        return list(columns.values()), ()
    kept = []
    for name, column in columns.items():
        if _counts_rows(column, counts):
            left_out.append(name)
        elif name in file.nameless:
            raise UserError(
                f"data.root: column {file.names.index(name) + 1} of {file.path} has no name; give "
                "it one, or list the columns to model in data.columns"
            )
        else:
            kept.append(column)
    if not left_out:
        return kept, ()
    return kept, (
        f"left out, since they number the rows: {some(map(repr, left_out), 8)}; data.columns "
        "takes them in",
    )


def _counts_rows(column: _Column, counts: list[int]) -> bool:
    """Whether a column is 0, 1, 2, … or 1, 2, 3, … through all rows, or through each file's."""
    values = column.values
    if column.wrong or len(values) < 2:
        return False
    ways = (counts, [len(values)])
    return any(
        np.array_equal(values, np.concatenate([np.arange(n) for n in way]) + first)
        for way in ways
        for first in (0, 1)
    )


def _check_numeric(columns: list[_Column], data: DataParams, files: list[TableFile]) -> None:
    text = [column for column in columns if column.is_text]
    if text and data.columns is None:
        numeric = [column.name for column in columns if not column.wrong]
        raise UserError(
            f"data.columns: columns {some((repr(c.name) for c in text), 12)} are not numbers, and "
            "categories have no density; name the columns to model, such as data.columns: "
            f"[{', '.join(numeric[:4])}{', …' if len(numeric) > 4 else ''}], or one of the others "
            "in data.label, data.group or data.id"
        )
    for column in columns:
        if column.wrong:
            raise UserError(f"data.root: {some(file.path for file in files)}: {_stray(column)}")
    if not columns:
        raise UserError("data.columns: no column is left to model")


def _stray(column: _Column) -> str:
    if column.is_text:
        return f"column {column.name!r} holds text, such as {column.example:.40}, not numbers"
    return (
        f"column {column.name!r} holds {column.example:.60} in row {column.row}, which is no "
        f"number, and {column.wrong - 1} more like it; mend them, or leave them empty "
        "(data.missing)"
    )


def _values(columns: list[_Column], where: str) -> np.ndarray:
    x = np.stack([column.values for column in columns], 1)
    beyond = np.abs(x) > LARGEST
    if beyond.any():
        row, place = np.argwhere(beyond)[0]
        raise UserError(
            f"{where}: column {columns[place].name!r} is {x[row, place]:g} in row {row}, and "
            f"{int(beyond.sum()) - 1} more values are infinite or beyond {LARGEST:g}; mend or "
            "leave them empty (data.missing)"
        )
    return x


def _check_unique(ids: np.ndarray, name: str) -> None:
    again = ids[pd.Series(ids).duplicated().to_numpy()]
    if len(again):
        raise UserError(
            f"data.id: column {name!r} has {str(again[0])!r} more than once, and {len(again) - 1} "
            "more such rows; every row needs a name of its own"
        )
