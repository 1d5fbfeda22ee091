"""The points of a sweep: the whole grid, or draws from it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pipeline.params import Axis, Point, Range


def grid(axes: Sequence[Axis]) -> list[Point]:
    """Every combination of the axes' values, the last axis fastest; each must be a list."""
    keys = [axis.key for axis in axes]
    lists = [axis.values for axis in axes if not isinstance(axis.values, Range)]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*lists)]


def draw_points(axes: Sequence[Axis], count: int, seed: int) -> list[Point]:
    """`count` different points at random, or all of them where there are no more."""
    if math.prod(axis.size for axis in axes) <= count:
        return grid([Axis(key=axis.key, values=tuple(_all_values(axis))) for axis in axes])
    generator = np.random.default_rng(seed)
    points: dict[tuple[Any, ...], Point] = {}
    while len(points) < count:
        point = {axis.key: axis.draw(generator) for axis in axes}
        points.setdefault(tuple(point.values()), point)
    return list(points.values())


def _all_values(axis: Axis) -> Iterable[Any]:
    if isinstance(axis.values, Range):
        return range(int(axis.values.low), int(axis.values.high) + 1)
    return axis.values
