"""Splits that a source brings of its own, found by the names of its folders, files and arrays."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.prepare.sources.examples import files_of, some
from pipeline.stage import UserError

WORDS = {
    "train": ("train", "training", "trn", "tr"),
    "valid": ("valid", "validation", "validate", "val", "dev", "development"),
    "test": ("test", "testing", "tst", "te", "eval", "evaluation"),
}
_SPLITS = {word: split for split, words in WORDS.items() for word in words}
SPLIT_ORDER = tuple(WORDS)


def split_of(name: str) -> str | None:
    """The split that a name means, whatever its case: "Training" is train; None for others."""
    return _SPLITS.get(name.casefold())


def split_within(name: str) -> str | None:
    """The split that one word of a name means: "x_train", "mnist-test"; None for none or two."""
    found = {split for word in re.split(r"[^0-9a-zA-Z]+", name) if (split := split_of(word))}
    return found.pop() if len(found) == 1 else None


def split_names(names: Iterable[str], where: str) -> dict[str, str] | None:
    """Which split each of some folders is, or None where they are no splits.

    They are where one is train and another test or valid. Raises UserError where others lie beside
    them, or two are one split: pictures of a test split must not be trained on in silence.
    """
    names = sorted(names)
    found = {name: split for name in names if (split := split_of(name))}
    splits = set(found.values())
    if not ("train" in splits and len(splits) > 1):
        if {"valid", "test"} <= splits:
            raise UserError(
                f"{where}: {some(map(repr, found))} are names of splits, and none of "
                f"{some(map(repr, names))} is the training split; name it train"
            )
        return None
    for split in splits:
        same = [name for name in found if found[name] == split]
        if len(same) > 1:
            raise UserError(f"{where}: {some(map(repr, same))} are both the {split} split; keep "
                            "one")  # fmt: skip
    others = [name for name in names if name not in found]
    if others:
        raise UserError(
            f"{where}: {some(map(repr, others))} beside the splits {some(map(repr, found))}; is it "
            "data of one of them? Move it there, or away"
        )
    return found


def split_files(root: Path, suffixes: tuple[str, ...], what: str) -> list[tuple[str | None, Path]]:
    """The data files of `root`, a file or a folder, each with its split, in their order.

    A split is a file whose name has the word in it (train.csv, set-test.parquet), or a folder of
    files. Raises UserError where there are none, or it is in doubt which split a file is of.
    """
    where = f"data.root: {root}"
    if not root.is_dir():
        return [(None, root)]
    folders = {
        path.name: path
        for path in sorted(root.iterdir())
        if path.is_dir() and not path.name.startswith(".") and _holds(path, suffixes)
    }
    direct = [path for path in sorted(root.iterdir()) if _is_data(path, suffixes)]
    named = {name: path for name, path in folders.items() if split_of(name)}
    if named:
        beside = [path.name for path in direct]
        splits = split_names([*folders, *beside], where)
        if splits is not None:
            return [
                (splits[name], file)
                for name in sorted(named, key=lambda name: SPLIT_ORDER.index(splits[name]))
                for file in files_of(named[name], suffixes, what)
            ]
    files = files_of(root, suffixes, what)
    found = {path: split_within(path.stem) for path in files}
    splits = set(found.values())
    if not ("train" in splits and splits & {"test", "valid"}):
        return [(None, path) for path in files]
    others = [path.name for path in files if found[path] is None]
    if others:
        told = [path.name for path in files if found[path]]
        raise UserError(
            f"{where}: {some(map(repr, others))} beside the splits {some(map(repr, told))}; is it "
            "data of one of them? Give it that word in its name, or move it away"
        )
    return [(found[path], path) for path in files]


def file_name(path: Path, root: Path) -> str:
    """What a file is called in the ids of its rows: its place below `root`, without suffix."""
    return "-".join(path.relative_to(root).with_suffix("").parts)


def _is_data(path: Path, suffixes: Sequence[str]) -> bool:
    hidden = path.name.startswith(".")
    return path.suffix.lower() in suffixes and not hidden and path.is_file()


def _holds(folder: Path, suffixes: Sequence[str]) -> bool:
    return any(_is_data(path, suffixes) for path in folder.iterdir())
