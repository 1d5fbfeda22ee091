"""The sweep's tables and its choice, from made-up trials whose means and errors are known."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipeline.params import Point
from pipeline.stage import Meta, UserError
from pipeline.sweep import ranking
from pipeline.train import TrainingJob
from vae.models import VAEConfig
from vae.objectives import Objective
from vae.training import TrainingConfig

KEYS = ("model.latent_dim", "model.likelihood", "training.learning_rate")
BITS = math.log(2) * 16  # nats of an example that are 1 bit/dim


def meta(space: str = "grey8") -> Meta:
    shape = (1, 4, 4) if space == "grey8" else (16,)
    return Meta(
        dataset="toy", source="toy", space=space, binarization=None, data_shape=shape,
        counts={"train": 8, "valid": 2, "test": 2}, duplicates={}, own_test_split=False,
        num_classes=None, hash="d" * 64,
    )  # fmt: skip


def point(size: Any, rate: float = 0.01) -> Point:
    return dict(zip(KEYS, (size, "gaussian", rate), strict=True))


def trial(of: Point, seed: int, log_px: float | None, status: str = "ok") -> dict[str, Any]:
    row = {"trial_id": f"{of['model.latent_dim']}-{seed}", **of, "seed": seed, "status": status}
    row["error"] = None if status == "ok" else f"{status} for a reason"
    figures = {"valid_elbo": -99.0, "valid_log_px": log_px, "valid_log_px_se": 4 * BITS}
    return row | (figures if log_px is not None else {}) | {"seconds": 2.0}


def tables(rows: list[dict[str, Any]], space: str = "grey8") -> tuple[list, list, list]:
    found = ranking.points_of(rows, KEYS)
    trials = ranking.trial_rows(rows, found, meta(space))
    return found, trials, ranking.point_rows(trials, found)


def test_points_are_ranked_by_the_mean_over_their_seeds():
    small, large = point(2), point(8)
    rows = [trial(small, 0, -3 * BITS), trial(large, 0, -1 * BITS)]
    rows += [trial(small, 1, -3 * BITS), trial(large, 1, -4 * BITS)]
    _, trials, points = tables(rows)
    assert [row["point"] for row in trials] == [1, 2, 1, 2]
    assert [row["valid_bits_per_dim"] for row in trials] == pytest.approx([3, 1, 3, 4])
    assert [(row["rank"], row["latent_dim"]) for row in points] == [(1, 8), (2, 2)]
    best = points[0]
    assert best["valid_bits_per_dim"] == pytest.approx(2.5)
    # two values at a distance of 3: their mean's standard error is half of that
    assert best["valid_bits_per_dim_seed_se"] == pytest.approx(1.5)
    assert best["valid_bits_per_dim_se"] == pytest.approx(4)
    assert (best["num_seeds"], best["seconds"], best["trial_id"]) == (2, 4.0, "8-0")
    assert ranking.score_of(best) == "2.5000 ± 1.5000 bits/dim over 2 seeds"


def test_one_seed_has_no_error_over_seeds():
    _, _, points = tables([trial(point(2), 0, -BITS)])
    assert points[0]["valid_bits_per_dim_seed_se"] is None
    assert ranking.score_of(points[0]) == "1.0000 ± 4.0000 bits/dim"


@pytest.mark.parametrize("status", ["diverged", "died", "stopped"])
def test_a_point_without_all_its_seeds_is_not_ranked(status: str):
    """The best of what is left would be judged by its luck."""
    lucky, plain = point(2), point(8)
    rows = [trial(lucky, 0, -1 * BITS), trial(plain, 0, -3 * BITS)]
    rows += [trial(lucky, 1, None, status), trial(plain, 1, -3 * BITS)]
    _, trials, points = tables(rows)
    assert [(row["rank"], row["status"]) for row in points] == [(1, "ok"), (None, status)]
    assert ranking.choose(points, trials)["latent_dim"] == 8
    assert points[1]["valid_log_px"] is None


def test_an_infinite_likelihood_is_not_ranked():
    _, trials, points = tables([trial(point(2), 0, math.inf), trial(point(8), 0, -BITS)])
    assert ranking.choose(points, trials)["latent_dim"] == 8


def test_no_point_left_says_why():
    _, trials, points = tables([trial(point(2), 0, None, "died"), trial(point(8), 0, math.nan)])
    with pytest.raises(UserError, match=r"none of the sweep's 2 points .* died for a reason"):
        ranking.choose(points, trials)


def test_continuous_data_are_ranked_in_nats():
    _, _, points = tables([trial(point(2), 0, -20.0), trial(point(8), 0, -10.0)], "continuous")
    assert [row["latent_dim"] for row in points] == [8, 2]
    assert points[0]["valid_bits_per_dim"] is None
    assert ranking.score_of(points[0]).startswith("10.00 ± ")


def test_best_json_holds_the_model_and_the_swept_training_keys():
    job = TrainingJob(
        model=VAEConfig(data_shape=(1, 4, 4), space="grey8", latent_dim=1, likelihood="gaussian"),
        objective=Objective(beta=0.5),
        training=TrainingConfig(epochs=3, learning_rate=1.0),
    )
    found, _, points = tables([trial(point((3, 2), 0.25), 0, -BITS)])
    best = ranking.best_config(job, found[0], points[0], meta())
    assert best["model"]["latent_dim"] == [3, 2]
    assert best["objective"]["beta"] == 0.5
    assert best["training"] == {"learning_rate": 0.25}
    assert (best["selected_by"], best["trial_id"]) == ("valid_bits_per_dim", "(3, 2)-0")
    assert best["score"] == pytest.approx(1.0)
    assert points[0]["latent_dim"] == "[3, 2]"  # as a table shows it
