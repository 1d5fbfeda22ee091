"""`module:function`: a loader of the user's own, from a Python file under `data.root`.

The file lies there, beside the data that it reads, because DVC watches that folder: a changed
loader prepares again. `function(root)` gets the folder and returns a mapping of arrays: `x`, and
at will `label`, `id`, `group`, `split` ("train", "valid", "test"), `columns`; docs/data.md.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.params import SOURCE_NAMES, DataParams
from pipeline.prepare.sources.arrays import examples_of
from pipeline.prepare.sources.examples import Examples, data_root, slug
from pipeline.prepare.sources.splits import split_of
from pipeline.stage import UserError
from vae.checks import did_you_mean

KEYS = ("x", "label", "id", "group", "split", "columns")


def load(data: DataParams, scratch: Path) -> Examples:
    """Call the user's function and check what it returns."""
    module, _, function = data.source.partition(":")
    root = data_root(data)
    folder = root if root.is_dir() else root.parent
    result = _call(folder, module, function, data)
    where = f"data.source: what {data.source} returned"
    if not isinstance(result, Mapping) or "x" not in result:
        raise UserError(
            f"{where} is {type(result).__name__}; expected a dict with x and at will "
            f"{', '.join(KEYS[1:])}"
        )
    unknown = sorted(set(map(str, result)) - set(KEYS))
    if unknown:
        raise UserError(f"{where} has unknown keys {', '.join(unknown)}; known: {', '.join(KEYS)}")
    columns = result.get("columns")
    arrays = {k: np.asarray(v) for k, v in result.items() if k != "columns" and v is not None}
    found = examples_of(arrays, where=where, group="group" if "group" in arrays else None)
    return Examples(
        dataset=slug(module),
        x=found.x,
        label=found.label,
        id=found.id,
        split=_split(arrays.get("split"), len(found.x), where),
        group=found.group,
        columns=_columns(columns, found, where),
        classes=found.classes,
    )


def _call(folder: Path, module: str, function: str, data: DataParams) -> Any:
    file = folder.joinpath(*module.split(".")).with_suffix(".py")
    if not file.is_file():
        raise UserError(
            f"data.source: {data.source!r} is no source of ours, and there is no {file} to import "
            f"it from{did_you_mean(module, SOURCE_NAMES)}"
        )
    with _importing_from(folder):
        try:
            loaded = importlib.import_module(module)
            chosen = getattr(loaded, function, None)
            if callable(chosen):
                return chosen(folder)
        except SystemExit as error:
            raise UserError(f"data.source: {data.source} ended the process ({error})") from error
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"data.source: {data.source} failed in {place.filename}, line {place.lineno}: "
                f"{type(error).__name__}: {error}"
            ) from error
    raise UserError(f"data.source: {file} has no function {function!r}")


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Modules come from `folder` first, and leave no bytecode there for DVC to see."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))
        sys.dont_write_bytecode = before


def _split(split: np.ndarray | None, count: int, where: str) -> np.ndarray | None:
    if split is None:
        return None
    split = np.array([split_of(name) or name for name in split.astype(str).reshape(-1).tolist()])
    odd = sorted(set(split.tolist()) - {"train", "valid", "test"})
    if split.shape != (count,) or odd:
        raise UserError(
            f"{where} has a split of shape {split.shape} with {odd or 'the right names'}; expected "
            f'({count},) of "train", "valid" and "test"'
        )
    return split


def _columns(columns: Any, found: Examples, where: str) -> tuple[str, ...] | None:
    if columns is None or found.columns is None:
        return found.columns
    names = tuple(map(str, columns))
    if len(names) != len(found.columns) or len(set(names)) < len(names):
        raise UserError(
            f"{where} has {len(found.columns)} columns and {len(set(names))} different names"
        )
    return names
