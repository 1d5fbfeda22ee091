"""Tables: CSV and Parquet alike, columns by role, missing values, and each refusal by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.prepare import check_columns, fill_missing, prepare
from pipeline.prepare.sources.examples import encode_labels
from pipeline.prepare.sources.table import iterate_tables, read_table
from pipeline.stage import SPLITS, UserError, load_meta, load_split
from tests.pipeline.builders import TABLE
from tests.pipeline.prepare.test_sources import load


def frame(rows: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "age": rng.normal(40, 10, rows),
            "height": rng.normal(1.7, 0.1, rows),
            "count": rng.integers(0, 10**6, rows),
        }
    )


def write(table: Any, path: Path) -> Path:
    table.to_csv(path, index=False) if path.suffix == ".csv" else table.to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_every_number_is_read_as_it_was_written(suffix: str, tmp_path: Path):
    table = frame()
    path = write(table, tmp_path / f"People 2024.{suffix}")
    found = load("table", path, space="continuous")
    np.testing.assert_array_equal(found.x, table.to_numpy())
    assert found.columns == ("age", "height", "count")
    assert found.id.tolist() == [f"{index:07d}" for index in range(60)]
    assert (found.dataset, found.group, found.classes) == ("people-2024", None, None)
    assert found.label.tolist() == [-1] * 60
    assert [len(part) for part in iterate_tables(path, rows=25)] == [25, 25, 10]
    pd.testing.assert_frame_equal(read_table(path), table.astype(float))


def test_columns_by_role(tmp_path: Path):
    table = frame().assign(
        name=[f"p{index}" for index in range(60)],
        kind=["dog", "cat", None] * 20,
        family=[index // 4 for index in range(60)],
    )
    path = write(table, tmp_path / "a.csv")
    roles = {"id": "name", "label": "kind", "group": "family"}
    found = load("table", path, space="continuous", **roles)
    assert found.columns == ("age", "height", "count")
    assert found.id.tolist() == table["name"].tolist()
    assert found.label.tolist() == [1, 0, -1] * 20
    assert found.classes == ("cat", "dog")
    assert found.group is not None
    assert found.group.tolist() == [str(index // 4) for index in range(60)]
    chosen = load("table", path, space="continuous", columns=("height", "age"))
    np.testing.assert_array_equal(chosen.x, table[["height", "age"]])


def test_files_of_a_folder_are_one_table(tmp_path: Path):
    table = frame()
    write(table[:40], tmp_path / "a.csv")
    write(table.iloc[40:, ::-1], tmp_path / "b.parquet")
    found = load("table", tmp_path, space="continuous")
    np.testing.assert_array_equal(found.x, table.to_numpy())
    assert (found.id[0], found.id[40]) == ("a-0000000", "b-0000000")
    write(table[:5].drop(columns="age"), tmp_path / "c.csv")
    with pytest.raises(UserError, match=r"c\.csv and .*a\.csv have different columns: .* 'age'"):
        load("table", tmp_path, space="continuous")


@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [
        (np.array([2, 0, 2]), [2, 0, 2], ("0", "1", "2")),
        (np.array([1.0, np.nan, 0.0]), [1, -1, 0], ("0", "1")),
        (np.array(["b", "a", "b"]), [1, 0, 1], ("a", "b")),
        (np.array([0.5, 1.5, np.nan]), [0, 1, -1], ("0.5", "1.5")),
        (np.array([True, False, True]), [1, 0, 1], ("False", "True")),
        (np.array([10**12, 5, 5]), [0, 1, 1], ("1000000000000", "5")),
        (np.array(["a", None, "c"], object), [0, -1, 1], ("a", "c")),
    ],
)
def test_labels_of_any_kind(values: np.ndarray, labels: list[int], classes: tuple[str, ...]):
    found, names = encode_labels(values)
    assert (found.tolist(), names) == (labels, classes)


def text(content: str, name: str = "a.csv") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(content)
        return folder / name

    return make


def binary(content: bytes, name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def changed(change: Callable[[pd.DataFrame], object], name: str = "a.csv"):
    def make(folder: Path) -> Path:
        table = frame()
        result = change(table)
        return write(result if isinstance(result, pd.DataFrame) else table, folder / name)

    return make


def cut(folder: Path) -> Path:
    path = write(frame(), folder / "a.parquet")
    path.write_bytes(path.read_bytes()[:-200])
    return path


def put(row: int, column: str, value: object) -> Callable[[pd.DataFrame], object]:
    def change(table: pd.DataFrame) -> pd.DataFrame:
        table = table.astype(object)
        table.loc[row, column] = value
        return table

    return change


WRONG: list[tuple[Callable[[Path], Path], str]] = [
    (text(""), r"a\.csv is empty; expected a line of column names"),
    (text("age,height\n"), r"no row; expected at least 10"),
    (text("a,a,b\n1,2,3\n"), r"columns of the same name: 'a'"),
    (text("a;b\n1;2\n"), r"has one column, 'a;b'; expected commas"),
    (text("a,b\n1,2\n1,2,3\n"), r"no CSV table, or a damaged one: .*#3: Expected 2 columns, got 3"),
    (text("a,b\n1,2,3\n4,5,6\n"), r"no CSV table, or a damaged one: .*#2: Expected 2"),
    (text('a,b\n1,"2\n3,4\n'), r"no CSV table, or a damaged one: its last quotation mark has"),
    (text("not,parquet\n1,2\n", "a.parquet"), r"a\.parquet is no Parquet table, or a damaged one"),
    (cut, r"a\.parquet is no Parquet table, or a damaged one"),
    (binary(b"", "a.parquet"), r"a\.parquet is no Parquet table, or a damaged one"),
    (binary("größe\n1\n".encode("latin-1"), "a.csv"), r"a\.csv is not text in UTF-8"),
    (binary("größe\n1\n".encode("utf-16"), "a.csv"), r"a\.csv is not text in UTF-8"),
    (changed(put(7, "age", "old")), r"column 'age' holds 'old' in row 7, .* and 0 more like it"),
    (changed(put(7, "age", np.inf)), r"column 'age' is inf in row 7, and 0 more"),
    (changed(put(3, "age", -1e200)), r"column 'age' is -1e\+200 in row 3"),
    (changed(lambda t: t.assign(sex="f", town="x")), r"'sex', 'town' are not numbers, .*\[age, "),
    (changed(lambda t: t.assign(yes=t["age"] > 40), "a.parquet"), r"columns 'yes' are not num"),
    (changed(lambda t: t.assign(day=pd.Timestamp("2024-01-01")), "a.parquet"), r"columns 'day'"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_wrong_tables_are_told(make: Callable[[Path], Path], message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        load("table", make(tmp_path), space="continuous")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"columns": ("agee",)}, r"data\.columns: there is no column 'agee'; there are 'age', 'h"),
        ({"label": "agee"}, r"data\.label: there is no column 'agee'"),
        ({"group": "agee"}, r"data\.group: there is no column 'agee'"),
        ({"id": "sex"}, r"data\.id: column 'sex' has 'f' more than once, and 58 more such rows"),
        ({"id": "gap", "columns": ("age",)}, r"data\.id: 1 rows have no value in column 'gap'"),
        ({"group": "gap", "columns": ("age",)}, r"data\.group: 1 rows have no value in column"),
        ({"columns": ("age", "sex")}, r"column 'sex' holds text, such as 'f', not num"),
    ],
)
def test_wrong_roles_are_told(keys: dict[str, object], message: str, tmp_path: Path):
    table = frame().assign(sex="f", gap=[np.nan, *range(59)])
    path = write(table, tmp_path / "a.csv")
    with pytest.raises(UserError, match=message):
        load("table", path, space="continuous", **keys)


def prepared(table: pd.DataFrame, folder: Path, **changes: object):
    path = write(table, folder / "a.csv")
    data = replace(TABLE, root=str(path), valid_fraction=0.3, test_fraction=0.3, **changes)  # pyright: ignore[reportArgumentType]
    prepare(data, folder / "prepared")
    return folder / "prepared"


def test_rows_keep_their_ids_and_values(tmp_path: Path):
    table = frame()
    out = prepared(table, tmp_path)
    assert load_meta(out).columns == ("age", "height", "count")
    seen = 0
    for name in SPLITS:
        split = load_split(out, name)
        assert split.x.dtype == np.float64
        np.testing.assert_array_equal(split.x, table.to_numpy()[split.id.astype(int)])
        seen += len(split)
    assert seen == 60
    assert (out / "preview.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("method", ["mean", "median"])
def test_gaps_are_filled_from_the_training_split_alone(method: str, tmp_path: Path):
    table = frame()
    table.loc[[3, 17, 40, 59], "age"] = np.nan
    with pytest.raises(UserError, match=r"4 of 60 rows have missing values \(the first: 0000003\); "
                                        r"by column: 'age' 4; .*mean or median"):  # fmt: skip
        prepared(table, tmp_path)
    out = prepared(table, tmp_path, missing=method)
    train = load_split(out, "train").id.astype(int)
    expected = getattr(table.loc[train, "age"], method)()
    assert load_meta(out).filled == {"age": pytest.approx(expected, rel=1e-12)}
    for name in SPLITS:
        split = load_split(out, name)
        filled = table["age"].fillna(expected).to_numpy()[split.id.astype(int)]
        np.testing.assert_allclose(split.x[:, 0], filled, rtol=1e-12)


def test_a_column_with_nothing_in_the_training_split_can_not_be_filled(tmp_path: Path):
    found = load("table", write(frame().assign(age=[1.0] + [np.nan] * 59), tmp_path / "a.csv"),
                 space="continuous")  # fmt: skip
    with pytest.raises(
        UserError, match=r"column 'age' has no value in the training split, so no m"
    ):
        fill_missing(found, np.arange(60), np.arange(60) > 5, replace(TABLE, missing="mean"))


def columns_of(table: pd.DataFrame, folder: Path) -> tuple[str, ...]:
    found = load("table", write(table, folder / "a.parquet"), space="continuous")
    return check_columns(found.x, np.arange(len(table)), np.full(len(table), "train"), found)


def test_columns_without_a_density_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"'a', 'b' has one value in the training split"):
        columns_of(frame().assign(a=1, b=0.1), tmp_path)
    nanoseconds = 1.7e18 + 1000 * np.arange(60)
    with pytest.raises(UserError, match=r"'t' lies at 1\.7e\+18 with .* 17.*; subtract an offs"):
        columns_of(frame().assign(t=nanoseconds), tmp_path)


def test_columns_with_more_than_5_percent_repeated_values_are_named(tmp_path: Path):
    table = frame(100).assign(
        few=np.r_[np.arange(95), 0, 0, 0, 0, 0], more=np.r_[np.arange(94), [0] * 6]
    )
    assert columns_of(table, tmp_path) == ("more",)


def test_a_group_lies_in_one_split(tmp_path: Path):
    table = frame(400).assign(family=np.arange(400) // 4)
    out = prepared(table, tmp_path, group="family")
    families = [set((load_split(out, name).id.astype(int) // 4).tolist()) for name in SPLITS]
    assert sum(map(len, families)) == len(set.union(*families)) == 100
    assert [len(load_split(out, name)) for name in SPLITS] == [4 * len(f) for f in families]
    for name, fraction in (("valid", 0.21), ("test", 0.3)):
        share = len(load_split(out, name)) / 400
        assert share == pytest.approx(fraction, abs=4 * np.sqrt(fraction * (1 - fraction) / 100))
