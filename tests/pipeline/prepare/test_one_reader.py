"""`prepare` and `score` read the same bytes alike: the same numbers, or a refusal by both."""

from __future__ import annotations

import string
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from pipeline.score import PackedModel, open_input
from pipeline.stage import UserError
from tests.pipeline.prepare.test_sources import load


def scored(path: Path, **facts: Any) -> np.ndarray:
    """x as score gives it to a model, in chunks of 16."""
    known = {"folder": Path("m"), "weights_hash": "w", "num_samples": 10**6, "columns": None}
    packed = PackedModel(**{**known, **facts})
    source = open_input(path, packed, 10**6)
    chunks = [c for s in source.streams for c in s.read(s, source.layout, ())]
    return np.concatenate([np.asarray(chunk.x, dtype=np.float64) for chunk in chunks])


def table_both_ways(path: Path, columns: tuple[str, ...]) -> tuple[Any, Any]:
    """What prepare and score read of the columns; the message of a refusal in its place."""
    try:
        prepared: Any = load("table", path, space="continuous", columns=columns).x
    except UserError as error:
        prepared = str(error)
    try:
        found: Any = scored(
            path, space="continuous", data_shape=(len(columns),), columns=list(columns)
        )
    except UserError as error:
        found = str(error)
    return prepared, found


def assert_alike(prepared: Any, found: Any) -> None:
    if isinstance(prepared, str) and not isinstance(found, str):
        # score refuses an infinite value row by row, in the model
        assert "infinite or beyond" in prepared, (prepared, found)
        assert (~(np.abs(found) <= 1e100)).any()
        return
    assert isinstance(prepared, str) == isinstance(found, str), (prepared, found)
    if not isinstance(prepared, str):
        np.testing.assert_array_equal(prepared, found)


FIELDS = st.one_of(
    st.floats(width=32).map(repr),
    st.integers(-(10**20), 10**20).map(str),
    st.sampled_from(
        ["", " ", "NA", "nan", "None", "null", "inf", "-inf", "True", "false", "1,5", "1_000",
         "0x10", "1e5", "+3", ".5", "5.", "2024-01-01", "1e400", "n/k", '"7"', " 8 ", "٣", "1d5"]
    ),
    st.text(string.ascii_letters + " .-", max_size=4),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.lists(FIELDS, min_size=2, max_size=3), min_size=1, max_size=40),
    header=st.sampled_from(["a,b", "a, b", '"a","b"', "b,a", "\ufeffa,b", "a,b,c", ",a,b"]),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_any_csv(tmp_path_factory: Any, rows: list[list[str]], header: str, end: str) -> None:
    path = tmp_path_factory.mktemp("csv") / "T.CSV"
    width = header.count(",") + 1
    lines = [header, *(",".join((row * width)[: max(width, len(row) * (len(row) == 3))])
                       for row in rows)]  # fmt: skip
    path.write_bytes((end.join(lines) + end).encode())
    assert_alike(*table_both_ways(path, ("a", "b")))


KINDS = st.sampled_from(
    [pa.int8(), pa.int64(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.bool_(),
     pa.string(), pa.date32(), pa.timestamp("us"), pa.decimal128(20, 3), pa.null(),
     pa.list_(pa.float64()), pa.duration("s")]
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    kind=KINDS,
    values=st.lists(st.one_of(st.none(), st.integers(0, 100)), min_size=2, max_size=40),
    dictionary=st.booleans(),
)
def test_any_parquet(
    tmp_path_factory: Any, kind: pa.DataType, values: list[int | None], dictionary: bool
) -> None:
    path = tmp_path_factory.mktemp("parquet") / "t.pq"
    if pa.types.is_list(kind):
        column = pa.array([None if v is None else [v] for v in values], kind)
    elif pa.types.is_string(kind):
        column = pa.array([None if v is None else str(v) for v in values], kind)
    elif pa.types.is_boolean(kind):
        column = pa.array([None if v is None else v > 50 for v in values], kind)
    elif pa.types.is_decimal(kind):
        column = pa.array([None if v is None else Decimal(v) for v in values], kind)
    elif pa.types.is_null(kind):
        column = pa.nulls(len(values))
    else:
        whole = pa.array(values, pa.int32())
        step = pa.float32() if pa.types.is_floating(kind) else pa.int64()
        column = (whole if pa.types.is_date32(kind) else whole.cast(step)).cast(kind)
    if dictionary and (pa.types.is_integer(kind) or pa.types.is_string(kind)):
        column = column.dictionary_encode()
    pq.write_table(pa.table({"a": column, "b": np.arange(len(values)) * 0.5}), path)
    assert_alike(*table_both_ways(path, ("a", "b")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b,c\n1,7,2,6\n0,5,1,6\n", "Expected 3 columns, got 4"),
        ("a,b,c\n1,7\n", "Expected 3 columns, got 2"),
        ("a,b,c,a\n1,7,2,9\n", "columns of the same name: 'a'"),
        ("a,b,c\nTrue,7,2\n", "'True'"),
        ("a,b,c\n2024-01-01,7,2\n", "'2024-01-01'"),
    ],
)
def test_refusals_are_the_same(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    prepared, found = table_both_ways(path, ("a", "b", "c"))
    assert words in prepared
    assert words in found


@pytest.mark.parametrize("name", ["t.csv", "T.CSV", "t.parquet", "t.pq", "T.Parquet"])
def test_the_training_file_itself_can_be_scored(tmp_path: Path, name: str) -> None:
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(50, 2)), columns=["a", "b"])
    path = tmp_path / name
    frame.to_csv(path) if "csv" in name.lower() else frame[frame.a > -9].to_parquet(path)
    found = load("table", path, space="continuous")
    facts = {"space": "continuous", "data_shape": (2,)}
    for columns in (list(found.columns or ()), None):
        np.testing.assert_array_equal(scored(path, columns=columns, **facts), found.x)


