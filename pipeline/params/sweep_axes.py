"""The axes of a sweep: which values each swept key of params.yaml takes.

An axis is a list of values or a range to draw from. A point of the sweep has a value for each
axis: {"model.latent_dim": 16, "model.likelihood": "gaussian", "training.learning_rate": 0.002}.
"""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

import numpy as np

from pipeline.params.value_types import checked, shown

Point = dict[str, Any]

LATENT_DIM, LIKELIHOOD = "model.latent_dim", "model.likelihood"
# kind → (of whole numbers, by its logarithm)
RANGES = {
    "uniform": (False, False),
    "log_uniform": (False, True),
    "integer": (True, False),
    "log_integer": (True, True),
}
MOST_COMBINATIONS = 4096  # that are checked before the sweep starts


@dataclass(frozen=True, kw_only=True)
class Range:
    """All numbers from low to high, both included; log: each factor counts alike."""

    low: float
    high: float
    integer: bool
    log: bool


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A swept key, `section.name`, and its values."""

    key: str
    values: tuple[Any, ...] | Range

    @property
    def size(self) -> float:
        """How many values there are; infinite for a range of real numbers."""
        if not isinstance(self.values, Range):
            return len(self.values)
        return self.values.high - self.values.low + 1 if self.values.integer else math.inf

    def to_json(self) -> Any:
        """The values, or a range's ends and kind."""
        return vars(self.values) if isinstance(self.values, Range) else list(self.values)

    @property
    def probes(self) -> tuple[Any, ...]:
        """All values of a list, the ends of a range: what is checked in combination."""
        if isinstance(self.values, Range):
            return (self.values.low, self.values.high)
        return self.values

    def __contains__(self, value: Any) -> bool:
        if isinstance(self.values, Range):
            return self.values.low <= value <= self.values.high
        return value in self.values

    def draw(self, generator: np.random.Generator) -> Any:
        """A value at random."""
        found = self.values
        if not isinstance(found, Range):
            return found[generator.integers(len(found))]
        if found.integer and not found.log:
            return int(generator.integers(int(found.low), int(found.high), endpoint=True))
        # A whole number stands for the interval around it, so that the ends get their share.
        half = 0.5 if found.integer else 0.0
        low, high = found.low - half, found.high + half
        if found.log:
            value = math.exp(generator.uniform(math.log(low), math.log(high)))
        else:
            value = generator.uniform(low, high)
        value = round(value) if found.integer else float(f"{value:.6g}")
        return min(max(value, found.low), found.high)


def read_axis(key: str, value: Any, hint: Any) -> Axis:
    """An axis from params.yaml: a list of values, or {kind of range: [low, high]}.

    hint: the type of the key. Raises ValueError saying what was expected.
    """
    if isinstance(value, Mapping):
        return Axis(key=key, values=_read_range(value, hint))
    if not isinstance(value, tuple) or not value:
        raise ValueError(
            f"expected a list of one or more values, or a range such as {_example(hint)}, "
            f"got {shown(value)}"
        )
    found = tuple(checked(hint, item) for item in value)
    if len(set(found)) < len(found):
        raise ValueError(f"expected each value once, got {shown(value)}")
    return Axis(key=key, values=found)


def _read_range(value: Mapping[str, Any], hint: Any) -> Range:
    number = _number_type(hint)
    if number is None:
        raise ValueError(f"expected a list of values, since it is no number, got {_written(value)}")
    kinds = [kind for kind, (whole, _) in RANGES.items() if whole == (number is int)]
    kind, ends = next(iter(value.items()), ("", None))
    expected = f"a list of values, or one of {', '.join(kinds)} with [low, high]"
    if len(value) != 1 or kind not in kinds:
        raise ValueError(f"expected {expected}, got {_written(value)}")
    if not isinstance(ends, tuple) or len(ends) != 2:
        raise ValueError(f"expected [low, high] for {kind}, got {shown(ends)}")
    low, high = (checked(hint, end) for end in ends)
    _, log = RANGES[kind]
    if not (isinstance(low, (int, float)) and isinstance(high, (int, float)) and low < high):
        raise ValueError(f"expected [low, high] with low below high for {kind}, got {shown(ends)}")
    if log and low <= 0:
        raise ValueError(f"expected low above 0 for {kind}, got {shown(low)}")
    return Range(low=low, high=high, integer=number is int, log=log)


def _number_type(hint: Any) -> type | None:
    """int or float where a hint allows one of them, whatever else it allows."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _number_type(get_args(hint)[0])
    if origin in (Union, types.UnionType):
        found = [_number_type(arg) for arg in get_args(hint)]
        return next((kind for kind in found if kind is not None), None)
    return hint if hint in (int, float) else None


def _example(hint: Any) -> str:
    whole = _number_type(hint) is int
    return "{log_integer: [2, 64]}" if whole else "{log_uniform: [0.001, 0.1]}"


def _written(value: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{kind}: {shown(ends)}" for kind, ends in value.items()) + "}"


def combinations(axes: Sequence[Axis]) -> Iterator[Point]:
    """Combinations to check before the sweep: all of short lists, the ends of ranges."""
    product = itertools.product(*(axis.probes for axis in axes))
    for values in itertools.islice(product, MOST_COMBINATIONS):
        yield {axis.key: value for axis, value in zip(axes, values, strict=True)}


def section_values(point: Mapping[str, Any], section: str) -> dict[str, Any]:
    """A point's values of one section of params.yaml, by their names in it."""
    found = ((key.partition("."), value) for key, value in point.items())
    return {name: value for (head, _, name), value in found if head == section}


def describe(point: Mapping[str, Any]) -> str:
    """A point in words: "gaussian, 16 latent dimensions, learning_rate 0.002"."""
    rest = {k: v for k, v in point.items() if k not in (LATENT_DIM, LIKELIHOOD)}
    words = [f"{point[LIKELIHOOD]}, {shown(point[LATENT_DIM])} latent dimensions"]
    return ", ".join(
        [*words, *(f"{key.partition('.')[2]} {in_words(value)}" for key, value in rest.items())]
    )


def in_words(value: Any) -> str:
    """A value as params.yaml would write it, but names without quotes and numbers short."""
    if isinstance(value, str):
        return value
    return f"{value:.4g}" if isinstance(value, float) else shown(value)
