"""Faults that are told to a person."""

from __future__ import annotations

import errno
from pathlib import Path

DEBUG_VARIABLE = "TIGHTBOUND_DEBUG"


class UserError(Exception):
    """A fault that its reader can mend: expected, found, and the params key or file to change."""


def fault_of_the_disk(error: Exception) -> str | None:
    """A sentence for a full disk, or a place where nothing may be written; None for all else."""
    if not isinstance(error, OSError):
        return None
    text, place = str(error), error.filename or "."
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or is_full_disk(text):
        return full_disk(place)
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{place}: {error.strerror}; the project's folder has to be writable"
    return None


def is_full_disk(text: str) -> bool:
    """Whether an error's text, of whatever library, is about a disk without room."""
    return any(sign in text for sign in ("No space left", "disk is full", "Disk quota exceeded"))


def full_disk(place: object) -> str:
    """What a person is told when there is no room at `place`."""
    return (
        f"the disk is full ({place}, {Path.cwd()}); make some space, and the same command goes "
        "on; what was there before is untouched"
    )
