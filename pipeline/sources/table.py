"""`table`: CSV or Parquet, one example a row, real numbers in named columns.

`data.columns` chooses columns, else every column is taken and has to be numeric. `data.id`,
`data.label` and `data.group` name columns that are no data. A missing value is NaN here: prepare
refuses or fills it. Several files in one folder are one table.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sections import DataParams
from pipeline.sources.arrays import number_rows
from pipeline.sources.examples import (
    Examples,
    check_room,
    data_root,
    encode_labels,
    files_of,
    slug,
    some,
)
from pipeline.stage import UserError

SUFFIXES = (".csv", ".parquet", ".pq")
BATCH_ROWS = 65_536
LARGEST = 1e30  # the model computes in single precision


def load(data: DataParams, scratch: Path) -> Examples:
    """The table that `data.root` names or holds."""
    root = data_root(data)
    paths = files_of(root, SUFFIXES, "CSV or Parquet table")
    frame, ids = _read_all(paths)
    columns = chosen_columns(frame, data)
    x = numeric_values(frame, columns, where=f"data.root: {root}")
    label, classes = np.full(len(frame), -1), None
    if data.label is not None:
        label, classes = encode_labels(_array(frame[data.label]))
    group: Any = None if data.group is None else frame[data.group]
    if group is not None and group.isna().any():
        raise UserError(
            f"data.group: {int(group.isna().sum())} rows have no value in column {data.group!r}"
        )
    if data.id is not None:
        ids = frame[data.id].astype(str).to_numpy(dtype=str)
        _check_ids(frame[data.id], ids, data.id)
    return Examples(
        dataset=slug(root.resolve().stem),
        x=x,
        label=label,
        id=ids,
        group=None if group is None else group.astype(str).to_numpy(dtype=str),
        columns=tuple(columns),
        classes=classes or None,
    )


def read_table(path: Path) -> pd.DataFrame:
    """A whole CSV or Parquet file; raises UserError naming it, and the row where it can."""
    return pd.concat(list(iterate_tables(path)), ignore_index=True)


def iterate_tables(path: Path, rows: int = BATCH_ROWS) -> Iterator[pd.DataFrame]:
    """The rows of a CSV or Parquet file, `rows` at a time, at least one frame."""
    reader = _iterate_parquet if path.suffix.lower() in (".parquet", ".pq") else _iterate_csv
    try:
        yield from reader(path, rows)
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"data.root: {path} is not text in UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"data.root: {path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # pandas and pyarrow raise whatever they stumble over
        reason = str(error).strip().splitlines()[-1] if str(error) else type(error).__name__
        raise UserError(
            f"data.root: {path} is no {reader.__name__.rpartition('_')[2]} table, or a damaged "
            f"one: {reason}"
        ) from None


def _iterate_csv(path: Path, rows: int) -> Iterator[pd.DataFrame]:
    header = _csv_header(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        options: dict[str, Any] = {"index_col": False, "encoding": "utf-8-sig"}
        reader: Any = pd.read_csv(path, chunksize=rows, low_memory=False, **options)
        with reader:
            yield from (frame.set_axis(header, axis=1) for frame in reader)


def _csv_header(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        header = next(csv.reader(file), [])
    if not header or header == [""]:
        raise UserError(f"data.root: {path} is empty; expected a line of column names, then rows")
    _check_names(header, path)
    if len(header) == 1 and len(header[0].replace(";", "\t").split("\t")) > 1:
        raise UserError(
            f"data.root: {path} has one column, {header[0]!r:.60}; expected commas between columns"
        )
    return header


def _iterate_parquet(path: Path, rows: int) -> Iterator[pd.DataFrame]:
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        _check_names(schema.names, path)
        size = 8 * file.metadata.num_rows * max(1, file.metadata.num_columns)
        check_room(path, size, "take fewer rows or columns")
        for batch in file.iter_batches(batch_size=rows):
            yield pa.Table.from_batches([batch]).to_pandas(ignore_metadata=True)
        if file.metadata.num_rows == 0:
            yield schema.empty_table().to_pandas(ignore_metadata=True)


def _check_names(names: Sequence[str], path: Path) -> None:
    again = sorted({name for name in names if names.count(name) > 1})
    if again:
        raise UserError(f"data.root: {path} has columns of the same name: {some(map(repr, again))}")


def _read_all(paths: list[Path]) -> tuple[pd.DataFrame, np.ndarray]:
    """One frame of all files, and the rows' ids: their place, after the file's name if several."""
    frames = [read_table(path) for path in paths]
    for path, frame in zip(paths[1:], frames[1:], strict=True):
        odd = sorted(set(frame.columns) ^ set(frames[0].columns), key=str)
        if odd:
            raise UserError(
                f"data.root: {path} and {paths[0]} have different columns: only one of them has "
                f"{some(map(repr, odd))}"
            )
    prefixes = [path.stem if len(paths) > 1 else "" for path in paths]
    ids = [number_rows(len(frame), name) for frame, name in zip(frames, prefixes, strict=True)]
    frame = pd.concat(frames, ignore_index=True)
    if frame.empty:
        raise UserError(f"data.root: {some(paths)}: no row; expected at least 10")
    return frame, np.concatenate(ids)


def chosen_columns(frame: pd.DataFrame, data: DataParams) -> list[str]:
    """The names of the data's columns; raises UserError for unknown ones, and lists text ones."""
    for key in ("id", "label", "group", "columns"):
        value = getattr(data, key)
        names = (value,) if isinstance(value, str) else value or ()
        unknown = [name for name in names if name not in frame.columns]
        if unknown:
            raise UserError(
                f"data.{key}: there is no column {some(map(repr, unknown))}; there are "
                f"{some(map(repr, frame.columns), 12)}"
            )
    if data.columns is not None:
        return list(data.columns)
    others = {data.id, data.label, data.group}
    columns = [str(name) for name in frame.columns if name not in others]
    text = [name for name in columns if not _is_numeric(frame[name]) and not _strays(frame[name])]
    if text:
        numeric = [name for name in columns if _is_numeric(frame[name])]
        raise UserError(
            f"data.columns: columns {some(map(repr, text), 12)} are not numbers, and categories "
            "have no density; name the columns to model, such as data.columns: "
            f"[{', '.join(numeric[:4])}{', …' if len(numeric) > 4 else ''}], or one of the others "
            "in data.label, data.group or data.id"
        )
    if not columns:
        raise UserError("data.columns: no column is left to model")
    return columns


