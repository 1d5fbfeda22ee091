"""Evaluate stage: the evidence for the trained model on the test split.

Reads data/prepared, models/vae and reports/train/history.csv.
Writes reports/evaluate: metrics.json, per_example.parquet, reference.json (quantiles of log p(x)
on the validation split, to which percentiles refer) and pictures.

Shapes: N examples. All in nats unless said.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pipeline.evaluate import gallery as pictures, shifted_data
from pipeline.evaluate.baselines import Baseline, fit_baselines
from pipeline.evaluate.scoring import score_split
from pipeline.evaluate.summary import per_example, reference, summarise
from pipeline.figures import plots, save
from pipeline.params import EvaluateParams, Params, load_params
from pipeline.stage import (
    Meta,
    UserError,
    load_meta,
    load_split,
    run_stage,
    say,
    spared,
    steps,
    write_json,
)
from pipeline.tracking import mirror as tracking
from vae.diagnostics import active_units, collapse_verdict
from vae.evidence import EvidenceSettings
from vae.models import VAE, CheckpointError, load
from vae.system import whole_directory
from vae.trust import KHAT_LIMIT


def evaluate(
    config: EvaluateParams, prepared: Path, model_dir: Path, train: Path, out: Path
) -> dict[str, Any]:
    """Score the model in `model_dir` on the prepared test split and write `out`, whole.

    Returns metrics.json's content. Raises UserError for a damaged model or one of other data.
    """
    meta = load_meta(prepared)
    model = _load_model(model_dir, meta)
    splits = {name: load_split(prepared, name) for name in ("train", "valid", "test")}
    x = {name: torch.from_numpy(np.array(split.x)) for name, split in splits.items()}
    history = _read_history(train / "history.csv")
    K = config.num_importance_samples
    until = "" if config.target_se is None else f" or an error of {config.target_se:g} nats"
    say(
        f"evaluate   how likely is unseen data? {len(x['test']):,} test and "
        f"{len(x['valid']):,} validation examples, K = {K:,}{until}, {config.proposal} proposals"
    )
    settings = EvidenceSettings(
        num_samples=K,
        seed=config.seed,
        proposal=config.proposal,
        target_se=config.target_se,
        precision=config.precision,
    )
    # First, for what follows is long, and must not be lost to it.
    baselines = spared("evaluate", "baseline", lambda: _baselines(config, meta, model, x)) or [
        Baseline(name="none, since it failed", log_px=torch.full((len(x["test"]),), math.nan))
    ]
    with steps("evaluate", len(x["test"]) + len(x["valid"]), "example") as shown:
        test = score_split(model, x["test"], settings, done=shown.to)
        before = len(x["test"])
        valid = score_split(model, x["valid"], settings, done=lambda n: shown.to(before + n))
    metrics = summarise(test, baselines, space=meta.space, num_values=math.prod(meta.data_shape))
    metrics |= settings.to_dict() | _collapse(model, x["test"])
    metrics["shifted"] = spared(
        "evaluate", "shifted data", lambda: _shifted(model, settings, meta, x["test"], test.log_px)
    )
    metrics = _plain(metrics)
    gallery = pictures.Gallery(
        model=model,
        x=x["test"],
        labels=_label_words(splits["test"].label, meta.classes),
        columns=meta.columns,
        seed=config.seed,
    )
    with whole_directory(out) as fresh:
        write_json(fresh / "metrics.json", metrics)
        write_json(fresh / "reference.json", reference(valid) | settings.to_dict())
        table = per_example(splits["test"], test, baselines[0])
        table.to_parquet(fresh / "per_example.parquet", index=False)
        _draw(gallery, test.log_px, history, metrics, fresh)
    for line in describe(metrics):
        say(f"evaluate   {line}")
    return metrics


def _shifted(
    model: VAE, settings: EvidenceSettings, meta: Meta, x: Tensor, log_px: np.ndarray
) -> dict[str, Any]:
    """How log p(x) of the scored test examples compares with that of shifted ones."""
    few = replace(settings, num_samples=min(settings.num_samples, shifted_data.MOST_SAMPLES))
    scored = np.isfinite(log_px)
    return shifted_data.compare(
        x[torch.from_numpy(scored)],
        log_px[scored],
        meta.space,
        settings.seed,
        lambda changed: few.log_px(model, changed).numpy(),
    )


def _draw(
    gallery: pictures.Gallery,
    log_px: np.ndarray,
    history: pd.DataFrame,
    metrics: dict[str, Any],
    out: Path,
) -> None:
    """All pictures; one that fails costs itself."""
    pictures.draw(gallery, log_px, out)
    figures = {
        "elbo_curves.png": lambda: plots.elbo_curves(history),
        "ladder.png": lambda: plots.ladder_figure(metrics["ladder"], metrics["elbo"]),
    }
    for name, make in figures.items():
        spared("evaluate", name, partial(_save, make, out / name))


def _save(make: Callable[[], Figure], path: Path) -> None:
    save(make(), path)


def _baselines(
    config: EvaluateParams, meta: Meta, model: VAE, x: dict[str, Tensor]
) -> list[Baseline]:
    return fit_baselines(
        x["train"],
        x["valid"],
        x["test"],
        space=meta.space,
        latent_dim=model.noise_dim,
        min_scale=model.config.min_scale,
        num_samples=config.num_importance_samples,
        seed=config.seed,
        binarize=meta.space == "binary" and meta.binarization == "dynamic",
    )


def describe(metrics: dict[str, Any]) -> list[str]:
    """The result in two lines for the terminal, and one of examples that can't be scored."""
    base = metrics["baseline"]
    if not metrics["num_examples"]:
        return [f"none of the {metrics['num_unscored']:,} test examples can be scored"]
    score = f"log p(x) {metrics['log_px']:.2f} ± {metrics['log_px_se']:.2f} nats"
    if metrics["bits_per_dim"] is not None:
        score += f" ({metrics['bits_per_dim']:.4f} ± {metrics['bits_per_dim_se']:.4f} bits/dim)"
    bad = metrics["khat_bad_fraction"]
    trust = "" if bad is None else f", khat > {KHAT_LIMIT} on {bad:.1%}"
    lines = [
        f"{score}, gap {metrics['posterior_gap']:.2f}, "
        f"{metrics['active_units']} of {metrics['latent_dim']} units active{trust}"
    ]
    if base["gain"] is not None:
        in_se = "" if base["gain_in_se"] is None else f" ({base['gain_in_se']:.1f} standard errors)"
        error = "" if base["gain_se"] is None else f" ± {base['gain_se']:.2f}"
        lines.append(f"{base['gain']:+.2f}{error} nats against {base['name']}{in_se}")
    if metrics["num_unscored"]:
        lines.append(
            f"{metrics['num_unscored']:,} test examples have no log p(x), and are in no mean: "
            "per_example.parquet says which"
        )
    return lines


