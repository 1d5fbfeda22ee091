"""Values against type hints, strictly, and the hints in words for people.

Hints are int, float, bool, str, None, Literal, tuple[X, ...], dict, unions of them, and Annotated
with annotated_types' bounds. Strictly: "3" is no number, true is no 1, and NaN and inf are nothing.
"""

from __future__ import annotations

import types
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError

from vae.checks import did_you_mean

LARGEST_INT = 2**53
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def checked(hint: Any, value: Any) -> Any:
    """The value in its declared type; raises ValueError "expected …, got …"."""
    try:
        found = _adapter(hint).validate_python(value)
    except ValidationError:
        near = did_you_mean(value, _literals(hint))
        raise ValueError(f"expected {describe(hint)}, got {shown(value)}{near}") from None
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        raise ValueError(f"expected {describe(hint)}, got {shown(value)}, which is too large")
    return found


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))


def describe(hint: Any) -> str:
    """What a hint allows: "a whole number, at least 1, or null"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        if get_origin(args[0]) is tuple:
            return describe(args[0]).replace("a list", "a list of one or more", 1)
        return describe(args[0]) + _bounds(args[1:])
    if origin in (Union, types.UnionType):
        return ", or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is tuple:
        count = "" if Ellipsis in args else f" of {len(args)}"
        return f"a list{count} (each {describe(args[0])})"
    if origin is dict:
        return "a mapping"
    return _WORDS[hint]


def _bounds(bounds: tuple[Any, ...]) -> str:
    low = high = ""
    for bound in bounds:
        match bound:
            case Ge(ge=value):
                low = f"at least {value}"
            case Gt(gt=value):
                low = f"above {value}"
            case Le(le=value):
                high = f"at most {value}"
            case Lt(lt=value):
                high = f"below {value}"
    return " " + " and ".join(filter(None, (low, high))) if low or high else ""


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


def _literals(hint: Any) -> list[str]:
    """The names that a hint allows."""
    if get_origin(hint) is Literal:
        return [str(name) for name in get_args(hint)]
    if get_origin(hint) in (Union, types.UnionType):
        return [name for arg in get_args(hint) for name in _literals(arg)]
    return []
