"""params.yaml without torch: the same sections, and the whole file is checked all the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.params import load_params, load_plain_params, remembered_as_right
from pipeline.stage import UserError

ROOT = Path(__file__).parents[3]
TELL = """
import sys
import pipeline.prepare.__main__, pipeline.register.__main__, pipeline.report.__main__
from pipeline.params import load_plain_params
print(load_plain_params().data.source, "torch" in sys.modules)
"""


@pytest.fixture(autouse=True)
def params_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return tmp_path / "params.yaml"


def test_sections_are_the_same_whether_known_as_right_or_not() -> None:
    whole = asdict(load_params())
    for found in (load_plain_params(), load_plain_params()):
        assert whole.items() >= asdict(found).items()


def test_a_file_thatis_known_as_right_is_read_without_torch(params_file: Path) -> None:
    def told() -> list[str]:
        process = subprocess.run(
            [sys.executable, "-c", TELL],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        return process.stdout.split()

    source = load_params().data.source
    assert told() == [source, "True"]
    assert told() == [source, "False"]
    params_file.write_text(params_file.read_text() + "\n# changed\n")
    assert told() == [source, "True"]


def test_a_fault_of_a_section_that_needs_torch_is_told(params_file: Path) -> None:
    with remembered_as_right():
        load_params()
    assert load_plain_params().data.source
    text = params_file.read_text()
    params_file.write_text(text.replace("  optimizer: adam", "  optimizer: adamm"))
    with pytest.raises(UserError, match=r"training\.optimizer: .*did you mean adam\?"):
        load_plain_params()
    with pytest.raises(UserError, match=r"training\.optimizer"):  # nothing wrong was remembered
        load_plain_params()


def test_a_file_that_changes_while_it_is_checked_is_not_known_as_right(params_file: Path) -> None:
    text = params_file.read_text()
    with remembered_as_right():
        load_params()
        params_file.write_text(text.replace("  optimizer: adam", "  optimizer: adamm"))
    with pytest.raises(UserError, match=r"training\.optimizer"):
        load_plain_params()
    params_file.write_text(text)
    assert load_plain_params().data.source
