"""Classes are numbered once over all parts and files; only an empty field is no label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.stage import UserError
from tests.pipeline.prepare.test_sources import load

LEVEL = {"a": 40, "b": 120, "c": 200}


def images(labels: list[Any], level: dict[Any, int] = LEVEL) -> np.ndarray:
    """Pictures whose grey level says what they are."""
    return np.stack([np.full((2, 2), level[name], np.uint8) for name in labels])


def levels(found: Any) -> dict[str, set[int]]:
    """The grey levels of each class."""
    seen: dict[str, set[int]] = {}
    for x, label in zip(found.x, found.label, strict=True):
        seen.setdefault("" if label < 0 else found.classes[label], set()).add(int(x.max()))
    return seen


def test_parts_that_lack_a_class_number_the_others_alike(tmp_path: Path) -> None:
    train, test = list("abcabc"), list("bcbc")
    np.savez(tmp_path / "d.npz", x_train=images(train), y_train=train, x_test=images(test),
             y_test=test)  # fmt: skip
    assert levels(load("npz", tmp_path / "d.npz")) == {k: {v} for k, v in LEVEL.items()}


def test_files_with_other_classes_are_one_set(tmp_path: Path) -> None:
    for name, labels in (("2023", list("ca")), ("2024", list("ba"))):
        np.savez(tmp_path / f"{name}.npz", x=images(labels), label=labels)
    assert levels(load("npz", tmp_path)) == {k: {v} for k, v in LEVEL.items()}


def test_a_file_without_labels_has_none(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=images(list("ab")), label=list("ab"))
    np.savez(tmp_path / "b.npz", x=images(["c"]))
    assert levels(load("npz", tmp_path)) == {"a": {40}, "b": {120}, "": {200}}


def test_numbers_in_one_file_and_names_in_another_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=images(list("ab")), label=[0, 1])
    np.savez(tmp_path / "b.npz", x=images(["c"]), label=["c"])
    with pytest.raises(UserError, match=r"numbers in .*a\.npz and names in .*b\.npz"):
        load("npz", tmp_path)


def test_whole_numbers_are_what_they_are_in_every_type(tmp_path: Path) -> None:
    level = {3: 40, 7: 120}
    kinds = (np.array([3, 7]), np.array([3.0, 7.0]), np.array(["3", "7"]), np.array([b"3", b"7"]))
    for number, labels in enumerate(kinds):
        np.savez(tmp_path / f"{number}.npz", x=images([3, 7], level), label=labels)
    found = load("npz", tmp_path)
    assert found.label.tolist() == [3, 7] * 4
    assert levels(found) == {"3": {40}, "7": {120}}


@pytest.mark.parametrize("names", [["NA", "None", "x"], ["nan", "null", "x"], ["", "NA", "x"]])
@pytest.mark.parametrize("kind", ["csv", "parquet", "npz"])
def test_only_an_empty_field_is_no_label(tmp_path: Path, names: list[str], kind: str) -> None:
    """NA is Namibia, and sodium."""
    values = np.random.default_rng(0).normal(size=30)
    labels = names * 10
    path = tmp_path / f"t.{kind}"
    if kind == "npz":
        np.savez(path, x=values[:, None], label=labels)
    elif kind == "csv":
        rows = "".join(f"{v},{n}\n" for v, n in zip(values, labels, strict=True))
        path.write_text(f"a,kind\n{rows}")
    else:
        pd.DataFrame({"a": values, "kind": labels}).to_parquet(path)
    source = "npz" if kind == "npz" else "table"
    changes = {} if kind == "npz" else {"label": "kind"}
    found = load(source, path, space="continuous", **changes)
    classes = tuple(sorted(filter(None, names)))
    assert found.classes == classes
    assert found.label.tolist() == [classes.index(n) if n else -1 for n in labels]
