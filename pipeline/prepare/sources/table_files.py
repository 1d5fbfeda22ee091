"""CSV and Parquet files, a batch of rows at a time: the one way in which tables are read here.

The values of a CSV file are text as it stands there, but for spaces around it: what a column holds
is decided by `pipeline.prepare.sources.columns`, for all batches and files alike. Shapes: N rows.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pipeline.prepare.sources.examples import check_room, some
from pipeline.stage import UserError

pc: Any = pyarrow.compute  # its functions are made when it is imported

CSV, PARQUET = (".csv",), (".parquet", ".pq")
SUFFIXES = CSV + PARQUET
BATCH_ROWS = 65_536
BLOCK_BYTES = 2**24  # of a CSV file, parsed at a time; a row is shorter
NAMELESS = "Unnamed: {}"  # as pandas calls a column without a name, in the file that it writes


@dataclass(frozen=True)
class TableFile:
    """A table's columns. index: names that the file itself says are row labels, and no data.

    nameless: columns without a name, which have been given one.
    """

    path: Path
    names: tuple[str, ...]
    index: frozenset[str] = frozenset()
    nameless: frozenset[str] = frozenset()


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() in PARQUET


def open_table(path: Path, where: str) -> TableFile:
    """Read a file's header. Raises UserError, beginning with `where`, where it is no table."""
    with told(path, where):
        return _open_parquet(path, where) if is_parquet(path) else _open_csv(path, where)


def batches(file: TableFile, where: str, rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
    """All rows, `rows` at a time but for the last batch; columns are `file.names`.

    Raises UserError, beginning with `where`, for a file that is damaged further on.
    """
    read = _parquet_batches if is_parquet(file.path) else _csv_batches
    with told(file.path, where):
        yield from rebatched(read(file), rows)


@contextmanager
def told(path: Path, where: str) -> Iterator[None]:
    """Errors of the libraries that read a table as UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{where} is not text in UTF-8; save it as UTF-8") from None
    except Exception as error:  # Arrow raises whatever it stumbles over
        reason = str(error).strip().splitlines()[-1] if str(error) else type(error).__name__
        if "UTF8" in reason:
            raise UserError(f"{where} is not text in UTF-8; save it as UTF-8") from None
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{where} cannot be read: {error.strerror}") from None
        kind = "Parquet" if is_parquet(path) else "CSV"
        raise UserError(f"{where} is no {kind} table, or a damaged one: {reason}") from None


def _open_csv(path: Path, where: str) -> TableFile:
    with path.open(newline="", encoding="utf-8-sig") as file:
        header = [name.strip() for name in next(csv.reader(file), [])]
    if not header or header == [""]:
        raise UserError(f"{where} is empty; expected a line of column names, then rows")
    if len(header) == 1 and len(header[0].replace(";", "\t").split("\t")) > 1:
        raise UserError(
            f"{where} has one column, {header[0]!r:.60}; expected commas between columns"
        )
    names = [name or NAMELESS.format(place) for place, name in enumerate(header)]
    _check_names(names, where)
    nameless = {
        name
        for place, name in enumerate(names)
        if not header[place] or name == NAMELESS.format(place)
    }
    return TableFile(path, tuple(names), nameless=frozenset(nameless))


def _csv_batches(file: TableFile) -> Iterator[pa.RecordBatch]:
    reader = pa_csv.open_csv(
        file.path,
        read_options=pa_csv.ReadOptions(
            use_threads=False, block_size=BLOCK_BYTES, column_names=list(file.names), skip_rows=0
        ),
        parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
            column_types=dict.fromkeys(file.names, pa.string()), strings_can_be_null=False
        ),
    )
    first, last = True, ""  # the header, which the csv module has read and checked, comes first
    for batch in reader:
        last = batch.columns[-1][-1].as_py() if len(batch) else last
        yield pa.RecordBatch.from_arrays(
            [pc.utf8_trim_whitespace(column) for column in batch.columns], list(file.names)
        )[int(first) :]
        first = False
    if "\n" in last and not _ends_with_quote(file.path):
        raise ValueError("its last quotation mark has no other, so rows may lie inside a value")


def _ends_with_quote(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64))
        return file.read().rstrip().endswith(b'"')


def _open_parquet(path: Path, where: str) -> TableFile:
    with pq.ParquetFile(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
    _check_names(schema.names, where)
    size = 8 * metadata.num_rows * max(1, metadata.num_columns)
    check_room(path, size, "take fewer rows or columns")
    nameless = {name for name in schema.names if not name.strip()}
    return TableFile(path, tuple(schema.names), _index_of(schema), frozenset(nameless))


def _index_of(schema: pa.Schema) -> frozenset[str]:
    """The columns that pandas wrote as the index of its rows."""
    text = (schema.metadata or {}).get(b"pandas")
    try:
        found: Any = json.loads(text)["index_columns"] if text else []
        return frozenset(name for name in found if isinstance(name, str)) & set(schema.names)
    except (ValueError, KeyError, TypeError):
        return frozenset()


def _parquet_batches(file: TableFile) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(file.path) as opened:
        yield from opened.iter_batches(batch_size=BATCH_ROWS)


def _check_names(names: Sequence[str], where: str) -> None:
    again = sorted({name for name in names if names.count(name) > 1})
    if again:
        raise UserError(f"{where} has columns of the same name: {some(map(repr, again))}")


def rebatched(parts: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Batches of exactly `rows` rows, but for the last, wherever the file's own end."""
    held: list[pa.RecordBatch] = []
    count = 0
    for batch in parts:
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
    if len(parts) == 1:
        return parts[0]
    table = pa.Table.from_batches(parts).combine_chunks()
    return table.to_batches()[0]
