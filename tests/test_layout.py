"""Where code lives: imports run downwards only, folders stay small, tests lie beside their code."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_FILES = 12

# A stage may use figures, what carries values and files, and, as written here, parts of another.
CARRIERS = {"params", "cluster", "tracking", "stage", "figures"}
STAGES = {"prepare", "selfcheck", "sweep", "train", "evaluate", "register", "report", "score"}
OF_ANOTHER_STAGE = {
    "sweep": {"train"},  # its worker
    "register": {"evaluate", "report"},  # scoring, the model card
    "score": {"prepare", "register"},  # how files are read; how columns are matched
    "prepare": set(),
    "evaluate": set(),
}
ALLOWED = {"torch", "numba", "numpy", "safetensors", "vae"}


def sources(top: str) -> Iterator[Path]:
    yield from (p.relative_to(ROOT) for p in sorted((ROOT / top).rglob("*.py")))


def imports_of(path: Path, source: str) -> set[str]:
    """Modules that a file imports, dotted; a face's lines for type checkers load nothing."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if for_types and path.name == "__init__.py":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(str(node.module))
            if str(node.module) in ("vae", "pipeline"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        waiting += ast.iter_child_nodes(node)
    return found


def room(module: str) -> str | None:
    """vae.evidence.noise → vae.evidence; None for a top alone and for other projects."""
    parts = module.split(".")
    if parts[0] not in ("vae", "pipeline") or len(parts) < 2:
        return None
    place = ROOT / parts[0] / parts[1]
    return ".".join(parts[:2]) if place.is_dir() or place.with_suffix(".py").exists() else None


def graph() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for top in ("vae", "pipeline"):
        for path in sources(top):
            own = room(".".join(path.with_suffix("").parts))
            if own and path.name != "__init__.py":
                targets = {room(m) for m in imports_of(path, (ROOT / path).read_text())}
                found.setdefault(own, set()).update(t for t in targets if t and t != own)
    return found


def test_imports_between_packages_make_no_circle():
    rooms = graph()
    assert len(rooms) > 20
    list(TopologicalSorter(rooms).static_order())
    with pytest.raises(CycleError):
        list(TopologicalSorter({**rooms, "vae.models": {"pipeline.train"}}).static_order())


def test_vae_imports_neither_pipeline_nor_more_than_its_four_packages():
    for path in sources("vae"):
        tops = {m.partition(".")[0] for m in imports_of(path, (ROOT / path).read_text())}
        assert tops <= ALLOWED | set(sys.stdlib_module_names), path


def test_a_stage_uses_parts_of_another_only_where_it_is_written_down():
    for own, targets in graph().items():
        top, _, name = own.partition(".")
        if top == "pipeline" and name in STAGES:
            others = {t.partition(".")[2] for t in targets if t.startswith("pipeline.")}
            assert others <= CARRIERS | OF_ANOTHER_STAGE.get(name, set()), own
        elif top == "pipeline" and name in CARRIERS:
            others = {t.partition(".")[2] for t in targets if t.startswith("pipeline.")}
            assert not others & STAGES, own


def test_only_one_file_of_vae_knows_the_fast_paths():
    """`vae/fast` can be deleted: nothing but its door imports it."""
    users = {
        str(path)
        for path in sources("vae")
        if path.parts[1] != "fast"
        and any(m.startswith("vae.fast") for m in imports_of(path, (ROOT / path).read_text()))
    }
    assert users == {"vae/acceleration.py"}


@pytest.mark.parametrize("top", ["vae", "pipeline", "bench"])
def test_a_folder_holds_few_files(top: str):
    for folder in {path.parent for path in sources(top)} - {Path("pipeline"), Path("bench")}:
        names = [p.name for p in (ROOT / folder).glob("*.py") if p.name != "__init__.py"]
        assert len(names) <= MOST_FILES, folder


@pytest.mark.parametrize("top", ["vae", "pipeline"])
def test_tests_lie_in_folders_that_the_code_has(top: str):
    for path in (ROOT / "tests" / top).rglob("test_*.py"):
        folder = path.parent.relative_to(ROOT / "tests")
        assert (ROOT / folder).is_dir(), path
