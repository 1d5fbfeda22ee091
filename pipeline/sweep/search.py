"""How a sweep searches its space: all points, points drawn at random, or Optuna's proposals.

A trial is described to Tune by its config: {"point", "seed"}, or what Optuna proposed, with the
position of a value instead of the value where an axis is a list.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.params import Axis, Point, Range, SweepParams
from pipeline.sweep.journal import Journal, Trial
from pipeline.sweep.points import draw_points, grid

SCORE = "score"  # what Optuna maximises
LOWEST = -math.inf  # the score of a trial that diverged
SEED_INDEX = "__trial_index__"  # ray.tune.search.repeater.TRIAL_INDEX


@dataclass(frozen=True, kw_only=True)
class Space:
    """The axes, and where a trial's seed counts from."""

    axes: tuple[Axis, ...]
    first_seed: int

    def trial(self, config: Mapping[str, Any]) -> Trial:
        """The trial that a config of Tune stands for."""
        if "trial" in config:
            return Trial(**config["trial"])
        point = {axis.key: _decoded(axis, config[axis.key]) for axis in self.axes}
        return Trial(point=point, seed=self.first_seed + config.get(SEED_INDEX, 0))


def planned(axes: Sequence[Axis], sweep: SweepParams) -> list[Trial] | None:
    """All trials; None where Optuna will propose them."""
    if sweep.search == "optuna":
        return None
    if sweep.search == "random":
        return with_seeds(draw_points(axes, sweep.num_trials, sweep.seed), sweep)
    return with_seeds(grid(axes), sweep)


def with_seeds(points: Sequence[Point], sweep: SweepParams) -> list[Trial]:
    """The trials of these points, each point once before any a second time."""
    return [
        Trial(point=point, seed=sweep.seed + index)
        for index in range(sweep.num_seeds)
        for point in points
    ]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a sweep is to try, made once: all its trials, or a search that will propose points.

    trials: None where Optuna proposes them.
    """

    space: Space
    sweep: SweepParams
    trials: list[Trial] | None

    @classmethod
    def of(cls, axes: tuple[Axis, ...], sweep: SweepParams) -> Plan:
        space = Space(axes=axes, first_seed=sweep.seed)
        return cls(space=space, sweep=sweep, trials=planned(axes, sweep))

    @property
    def num_trials(self) -> int:
        """How many trials there are; fewer under Optuna if it proposes a point twice."""
        if self.trials is None:
            return self.sweep.num_trials * self.sweep.num_seeds
        return len(self.trials)

    def known(self, journal: Journal) -> list[Trial]:
        """All trials or, under Optuna, those of the points that it has proposed so far."""
        if self.trials is not None:
            return self.trials
        return with_seeds(known_points(self.space, journal)[: self.sweep.num_trials], self.sweep)


def is_pinned(axes: Sequence[Axis]) -> bool:
    """Whether there is but one point."""
    return all(axis.size == 1 for axis in axes)


def tune_arguments(
    space: Space, sweep: SweepParams, journal: Journal, todo: Sequence[Trial] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What Tune searches: its `param_space`, and the keys of its `TuneConfig` about the search.

    todo: trials to run; None: those that Optuna proposes.
    """
    from ray import tune

    if todo is not None:
        trials = [{"point": trial.point, "seed": trial.seed} for trial in todo]
        return {"trial": tune.grid_search(trials)}, {}
    search = _optuna_search(space, sweep, journal)
    return {}, {"search_alg": search, "num_samples": sweep.num_trials * sweep.num_seeds}


def _optuna_search(space: Space, sweep: SweepParams, journal: Journal) -> Any:
    """Optuna, told first of the points that an earlier start of the sweep tried, in their order.

    Finished trials answer for themselves at once, so that it learns what it had learned.
    """
    import optuna
    from ray.tune.search import Repeater
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(logging.WARNING)
    known = known_points(space, journal)[: sweep.num_trials]
    search = OptunaSearch(
        space={axis.key: _distribution(axis) for axis in space.axes},
        metric=SCORE,
        mode="max",
        points_to_evaluate=[
            {axis.key: _encoded(axis, point[axis.key]) for axis in space.axes} for point in known
        ],
        # The same seed would draw the first points again.
        seed=sweep.seed + len(known),
    )
    return Repeater(search, repeat=sweep.num_seeds)


def known_points(space: Space, journal: Journal) -> list[Point]:
    """Different points of this space that were tried before, in the order of their start."""
    keys = [axis.key for axis in space.axes]
    points: dict[tuple[Any, ...], Point] = {}
    for name, record in sorted(journal.records.items(), key=lambda item: item[1].number):
        ours = list(record.point) == keys and all(
            record.point[axis.key] in axis for axis in space.axes
        )
        if ours and journal.id(Trial(point=record.point, seed=record.seed)) == name:
            points.setdefault(tuple(record.point.values()), record.point)
    return list(points.values())


def _distribution(axis: Axis) -> Any:
    from optuna import distributions

    found = axis.values
    if not isinstance(found, Range):
        return distributions.CategoricalDistribution(tuple(range(len(found))))
    if found.integer:
        return distributions.IntDistribution(int(found.low), int(found.high), log=found.log)
    return distributions.FloatDistribution(found.low, found.high, log=found.log)


def _encoded(axis: Axis, value: Any) -> Any:
    return value if isinstance(axis.values, Range) else axis.values.index(value)


def _decoded(axis: Axis, value: Any) -> Any:
    return value if isinstance(axis.values, Range) else axis.values[value]
