"""A user's own loader: what it may return, and each way to go wrong in a sentence."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent

import numpy as np
import pytest

from pipeline.stage import UserError
from tests.pipeline.prepare.test_sources import load


@pytest.fixture(autouse=True)
def fresh_modules() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def write(folder: Path, body: str, name: str = "my_data.py") -> None:
    head = "import numpy as np\n\ndef load(root):\n"
    (folder / name).write_text(head + indent(body, "    "))


def test_images_with_all_that_a_loader_may_say(tmp_path: Path):
    (tmp_path / "my_helper.py").write_text("COUNT = 12\n")
    np.save(tmp_path / "pixels.npy", np.arange(12 * 6, dtype=np.uint8).reshape(12, 2, 3))
    write(
        tmp_path,
        'from my_helper import COUNT\nx = np.load(root / "pixels.npy")\n'
        'return {"x": x, "label": ["a", "b"] * 6, "group": np.arange(COUNT) // 2,\n'
        '        "split": ["train"] * 6 + ["valid"] * 3 + ["test"] * 3}\n',
    )
    found = load("my_data:load", tmp_path)
    assert found.x.shape == (12, 1, 2, 3)
    assert found.x[11, 0, 1, 2] == 71
    assert found.label.tolist() == [0, 1] * 6
    assert found.classes == ("a", "b")
    assert found.split is not None
    assert found.split.tolist() == ["train"] * 6 + ["valid"] * 3 + ["test"] * 3
    assert found.group is not None
    assert found.dataset == "my-data"
    assert list(tmp_path.rglob("*.pyc")) == []


def test_a_table_with_named_columns(tmp_path: Path):
    write(tmp_path, 'return {"x": np.eye(4)[:, :2], "columns": ["left", "right"]}')
    found = load("my_data:load", tmp_path, space="continuous")
    assert found.columns == ("left", "right")
    np.testing.assert_array_equal(found.x, np.eye(4)[:, :2])


def test_root_may_be_the_file_itself(tmp_path: Path):
    write(tmp_path, 'return {"x": np.zeros((3, 2, 2), np.uint8)}')
    assert len(load("my_data:load", tmp_path / "my_data.py").x) == 3


WRONG = [
    ("return [1]", r"returned is list; expected a dict with x"),
    ("return {}", r"returned is dict; expected a dict with x"),
    ('return {"x": np.zeros((3, 2)), "lable": 1}', r"has unknown keys lable; known: x, label, id"),
    ('return {"x": np.zeros((3, 2)), "columns": ["a"]}', r"has 2 columns and 1 different names"),
    ('return {"x": np.zeros((3, 2)), "split": ["train"] * 2}', r"has a split of shape \(2,\)"),
    (
        'return {"x": np.zeros((3, 2)), "split": ["most"] * 3}',
        r"with \['most'\]; expected \(3,\) of",
    ),
    ('return {"x": np.array([[None]])}', r"expected numbers; found object"),
    ('return {"x": 5}', r"N at least 1; found \(\)"),
    ("return 1 / 0", r"failed in .*my_data\.py, line 4: ZeroDivisionError: division by zero"),
    ("raise SystemExit(3)", r"my_data:load ended the process \(3\)"),
]


@pytest.mark.parametrize(("body", "message"), WRONG)
def test_what_goes_wrong_in_it_is_told(body: str, message: str, tmp_path: Path):
    write(tmp_path, body)
    with pytest.raises(UserError, match=message):
        load("my_data:load", tmp_path)


def test_modules_and_functions_that_are_not_there(tmp_path: Path):
    with pytest.raises(UserError, match=r"there is no .*foldr\.py to import it from; did you mean"):
        load("foldr:x", tmp_path)
    write(tmp_path, "return 1")
    with pytest.raises(UserError, match=r"my_data\.py has no function 'laod'"):
        load("my_data:laod", tmp_path)
    (tmp_path / "my_bad.py").write_text("def load(:\n")
    with pytest.raises(UserError, match=r"my_bad:load failed in .*: SyntaxError"):
        load("my_bad:load", tmp_path)


def test_nothing_outside_data_root_is_imported(tmp_path: Path):
    """`os:system` is a module and a function, and no loader of the user's."""
    with pytest.raises(UserError, match=r"there is no .*os\.py to import it from"):
        load("os:system", tmp_path)
