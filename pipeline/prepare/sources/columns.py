"""What a table's column holds: numbers, or text. One rule for every file, batch and command.

A number in CSV is a decimal number as C writes it (12, -3.5, 6e-3, inf); `MISSING` lists what
stands for a missing one. Ids, labels and groups are the text of the file, in which only an empty
field is missing. Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from pipeline.prepare.sources.examples import is_whole
from pipeline.stage import UserError

pc: Any = pyarrow.compute  # its functions are made when it is imported

LARGEST = 1e100  # beyond, a square is no number
MISSING = ("", "#N/A", "#NA", "-nan", "-NaN", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a",
           "nan", "null")  # fmt: skip


def numbers(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Values (N,) float64, NaN where one is missing, and where there is one that is no number.

    Numbers are integers, floats and decimals, and text of CSV (`is_text`); no numbers are true and
    false, dates, and text in Parquet, which can say what it holds.
    """
    column = _decoded(column)
    kind = column.type
    if pa.types.is_null(kind):
        return np.full(len(column), np.nan), np.zeros(len(column), bool)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        values = pc.cast(column, pa.float64(), safe=False)
        found = values.fill_null(float("nan")).to_numpy(zero_copy_only=False)
        return found + 0.0, np.zeros(len(column), bool)  # no -0
    return np.full(len(column), np.nan), column.is_valid().to_numpy(zero_copy_only=False)


def numbers_of_text(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """`numbers` of a column of a CSV file."""
    present = pc.if_else(pc.is_in(column, value_set=pa.array(MISSING)), None, column)
    try:
        values, wrong = pc.cast(present, pa.float64()), np.zeros(len(column), bool)
    except pa.ArrowInvalid:
        values, wrong = _one_by_one(present)
    return values.fill_null(float("nan")).to_numpy(zero_copy_only=False) + 0.0, wrong


def _one_by_one(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Where not all are numbers: halves, and their halves, so that few are asked alone."""
    try:
        return pc.cast(column, pa.float64()), np.zeros(len(column), bool)
    except pa.ArrowInvalid:
        if len(column) == 1:
            return pa.nulls(1, pa.float64()), np.ones(1, bool)
    half = len(column) // 2
    parts = [_one_by_one(column[:half]), _one_by_one(column[half:])]
    return pa.concat_arrays([values for values, _ in parts]), np.concatenate(
        [wrong for _, wrong in parts]
    )


def texts(column: pa.Array) -> np.ndarray:
    """A column as text, (N,) objects, None where a value is missing.

    Whole numbers are written without a point, also those that came as floats, since a missing
    value beside them makes pandas write floats; true and false as in Python; dates as ISO 8601.
    """
    column = _decoded(column)
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        found: list[Any] = [value or None for value in column.to_pylist()]
    elif pa.types.is_floating(kind):
        found = [_float_text(value) for value in column.to_pylist()]
    elif pa.types.is_boolean(kind):
        found = [None if value is None else str(value) for value in column.to_pylist()]
    elif pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise UserError(f"holds {kind}, expected text or numbers")
    else:
        found = pc.cast(column, pa.string()).to_pylist()
    return np.array([*found, None], dtype=object)[:-1]


def _float_text(value: float | None) -> str | None:
    if value is None or value != value:
        return None
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(value)


def role_kind(column: pa.Array, found: np.ndarray) -> tuple[str, bool]:
    """What a column of ids, labels or groups is, in a word, and whether all are whole numbers.

    Files must agree in the one or the other. found: `texts` of the column.
    """
    kind = _decoded(column).type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    whole = all(is_whole(text) for text in found.tolist() if text is not None)
    return "text" if is_text else str(kind), whole


def alike(values: Sequence[str]) -> tuple[str, str] | None:
    """Two different texts that are one number, such as "7" and "007", or None."""
    seen: dict[Decimal, str] = {}
    for text in values:
        try:
            number = Decimal(text)
        except InvalidOperation:
            continue
        if number.is_finite() and seen.setdefault(number, text) != text:
            return seen[number], text
    return None


def _decoded(column: Any) -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
