"""Each bad data set is refused in a sentence, and what was prepared before stays as it was."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torchvision.datasets import MNIST

from pipeline.prepare import prepare
from pipeline.stage import UserError, load_meta
from tests.pipeline.bad_data import BAD_DATA, BadData
from tests.pipeline.builders import DATA, prepared_data


def test_there_are_enough():
    assert len(BAD_DATA) >= 40
    assert len({bad.name for bad in BAD_DATA}) == len(BAD_DATA)


@pytest.mark.parametrize("bad", BAD_DATA, ids=lambda bad: bad.name)
def test_bad_data_is_told_and_earlier_output_stays(
    bad: BadData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    out = tmp_path / "data" / "prepared"
    before = prepared_data(out)
    keys = bad.write(tmp_path)
    keys |= {"columns": tuple(keys["columns"])} if "columns" in keys else {}
    try:
        with pytest.raises(UserError, match=bad.message) as caught:
            prepare(replace(DATA, **keys), out)
    finally:
        sys.modules.pop("my_loader", None)
    assert str(caught.value).startswith("data.")
    assert len(str(caught.value).splitlines()) == 1
    assert load_meta(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["prepared"]
    assert not Path("/tmp/tightbound-was-here").exists()
