"""Faults of a configuration, in one wording."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any


def did_you_mean(word: Any, known: Iterable[str], prefix: str = "") -> str:
    """ "; did you mean …?" of the nearest known name, or nothing where none is near."""
    near = get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def check_name(key: str, value: Any, known: Iterable[str]) -> Iterator[str]:
    """Yield a fault, with the nearest valid name, unless `value` is one of `known`."""
    names = list(known)
    if value not in names:
        hint = did_you_mean(value, names)
        yield f"{key}: {value!r} is unknown, known: {', '.join(names)}{hint}"
