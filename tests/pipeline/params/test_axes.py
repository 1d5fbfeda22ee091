"""Axes and points of a sweep."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from pipeline.params import Axis, Point, Range, combinations, describe, read_axis, section_values
from pipeline.sweep import draw_points, grid

LATENT = Axis(key="model.latent_dim", values=(2, (4, 2)))
NAMES = Axis(key="model.likelihood", values=("gaussian", "laplace"))
RATE = Axis(
    key="training.learning_rate",
    values=Range(low=1e-4, high=1e-1, integer=False, log=True),
)


def whole(low: int, high: int, *, log: bool) -> Axis:
    return Axis(key="training.batch_size", values=Range(low=low, high=high, integer=True, log=log))


def draws(axis: Axis, count: int = 4000) -> list[float]:
    generator = np.random.default_rng(0)
    return [axis.draw(generator) for _ in range(count)]


def test_a_grid_is_every_combination_the_last_axis_fastest():
    assert grid([LATENT, NAMES]) == [
        {"model.latent_dim": 2, "model.likelihood": "gaussian"},
        {"model.latent_dim": 2, "model.likelihood": "laplace"},
        {"model.latent_dim": (4, 2), "model.likelihood": "gaussian"},
        {"model.latent_dim": (4, 2), "model.likelihood": "laplace"},
    ]


def test_a_log_uniform_range_is_uniform_in_the_logarithm():
    logs = [math.log10(value) for value in draws(RATE)]
    assert stats.kstest(logs, stats.uniform(-4, 3).cdf).pvalue > 0.01


def test_a_uniform_range_is_uniform():
    axis = Axis(key="objective.beta", values=Range(low=0.5, high=2.0, integer=False, log=False))
    assert stats.kstest(draws(axis), stats.uniform(0.5, 1.5).cdf).pvalue > 0.01


def test_whole_numbers_are_drawn_alike_and_the_ends_too():
    counts = Counter(draws(whole(3, 6, log=False)))
    assert sorted(counts) == [3, 4, 5, 6]
    assert stats.chisquare(list(counts.values())).pvalue > 0.01


def test_whole_numbers_by_their_logarithm():
    """A number's share is the length of log(n - 1/2) … log(n + 1/2)."""
    counts = Counter(draws(whole(1, 8, log=True)))
    total = math.log(8.5 / 0.5)
    expected = [4000 * math.log((n + 0.5) / (n - 0.5)) / total for n in range(1, 9)]
    assert stats.chisquare([counts[n] for n in range(1, 9)], expected).pvalue > 0.01


def test_drawn_points_differ_and_more_of_them_begin_with_the_same():
    axes = [LATENT, NAMES, RATE]
    few, many = draw_points(axes, 5, seed=3), draw_points(axes, 20, seed=3)
    assert many[:5] == few
    assert len({tuple(point.values()) for point in many}) == 20
    assert draw_points(axes, 5, seed=4) != few


def test_a_small_space_is_drawn_whole():
    axes = [NAMES, whole(3, 5, log=False)]
    found = draw_points(axes, 100, seed=0)
    expected = [
        {"model.likelihood": name, "training.batch_size": size}
        for name in ("gaussian", "laplace")
        for size in (3, 4, 5)
    ]
    assert found == expected
    assert len(draw_points(axes, 4, seed=0)) == 4


def test_the_ends_of_ranges_are_what_is_checked():
    found = list(combinations([NAMES, RATE]))
    assert [point["training.learning_rate"] for point in found] == [1e-4, 1e-1, 1e-4, 1e-1]


@pytest.mark.parametrize(
    ("axis", "inside", "outside"),
    [(LATENT, (4, 2), (2, 4)), (RATE, 1e-4, 2e-1), (whole(2, 4, log=True), 4, 5)],
)
def test_what_an_axis_holds(axis: Axis, inside: object, outside: object):
    assert inside in axis
    assert outside not in axis


def test_sizes():
    assert [axis.size for axis in (LATENT, RATE, whole(3, 9, log=True))] == [2, math.inf, 7]


def test_values_take_their_type():
    assert read_axis("objective.beta", (1, 0.5), float).values == (1.0, 0.5)
    found = read_axis("training.batch_size", {"log_integer": (8, 64)}, int)
    assert found.values == Range(low=8, high=64, integer=True, log=True)
    found = read_axis("training.gradient_clip", (None, 1), float | None)
    assert found.values == (None, 1.0)


def test_a_point_by_sections_and_in_words():
    point: Point = {
        "model.latent_dim": (4, 2),
        "model.likelihood": "gaussian",
        "model.hidden": (8, 8),
        "training.learning_rate": 0.00312345,
    }
    assert section_values(point, "training") == {"learning_rate": 0.00312345}
    assert section_values(point, "objective") == {}
    assert (
        describe(point)
        == "gaussian, [4, 2] latent dimensions, hidden [8, 8], learning_rate 0.003123"
    )
