"""Ids, groups and labels are the text of the file, whatever lies in other rows and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.stage import UserError
from tests.pipeline.prepare.test_sources import load


def csv(path: Path, column: str, texts: list[str]) -> Path:
    values = np.random.default_rng(len(texts)).normal(size=len(texts))
    rows = "".join(f"{text},{value}\n" for text, value in zip(texts, values, strict=True))
    path.write_text(f"{column},a\n{rows}")
    return path


TEXTS = [
    [f"{i:05d}" for i in range(40)],
    [f"{i}e3" for i in range(12, 52)],
    [f"{i}.0" for i in range(40)],
    [str(10**18 + i) for i in range(40)],
    [f"{i:05d}" for i in range(39)] + ["X1"],
    ["+7", "-0", "0x1F", "1_000", "inf", "nan", "NA", "None", "True", "2024-01-05"],
]


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("key", ["id", "group"])
def test_they_stay_what_they_are(tmp_path: Path, texts: list[str], key: str) -> None:
    path = csv(tmp_path / "t.csv", "who", texts)
    found = load("table", path, space="continuous", **{key: "who"})
    assert getattr(found, key).tolist() == texts


def test_one_letter_in_the_last_of_many_rows_changes_no_other(tmp_path: Path) -> None:
    texts = [f"{i % 20_000:06d}" for i in range(70_000)]
    texts[-1] = "K-1"
    found = load("table", csv(tmp_path / "t.csv", "who", texts), space="continuous", group="who")
    assert found.group is not None
    assert found.group.tolist() == texts


def test_files_of_text_agree(tmp_path: Path) -> None:
    texts = [f"{i:03d}" for i in range(50)]
    csv(tmp_path / "visit1.csv", "who", texts)
    csv(tmp_path / "visit2.csv", "who", [*texts, "X17"])
    found = load("table", tmp_path, space="continuous", group="who")
    assert found.group is not None
    assert found.group.tolist() == [*texts, *texts, "X17"]


def test_a_group_written_in_two_ways_is_refused(tmp_path: Path) -> None:
    csv(tmp_path / "a.csv", "who", [str(i) for i in range(20)])
    csv(tmp_path / "b.csv", "who", [f"{i:03d}" for i in range(20)])
    with pytest.raises(UserError, match=r"holds '0(00)?' and '0(00)?', which may be one group"):
        load("table", tmp_path, space="continuous", group="who")


def parquet(path: Path, column: pa.Array) -> Path:
    values = np.random.default_rng(0).normal(size=len(column))
    pq.write_table(pa.table({"who": column, "a": values}), path)
    return path


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        (pa.array(["007", "8"]), ["007", "8"]),
        (pa.array([7, 8], pa.int8()), ["7", "8"]),
        (pa.array([7.0, 8.5]), ["7", "8.5"]),
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
        (pa.array([True, False]), ["True", "False"]),
        (pa.array([0, 1], pa.date32()), ["1970-01-01", "1970-01-02"]),
        (pa.array([10**18, 10**18 + 1]), [str(10**18), str(10**18 + 1)]),
        (pa.array(["a", "b"], pa.large_string()), ["a", "b"]),
    ],
)
def test_parquet_has_types_and_they_are_written_one_way(
    tmp_path: Path, column: pa.Array, texts: list[str]
) -> None:
    found = load("table", parquet(tmp_path / "t.parquet", column), space="continuous", id="who")
    assert found.id.tolist() == texts


def test_parquet_files_of_two_types_are_refused_by_name(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", pa.array([7, 8]))
    parquet(tmp_path / "b.parquet", pa.array(["007", "X"]))
    message = r"holds int64 in .*a\.parquet and text in .*b\.parquet; save it as text"
    with pytest.raises(UserError, match=message):
        load("table", tmp_path, space="continuous", group="who")


def test_parquet_files_of_text_agree_whatever_they_hold(tmp_path: Path) -> None:
    """Of digits alone in one file, and with a letter in the last of many rows of the other."""
    texts = [str(i) for i in range(70_000)]
    parquet(tmp_path / "a.parquet", pa.array(texts))
    parquet(tmp_path / "b.parquet", pa.array([*texts, "X17"]))
    found = load("table", tmp_path, space="continuous", group="who")
    assert found.group is not None
    assert found.group.tolist() == [*texts, *texts, "X17"]


def test_text_of_whole_numbers_and_whole_numbers_agree(tmp_path: Path) -> None:
    csv(tmp_path / "a.csv", "who", [str(i) for i in range(9)])
    parquet(tmp_path / "b.parquet", pa.array(range(9)))
    found = load("table", tmp_path, space="continuous", group="who")
    assert found.group is not None
    assert found.group.tolist() == [str(i) for i in range(9)] * 2
    csv(tmp_path / "a.csv", "who", [f"{i:02d}" for i in range(9)])
    with pytest.raises(UserError, match=r"text in .*a\.csv and int64 in .*b\.parquet"):
        load("table", tmp_path, space="continuous", group="who")


def test_whole_numbers_with_a_gap_beside_them_are_still_whole(tmp_path: Path) -> None:
    """pandas writes them as floats."""
    frame = pd.DataFrame({"kind": [3.0, np.nan, 7.0] * 4, "a": np.arange(12) * 1.5})
    frame.to_parquet(tmp_path / "a.parquet")
    frame.assign(kind=[3, 5, 7] * 4).to_parquet(tmp_path / "b.parquet")
    found = load("table", tmp_path, space="continuous", label="kind")
    assert found.label.tolist() == [3, -1, 7] * 4 + [3, 5, 7] * 4


def test_what_is_no_name_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", pa.array([[1], [2]]))
    with pytest.raises(UserError, match=r"data\.id: column 'who' of .* holds list<"):
        load("table", path, space="continuous", id="who", columns=("a",))


@pytest.mark.parametrize("kind", ["csv", "parquet", "named", "counted", "unnamed"])
def test_row_numbers_are_no_data(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=60), "b": rng.normal(size=60)})
    path = tmp_path / ("t.parquet" if kind in ("parquet", "named") else "t.csv")
    if kind == "csv":
        frame.to_csv(path)
    elif kind == "parquet":
        frame[frame.a > -1].to_parquet(path)
    elif kind == "named":
        frame.set_index(pd.Index(rng.normal(size=60), name="c")).to_parquet(path)
    elif kind == "counted":
        frame.assign(row=np.arange(1, 61)).to_csv(path, index=False)
    else:
        frame.to_csv(tmp_path / "first.csv")
        pd.read_csv(tmp_path / "first.csv").to_csv(path, index=False)  # "Unnamed: 0"
    found = load("table", path, space="continuous")
    assert found.columns == ("a", "b")
    assert found.notes[0].startswith("left out, since they number the rows: '")


def test_a_column_without_a_name_that_counts_nothing_is_refused(tmp_path: Path) -> None:
    rows = "".join(f"{i % 7},{i % 5},{i % 3}\n" for i in range(20))
    (tmp_path / "t.csv").write_text(f"a,,b\n{rows}")
    with pytest.raises(UserError, match=r"column 2 of .*t\.csv has no name; give it one"):
        load("table", tmp_path / "t.csv", space="continuous")
    assert load("table", tmp_path / "t.csv", space="continuous", columns=("a",)).columns == ("a",)


def test_an_index_that_a_key_names_is_taken(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"a": np.arange(12) * 1.5}, index=pd.Index(list("abcdefghijkl"), name="who")
    )
    frame.to_parquet(tmp_path / "t.parquet")
    found = load("table", tmp_path / "t.parquet", space="continuous", id="who")
    assert found.id.tolist() == list("abcdefghijkl")
    assert found.columns == ("a",)