def numeric_values(frame: pd.DataFrame, columns: Sequence[str], where: str) -> np.ndarray:
    """(N, columns) float64, NaN where a value is missing; raises UserError beginning with `where`.

    Refused by column and row: text, true and false, dates, complex numbers, infinity, and values
    beyond single precision.
    """
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise UserError(f"{where}: column {some(map(repr, missing), 12)} is missing")
    x = np.empty((len(frame), len(columns)))
    for index, name in enumerate(columns):
        values: Any = frame[name]
        if not _is_numeric(values):
            raise UserError(f"{where}: {_not_numeric(values, name)}")
        x[:, index] = values.to_numpy(dtype=np.float64, na_value=np.nan) + 0.0  # no -0
    beyond = np.abs(x) > LARGEST
    if beyond.any():
        row, column = np.argwhere(beyond)[0]
        raise UserError(
            f"{where}: column {columns[column]!r} is {x[row, column]:g} in row {row}, and "
            f"{int(beyond.sum()) - 1} more values are infinite or beyond {LARGEST:g}; mend or "
            "leave them empty (data.missing)"
        )
    return x


def _array(values: Any) -> np.ndarray:
    """A column as numbers where it holds numbers, else as objects; NaN where a value is missing."""
    kind = np.float64 if _is_numeric(values) else object
    return values.to_numpy(dtype=kind, na_value=np.nan)


def _is_numeric(values: Any) -> bool:
    kind = values.dtype
    return pd.api.types.is_numeric_dtype(kind) and not (
        pd.api.types.is_bool_dtype(kind) or pd.api.types.is_complex_dtype(kind)
    )


def _strays(values: Any) -> list[int]:
    """Rows that hold text in a column that is mostly numbers; else none."""
    if not (values.dtype == object or pd.api.types.is_string_dtype(values.dtype)):
        return []
    numbers: Any = pd.to_numeric(values, errors="coerce")
    bad = (numbers.isna() & values.notna()).to_numpy()
    return np.flatnonzero(bad).tolist() if 0 < bad.sum() < len(values) / 2 else []


def _not_numeric(values: Any, name: str) -> str:
    strays = _strays(values)
    if strays:
        return (
            f"column {name!r} holds {values.iloc[strays[0]]!r} in row {strays[0]}, which is no "
            f"number, and {len(strays) - 1} more like it; mend them, or leave them empty "
            "(data.missing)"
        )
    return f"column {name!r} holds {values.dtype}, such as {values.iloc[0]!r:.40}, not numbers"


def _check_ids(values: Any, ids: np.ndarray, name: str) -> None:
    if values.isna().any():
        raise UserError(f"data.id: {int(values.isna().sum())} rows have no value in {name!r}")
    again = values[values.duplicated()]
    if len(again):
        raise UserError(
            f"data.id: column {name!r} has {again.iloc[0]!r} more than once, and {len(again) - 1} "
            "more such rows; every row needs a name of its own"
        )