def _load_model(folder: Path, meta: Meta) -> VAE:
    try:
        model = load(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    except CheckpointError as error:
        raise UserError(f"{error}; `dvc repro --force train` trains it again") from error
    config = model.config
    if config.data_shape != tuple(meta.data_shape) or config.space != meta.space:
        raise UserError(
            f"the model in {folder} was made for {config.space} data of shape "
            f"{config.data_shape}; the prepared data are {meta.space}, {tuple(meta.data_shape)}; "
            "`dvc repro` trains one for them"
        )
    return model


def _read_history(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); `dvc repro train` makes it") from error


def _collapse(model: VAE, x: Tensor) -> dict[str, Any]:
    active = active_units(model, x)
    return {
        "active_units": int(active.sum()),
        "latent_dim": model.noise_dim,
        "collapse": collapse_verdict(model, x),
    }


def _plain(content: Any) -> Any:
    """JSON-ready: Python numbers, and None for what isn't finite."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, float | np.floating):
        return float(content) if math.isfinite(content) else None
    return content


def _label_words(label: np.ndarray, classes: Sequence[str] | None) -> list[str] | None:
    if (label < 0).all():
        return None
    return [str(classes[value]) if classes and value >= 0 else str(value) for value in label]


def run(params: Params, prepared: Path, model: Path, train: Path, out: Path) -> dict[str, Any]:
    """`evaluate`, then the mirror in MLflow, which never fails the stage."""
    metrics = evaluate(params.evaluate, prepared, model, train, out)
    tracking.mirror_evaluation(params, out, train)
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prepared", type=Path, default=Path("data/prepared"))
    parser.add_argument("--model", type=Path, default=Path("models/vae"))
    parser.add_argument("--train", type=Path, default=Path("reports/train"))
    parser.add_argument("--evaluate", type=Path, default=Path("reports/evaluate"))
    paths = parser.parse_args()
    run(load_params(), paths.prepared, paths.model, paths.train, paths.evaluate)


if __name__ == "__main__":
    run_stage(main)
