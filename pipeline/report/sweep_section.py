"""The report's part about the sweep: points, best first, and how sure their order is."""

from __future__ import annotations

from typing import Any

import pandas as pd

from pipeline.figures import plots
from pipeline.report import words as text
from pipeline.report.inputs import Inputs
from pipeline.report.sections import drawing, records


def sweep_section(inputs: Inputs) -> dict[str, Any]:
    points, trials, unit = _scored(inputs), inputs.trials, inputs.unit
    digits = 3 if unit == "bits/dim" else 1
    keys = [str(name) for name in points if "." in str(name)]
    seeds = max(row["num_seeds"] for row in records(points))
    rows = [
        {
            "latent": row["latent_dim"],
            "likelihood": row["likelihood"],
            "settings": ", ".join(text.plain(row[key]) for key in keys),
            "score": f"{text.number(row['score'], digits)} ± {text.number(row['error'], digits)}"
            if row["status"] == "ok"
            else row["status"],
            "elbo": text.number(row["valid_elbo"], 1),
            "khat": text.percent(row["khat_bad_fraction"]),
            "best": row["trial_id"] == inputs.best.get("trial_id"),
        }
        for row in records(points)
    ]
    failures = [
        f"{row['likelihood']}, latent dimension {row['latent_dim']}"
        f"{_seed(row, seeds)}: {row['error']}"
        for row in records(trials)
        if row["status"] in plots.FAILED
    ]
    figure = drawing(
        plots.sweep_figure(points, unit),
        "sweep",
        "Latent dimension by likelihood",
        _caption(seeds) + (" Each dot is the best over the other swept keys." if keys else ""),
    )
    return {
        "words": _words(inputs, points, seeds),
        "unit": unit,
        "swept": ", ".join(key.partition(".")[2] for key in keys),
        "rows": rows,
        "failures": failures,
        "figure": figure,
    }


def _scored(inputs: Inputs) -> pd.DataFrame:
    """The points with `score`, smaller is better, and the `error` that is shown beside it."""
    points = inputs.points
    name, sign = ("valid_bits_per_dim", 1) if inputs.unit == "bits/dim" else ("valid_log_px", -1)
    error = points[f"{name}_seed_se"].fillna(points[f"{name}_se"])
    return points.assign(score=sign * points[name], error=error)


def _words(inputs: Inputs, points: pd.DataFrame, seeds: int) -> str:
    chosen = inputs.best["model"]
    choice = f"{chosen['likelihood']}, latent dimension {text.size(chosen['latent_dim'])}"
    samples = inputs.trials["num_samples"].dropna()
    if not len(samples):
        return (
            f"Nothing was swept: params.yaml pins the likelihood to {chosen['likelihood']} and the "
            f"latent dimension to {text.size(chosen['latent_dim'])}."
        )
    swept = "".join(
        f", {name} {text.plain(value)}" for name, value in records(points)[0].items() if "." in name
    )
    each = f" of {seeds} seeds each" if seeds > 1 else ""
    mean = "the mean over its seeds of " if seeds > 1 else ""
    return (
        f"{len(points)} points{each}, ranked by {mean}the importance-sampled log p(x) of the "
        f"validation split (K = {int(samples.iloc[0]):,}) in one unit for all likelihoods; "
        f"chosen: {choice}{swept}. {_certainty(points, seeds)}"
    )


def _certainty(points: pd.DataFrame, seeds: int) -> str:
    """How many points the best one can't be told from, by its standard error over seeds."""
    if seeds < 2:
        return (
            "With one seed a point nothing tells how much of a lead is the luck of a start; "
            "sweep.num_seeds does."
        )
    best, *others = (row for row in records(points) if row["status"] == "ok")
    near = [row for row in others if row["score"] <= best["score"] + best["error"]]
    if not near:
        return "No other point lies within one standard error of it."
    names = [f"{row['likelihood']} with {row['latent_dim']}" for row in near[:3]]
    more = f" and {len(near) - 3} more" if len(near) > 3 else ""
    plural = "points lie" if len(near) > 1 else "point lies"
    return f"{len(near)} other {plural} within one standard error of it: {', '.join(names)}{more}."


def _seed(row: dict[str, Any], seeds: int) -> str:
    return f", seed {row['seed']}" if seeds > 1 else ""


def _caption(seeds: int) -> str:
    if seeds > 1:
        return f"Bars: 1 standard error of the mean over {seeds} seeds."
    return (
        "Bars: 1 standard error of the mean across validation examples. The same examples score "
        "every trial, so differences between trials are surer than the bars suggest."
    )
