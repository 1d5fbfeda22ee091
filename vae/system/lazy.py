"""Faces of packages: public names, each imported when it is first asked for.

Torch, Ray and MLflow take seconds to import, and most commands need one of them at most.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def lazy_face(file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of the package whose `__init__.py` is `file`.

    The names are those that the file imports below `if TYPE_CHECKING:`, so what type checkers see
    and what a program gets are written once (PEP 562).
    """
    homes: dict[str, str] = {}
    for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                if isinstance(line, ast.ImportFrom) and line.module:
                    homes |= {alias.name: line.module for alias in line.names}

    def face(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"{Path(file).parent.name} has no public name {name!r}")
        return getattr(import_module(homes[name]), name)

    return face, lambda: sorted(homes)