DTYPES = ["bool", "uint8", "int8", "int64", "uint16", "float16", "float32", "float64", "complex64"]
VALUES = [[0, 1], [0, 255], [0, 128, 255], [0.0, 0.5, 1.0], [0, 256], [-1, 3], [0.0, np.nan]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize("suffix", ["npz", "npy"])
@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 1), (1, 4, 4)])
def test_pictures_in_arrays_of_any_type(
    tmp_path: Path, dtype: str, values: list[float], suffix: str, shape: tuple[int, ...]
) -> None:
    """40 pictures, so that score reads several chunks; one at a time might look otherwise."""
    rng = np.random.default_rng(0)
    with np.errstate(all="ignore"):
        x = rng.choice(values, size=(40, *shape)).astype(dtype)
    path = tmp_path / f"x.{suffix}"
    np.save(path, x) if suffix == "npy" else np.savez(path, x=x)
    try:
        prepared: Any = load("npz", path).x.astype(float)
    except UserError as error:
        prepared = str(error)
    try:
        found: Any = scored(path, space="grey8", data_shape=(1, 4, 4)).reshape(40, 1, 4, 4)
    except UserError as error:
        found = str(error)
    assert_alike(prepared, found)


def test_black_and_white_is_one_picture_in_every_type(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).random((20, 4, 4)) > 0.5
    for dtype, white in (("bool", 1), ("uint8", 255), ("float32", 1.0), ("int64", 255)):
        np.savez(tmp_path / "x.npz", x=bits.astype(dtype) * np.array(white, dtype))
        for space, top in (("grey8", 255), ("binary", 1)):
            found = scored(tmp_path / "x.npz", space=space, data_shape=(1, 4, 4))
            np.testing.assert_array_equal(found.reshape(bits.shape), top * bits)


def test_parts_and_ids_of_an_array_file(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (30, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", x_train=x[:20], X_test=x[20:])
    found = scored(tmp_path / "d.npz", space="grey8", data_shape=(1, 4, 4))
    np.testing.assert_array_equal(found.reshape(x.shape), x)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("1", "png"), ("P", "png"), ("RGB", "png"), ("LA", "png"), ("CMYK", "tif"),
     ("I;16", "png"), ("L", "tif"), ("RGB", "bmp"), ("L", "webp")],
)  # fmt: skip
@pytest.mark.parametrize("orientation", [1, 6])
def test_picture_files_of_any_kind(
    tmp_path: Path, mode: str, suffix: str, orientation: int
) -> None:
    rng = np.random.default_rng(0)
    for index in range(3):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).convert("L" if mode == "I;16" else mode)
        if mode == "I;16":
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        exif = Image.Exif()
        exif[0x0112] = orientation
        options: dict[str, Any] = {"exif": exif} if suffix != "bmp" else {}
        image.save(tmp_path / f"{index}.{suffix}", **options)
    try:
        prepared: Any = load("folder", tmp_path).x.astype(float)
    except UserError as error:
        prepared = str(error)
    shape = (1, 4, 4) if isinstance(prepared, str) else prepared.shape[1:]
    try:
        found: Any = scored(tmp_path, space="grey8", data_shape=tuple(shape))
    except UserError as error:
        found = str(error)
    assert_alike(prepared, found)


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_turned_tiff_keeps_its_pixels(tmp_path: Path, mode: str, orientation: int) -> None:
    """Read from a file as from memory; a picture's height and width are those it decodes to."""
    from pipeline.prepare.sources.images import decode_picture, read_header

    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.tif"
    Image.fromarray(pixels).convert(mode).save(path, exif=exif)
    found = decode_picture(path)
    np.testing.assert_array_equal(found, decode_picture(path.read_bytes()))
    assert found.shape == tuple(read_header(path))
    assert found.shape[1:] == ((3, 5) if orientation in (6, 8) else (5, 3))
    turned = {1: 0, 3: 2, 6: -1, 8: 1}[orientation]
    if mode == "RGB":
        np.testing.assert_array_equal(found, np.rot90(pixels, turned).transpose(2, 0, 1))


TENSOR_ROWS = [[[1.0, None], [3.0, 4.0]], [[1.0, 2.0], None, [5.0, 6.0]]]


@pytest.mark.parametrize("rows", TENSOR_ROWS)
def test_a_null_in_a_column_of_tensors_is_a_missing_value(tmp_path: Path, rows: list[Any]) -> None:
    """As in the same data in named columns; what the buffer holds below a null is nothing."""
    kind = pa.fixed_shape_tensor(pa.float64(), (2,))
    storage = pa.array(rows, type=kind.storage_type)
    tensors = pa.ExtensionArray.from_storage(kind, storage)
    path = tmp_path / "t.parquet"
    try:
        pq.write_table(pa.table({"x": tensors}), path)
        pq.read_table(path)
    except pa.ArrowException:
        pytest.skip("Parquet cannot hold it")
    expected = np.array([row or [None, None] for row in rows], dtype=float)
    facts = {"space": "continuous", "data_shape": (2,), "columns": ["a", "b"]}
    np.testing.assert_array_equal(scored(path, **facts), expected)
    filled = np.where(np.isnan(expected), [7.0, 8.0], expected)
    found = scored(path, filled={"a": 7.0, "b": 8.0}, **facts)
    np.testing.assert_array_equal(found, filled)
