"""docs/theory.md names functions and tests: each must exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
THEORY = ROOT / "docs" / "theory.md"


def definitions(path: Path) -> set[str]:
    """Functions, classes and methods ("Class.method") of a file."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
            found |= {f"{node.name}.{method}" for method in methods}
    return found


def missing_names(text: str) -> list[str]:
    """Every name in "Computed by" and "Proved by" items that the file beside it doesn't define."""
    missing = []
    for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        if test not in definitions(ROOT / file):
            missing.append(f"{file}::{test}")
    for file, first, others in re.findall(
        r"`(vae/[\w/]+\.py): ([\w.]+)`((?:,\s+`\w[\w.]*`)*)", text
    ):
        for name in [first, *re.findall(r"`([\w.]+)`", others)]:
            if name not in definitions(ROOT / file):
                missing.append(f"{file}: {name}")
    return missing


def test_every_function_and_test_that_the_theory_names_exists():
    assert missing_names(THEORY.read_text()) == []


def test_every_section_names_a_function_and_a_test():
    sections = re.split(r"^## ", THEORY.read_text(), flags=re.MULTILINE)[1:]
    assert len(sections) == 12
    for section in sections:
        assert section.count("- Computed by") == section.count("- Proved by") >= 1, section[:40]


def test_every_picture_exists():
    names = re.findall(r"\]\((\w+\.png)\)", THEORY.read_text())
    assert len(names) == 2
    assert all((THEORY.parent / name).stat().st_size > 1000 for name in names)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "`tests/vae/models/test_model.py::test_nothing`",
            "tests/vae/models/test_model.py::test_nothing",
        ),
        ("`vae/models/vae.py: VAE.forward`, `VAE.nothing`", "vae/models/vae.py: VAE.nothing"),
        ("`vae/models/vae.py: nothing`", "vae/models/vae.py: nothing"),
    ],
)
def test_a_wrong_name_is_found(text, name):
    assert missing_names(text) == [name]
