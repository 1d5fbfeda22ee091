"""Values against type hints, strictly, and the hints in words for people.

Hints are int, float, bool, str, None, Literal, tuple[X, ...], unions of them, and Annotated with
annotated_types' bounds. Strictly: "3" is no number, true is no 1, and NaN and inf are nothing.
"""

from __future__ import annotations

import types
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import ConfigDict, TypeAdapter, ValidationError

LARGEST_INT = 2**53
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def checked(hint: Any, value: Any) -> Any:
    """The value in its declared type; raises ValueError with what was expected, in words."""
    try:
        found = _adapter(hint).validate_python(value)
    except ValidationError:
        raise ValueError(describe(hint) + _did_you_mean(hint, value)) from None
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        raise ValueError(f"{describe(hint)}, not above {LARGEST_INT}")
    return found


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))


def describe(hint: Any) -> str:
    """What a hint allows: "a whole number at least 1, or null"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = [text for bound in args[1:] if (text := _bound(bound))]
        return " ".join([describe(args[0]), " and ".join(bounds)]).strip()
    if origin in (Union, types.UnionType):
        return ", or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
    if origin is tuple:
        return f"a list with {describe(args[0])} in each place"
    return _WORDS[hint]


def _bound(bound: Any) -> str:
    match bound:
        case Ge(ge=low):
            return f"at least {low}"
        case Gt(gt=low):
            return f"above {low}"
        case Le(le=high):
            return f"at most {high}"
        case Lt(lt=high):
            return f"below {high}"
        case MinLen(min_length=length):
            return f"and at least {length} of them"
    return ""


def shown(value: Any) -> str:
    """A value as params.yaml would write it, short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        text = f"[{', '.join(shown(item) for item in value)}]"
    elif isinstance(value, dict):
        text = f"a mapping with keys {', '.join(map(str, value))}" if value else "an empty mapping"
    else:
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _did_you_mean(hint: Any, value: Any) -> str:
    close = get_close_matches(str(value), [str(name) for name in _names(hint)], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _names(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return [name for arg in get_args(hint) for name in _names(arg)]
    return []
