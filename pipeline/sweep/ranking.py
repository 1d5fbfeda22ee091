"""The sweep's results: trials.csv, points.csv and the point that is handed on.

A point is as good as the importance-sampled log-likelihood of the validation split, the mean over
its seeds. Two errors, never mixed: `…_se` across images, the same for all trials, and `…_seed_se`
over the seeds, empty where there is one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.params import LATENT_DIM, LIKELIHOOD, Point, section_values, shown
from pipeline.stage import Meta, UserError
from pipeline.sweep.journal import Trial, job_at
from pipeline.train import TrainingJob

FIGURES = ("valid_elbo", "valid_log_px", "valid_log_px_se")
BITS = (("valid_bits_per_dim", ""), ("valid_bits_per_dim_se", "_se"))  # each with its end
REST = ("khat_bad_fraction", "num_samples", "seconds")
PINNED = "pinned"

Row = dict[str, Any]


def column(key: str) -> str:
    """A swept key's column: latent_dim and likelihood without their section."""
    return key.partition(".")[2] if key in (LATENT_DIM, LIKELIHOOD) else key


def points_of(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[Point]:
    """The different points of the trials, in the order in which they come."""
    points: dict[tuple[Any, ...], Point] = {}
    for row in rows:
        values = tuple(row[key] for key in keys)
        points.setdefault(values, dict(zip(keys, values, strict=True)))
    return list(points.values())


def trial_rows(rows: Sequence[Mapping[str, Any]], points: Sequence[Point], meta: Meta) -> list[Row]:
    """trials.csv: one row a trial; `point` counts from 1."""
    found: list[Row] = []
    for row in rows:
        point = {key: row[key] for key in points[0]}
        own: Row = {"trial_id": row["trial_id"], "point": 1 + points.index(point)}
        own |= {column(key): _cell(value) for key, value in point.items()}
        own |= {name: row.get(name) for name in ("seed", "status", "error", "epochs", *FIGURES)}
        own |= {name: _in_bits(row.get(f"valid_log_px{end}"), end, meta) for name, end in BITS}
        found.append(own | {name: row.get(name) for name in REST})
    return found


def _in_bits(nats: float | None, end: str, meta: Meta) -> float | None:
    """log p(x) of an example, or its error, in bits/dim; None for data that have no such unit."""
    if nats is None or meta.space == "continuous":
        return None
    return (nats if end else -nats) / (math.prod(meta.data_shape) * math.log(2))


def point_rows(trials: Sequence[Row], points: Sequence[Point]) -> list[Row]:
    """points.csv: one row a point, best first; last, unranked, those without all their seeds."""
    found = [
        _point_row(number, point, [row for row in trials if row["point"] == number])
        for number, point in enumerate(points, start=1)
    ]
    ranked = [row for row in found if _is_finite(row["valid_log_px"])]
    ranked.sort(key=lambda row: -row["valid_log_px"])
    for rank, row in enumerate(ranked, start=1):
        row["rank"] = rank
    return ranked + [row for row in found if row["rank"] is None]


def _point_row(number: int, point: Point, trials: Sequence[Row]) -> Row:
    statuses = [row["status"] for row in trials]
    complete = set(statuses) <= {"ok", PINNED}

    def mean(name: str) -> float | None:
        values = [row[name] for row in trials if row[name] is not None]
        return statistics.fmean(values) if values and complete else None

    def seed_error(name: str) -> float | None:
        values = [row[name] for row in trials if row[name] is not None]
        if len(values) < 2 or not complete:
            return None
        return statistics.stdev(values) / math.sqrt(len(values))

    row: Row = {"rank": None, "point": number, "trial_id": trials[0]["trial_id"]}
    row |= {column(key): _cell(value) for key, value in point.items()}
    row["status"] = next((s for s in statuses if s not in ("ok", PINNED)), statuses[0])
    row["num_seeds"] = len(trials)
    row |= {name: mean(name) for name in (*FIGURES, *(name for name, _ in BITS))}
    row |= {f"{name}_seed_se": seed_error(name) for name in ("valid_log_px", "valid_bits_per_dim")}
    row["khat_bad_fraction"] = mean("khat_bad_fraction")
    row["seconds"] = sum(row["seconds"] or 0.0 for row in trials)
    return row


def choose(points: Sequence[Row], trials: Sequence[Row]) -> Row:
    """The best point's row. Raises UserError where no point has all its trials."""
    best = points[0]
    if best["status"] == PINNED or best["rank"] is not None:
        return best
    reason = next((row["error"] for row in trials if row["error"]), "no finite likelihood")
    raise UserError(
        f"none of the sweep's {len(points)} points has a result; the first trial's reason: {reason}"
    )


def best_config(job: TrainingJob, point: Point, best: Row, meta: Meta) -> dict[str, Any]:
    """best.json: a complete model and objective, the training keys that were swept, the score.

    score: the mean over the seeds of bits/dim, or of -log p(x) in nats; smaller is better.
    """
    chosen = job_at(job, Trial(point=point, seed=job.training.seed))
    discrete = meta.space != "continuous"
    found: dict[str, Any] = {
        "model": chosen.model.to_dict(),
        "objective": vars(chosen.objective),
        "training": section_values(point, "training"),
        "selected_by": "valid_bits_per_dim" if discrete else "valid_nll",
    }
    if best["status"] == PINNED:
        return found | {"score": None, "trial_id": None, "point": None}
    score = best["valid_bits_per_dim"] if discrete else -best["valid_log_px"]
    return found | {"score": score, "trial_id": best["trial_id"], "point": best["point"]}


def score_of(best: Row) -> str:
    """A point's score in words: "2.0413 ± 0.0021 bits/dim over 3 seeds"."""
    name, sign, digits, unit = "valid_log_px", -1, 2, "nats"
    if best["valid_bits_per_dim"] is not None:
        name, sign, digits, unit = "valid_bits_per_dim", 1, 4, "bits/dim"
    several = best[f"{name}_seed_se"] is not None
    error = best[f"{name}_seed_se" if several else f"{name}_se"]
    over = f" over {best['num_seeds']} seeds" if several else ""
    return f"{sign * best[name]:.{digits}f} ± {error:.{digits}f} {unit}{over}"


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _cell(value: Any) -> Any:
    return shown(value) if isinstance(value, tuple) else value
