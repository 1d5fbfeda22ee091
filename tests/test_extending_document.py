"""docs/extending.md: its blocks of Python, run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vae.models import LIKELIHOODS

ROOT = Path(__file__).parents[1]


def test_every_example_of_the_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 6
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(LIKELIHOODS, "logistic", LIKELIHOODS["laplace"])  # taken away at the end
    names: dict[str, Any] = {"__name__": "extending", "PARAMS": ROOT / "params.yaml"}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"docs/extending.md, block {number}", "exec"), names)
    assert LIKELIHOODS["logistic"] is names["Logistic"]
