"""Files that appear whole or not at all."""

from __future__ import annotations

import ctypes
import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place only if the block succeeds."""
    path = Path(path)
    with scratch_directory(path.parent, path.name) as fresh:
        fresh.chmod(0o755)
        yield fresh
        if not path.exists():
            fresh.rename(path)
        elif not _exchange(fresh, path):
            old = path.with_name(f".old{fresh.name}")
            path.rename(old)
            fresh.rename(path)
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def scratch_directory(parent: str | os.PathLike[str], name: str) -> Iterator[Path]:
    """Yield an empty folder in `parent` that is gone afterwards.

    What killed processes left of the same name goes first: a folder is locked while it is in use.
    """
    parent, prefix = Path(parent), f".tmp-{name}-"
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{glob.escape(prefix)}*"):
        with suppress(OSError):
            lock = _lock(left)
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    folder, lock = _locked_folder(parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new folder and its lock; another process may take one away before it is locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with suppress(BlockingIOError, FileNotFoundError):
            lock = _lock(folder, required=False)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _lock(folder: Path, required: bool = True) -> int:
    """A descriptor that holds a lock on the folder until it is closed, or its process ends.

    Raises BlockingIOError where another holds one, another OSError where the file system has none
    and it is required.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if required or isinstance(error, BlockingIOError):
            os.close(descriptor)
            raise
    return descriptor


def listed(folder: str | os.PathLike[str], pattern: str) -> list[Path]:
    """The finished files in a folder whose names fit `pattern`, sorted; none if it isn't there.

    A name that begins with a point is no file of ours: one half-written (`.tmp-…`), or what an
    editor or another system left (`.#a.py`, `._a.png`).
    """
    return sorted(path for path in Path(folder).glob(pattern) if not path.name.startswith("."))


@contextmanager
def held(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder, which exists, for this process alone.

    Raises BlockingIOError where another process holds it. On a file system without locks it holds
    nothing.
    """
    lock = _lock(Path(folder), required=False)
    try:
        yield
    finally:
        os.close(lock)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step, so that a kill at any moment leaves either whole.

    Linux only (renameat2); False where the system or file system can't.
    """
    at_cwd, exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    return renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
