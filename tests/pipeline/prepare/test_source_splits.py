"""A source's own splits are found in any usual spelling, or refused where it is in doubt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipeline.prepare.sources.splits import split_of, split_within
from pipeline.stage import UserError
from tests.pipeline.prepare.test_sources import load


def pictures(folder: Path, count: int = 3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (4, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


@pytest.mark.parametrize(
    ("train", "valid", "test"),
    [
        ("train", None, "test"),
        ("Train", None, "Test"),
        ("TRAIN", "VAL", "TEST"),
        ("Training", "Validation", "Testing"),
        ("training", "dev", "eval"),
        ("trn", "val", "tst"),
        ("train", "valid", None),
    ],
)
@pytest.mark.parametrize("within", ["", "mnist", "by label"])
def test_folders_in_any_spelling(
    tmp_path: Path, train: str, valid: str | None, test: str | None, within: str
) -> None:
    named = {"train": train, "valid": valid, "test": test}
    for split in filter(None, named.values()):
        for label in ("cat", "dog"):
            inner = (label, split) if within == "by label" else (within, split, label)
            pictures(tmp_path.joinpath(*filter(None, inner)))
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / ".DS_Store").write_text("no data")
    found = load("folder", tmp_path)
    assert found.split is not None
    for split, id, label in zip(found.split, found.id.tolist(), found.label, strict=True):
        assert named[split] in id.split("/")
        assert ("cat", "dog")[label] in id.split("/")
    assert found.classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train", "test", "."], r"'0\.png', '1\.png', '2\.png' beside the splits 'test', 'train'"),
        (["train/cat", "test/cat", "extra/cat"], "'extra' beside the splits 'test', 'train'"),
        (["train", "Train", "test"], "'Train', 'train' are both the train split"),
        (["train", "val", "validation"], "'val', 'validation' are both the valid split"),
        (["val", "test"], "'test', 'val' are names of splits, and none .* name it train"),
        (["cat/train", "cat/test", "dog"], r"'0\.png', .* beside the splits 'test', 'train'"),
    ],
)
def test_where_it_is_in_doubt_it_is_refused(
    tmp_path: Path, folders: list[str], message: str
) -> None:
    for folder in folders:
        pictures(tmp_path / folder)
    with pytest.raises(UserError, match=message):
        load("folder", tmp_path)


@pytest.mark.parametrize("folders", [["train", "plane"], ["test", "control"], ["valid", "invalid"]])
def test_one_name_of_a_split_alone_is_a_class(tmp_path: Path, folders: list[str]) -> None:
    for folder in folders:
        pictures(tmp_path / folder)
    found = load("folder", tmp_path)
    assert (found.split, found.classes) == (None, tuple(sorted(folders)))


@pytest.mark.parametrize(
    "names",
    [
        ("train.csv", "test.csv"),
        ("Train.csv", "TEST.csv"),
        ("my-data_training.parquet", "my-data_testing.parquet"),
        ("train/a.csv", "test/a.csv"),
        ("Training/a.parquet", "Eval/a.parquet"),
    ],
)
def test_tables_in_files_and_folders(tmp_path: Path, names: tuple[str, str]) -> None:
    rng = np.random.default_rng(0)
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        table = pd.DataFrame(rng.normal(size=(20, 2)), columns=["a", "b"])
        table.to_csv(path, index=False) if path.suffix == ".csv" else table.to_parquet(path)
    found = load("table", tmp_path, space="continuous")
    assert found.split is not None
    assert found.split.tolist() == ["train"] * 20 + ["test"] * 20 or set(found.split) == {
        "train", "test",
    }  # fmt: skip
    assert len(set(found.id.tolist())) == 40


def test_a_table_beside_splits_is_refused(tmp_path: Path) -> None:
    for name in ("train.csv", "test.csv", "more.csv"):
        pd.DataFrame({"a": np.random.default_rng(0).normal(size=9)}).to_csv(tmp_path / name)
    with pytest.raises(UserError, match=r"'more\.csv' beside the splits 'test\.csv', 'train\.csv'"):
        load("table", tmp_path, space="continuous")


@pytest.mark.parametrize(
    ("train", "test"),
    [("x_train", "x_test"), ("X_train", "X_test"), ("images_Training", "images_Testing"),
     ("train_x", "test_x")],
)  # fmt: skip
def test_arrays_in_any_spelling(tmp_path: Path, train: str, test: str) -> None:
    x = np.random.default_rng(0).integers(0, 256, (6, 4, 4), dtype=np.uint8)
    arrays: dict[str, Any] = {train: x[:4], test: x[4:]}
    np.savez(tmp_path / "a.npz", **arrays)
    found = load("npz", tmp_path / "a.npz")
    assert found.split is not None
    assert found.split.tolist() == ["train"] * 4 + ["test"] * 2
    np.testing.assert_array_equal(found.x[:, 0], x)


def test_arrays_of_files_that_are_splits(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (6, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "Train.npz", x=x[:4])
    np.save(tmp_path / "Test.npy", x[4:])
    found = load("npz", tmp_path)
    assert found.split is not None
    assert sorted(found.split.tolist()) == ["test"] * 2 + ["train"] * 4


def test_an_array_beside_those_of_splits_is_refused(tmp_path: Path) -> None:
    x = np.zeros((4, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", x=x, x_train=x, x_test=x)
    with pytest.raises(UserError, match="holds x beside arrays of splits"):
        load("npz", tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x_train=x, X_Train=x, x_test=x)
    with pytest.raises(UserError, match="two arrays of train x"):
        load("npz", tmp_path / "b.npz")


def test_words() -> None:
    assert [split_of(w) for w in ("Train", "VALIDATION", "tests", "test ")] == [
        "train", "valid", None, None,
    ]  # fmt: skip
    assert split_within("mnist-Test") == "test"
    assert split_within("train_and_test") is None
    assert split_within("latest") is None
