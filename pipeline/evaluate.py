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
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pipeline import pictures, plots, shifted, tracking
from pipeline.baseline import Baseline, fit_baselines
from pipeline.figures import save
from pipeline.params import Params, load_params
from pipeline.prepared import Meta, Split, load_meta, load_split
from pipeline.sections import EvaluateParams
from pipeline.stage import UserError, run_stage, say, spared, whole_directory, write_json
from pipeline.terminal import steps
from vae import VAE, load
from vae.checkpoint import CheckpointError
from vae.diagnostics import active_units, collapse_verdict
from vae.evidence import KHAT_LIMIT, importance_sampling
from vae.noise import example_generators
from vae.posteriors import kl_divergence

BATCH_VALUES = {"cpu": 2**17, "cuda": 2**18}  # in a batch, whose decoder outputs come in chunks
BOUND_SAMPLES = 100  # of the encoder's posterior, for the ELBO's terms
QUANTILES = 101


@dataclass(frozen=True, kw_only=True)
class SplitEvidence:
    """Evidence for a whole split: float64 arrays (N,); `ladder` is {K: (N,)}.

    log_px, se, ess, khat, samples (K) and ladder are of the proposal, `proposal_elbo` is its own
    bound; elbo, log_px_z and kl are the encoder's.
    """

    log_px: np.ndarray
    se: np.ndarray
    ess: np.ndarray
    khat: np.ndarray
    samples: np.ndarray
    proposal_elbo: np.ndarray
    elbo: np.ndarray
    log_px_z: np.ndarray
    kl: np.ndarray
    ladder: dict[int, np.ndarray]

    def only(self, chosen: np.ndarray) -> SplitEvidence:
        """The same of some examples. chosen: (N,) bool."""
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "ladder"}
        ladder = {k: values[chosen] for k, values in self.ladder.items()}
        return SplitEvidence(**{k: v[chosen] for k, v in columns.items()}, ladder=ladder)


def score_split(
    model: VAE,
    x: Tensor,
    num_samples: int,
    seed: int,
    proposal: str = "encoder",
    target_se: float | None = None,
    precision: str = "fp32",
    done: Callable[[int], None] | None = None,
) -> SplitEvidence:
    """Importance-sampled log p(x) and the ELBO's terms for every example of a split.

    Args:
        model: in evaluation mode.
        x: (N, *data_shape), in data units.
        num_samples: K; the most with target_se.
        seed: of the importance samples; each example's noise is its own, as in the served model.
        proposal: a name in `vae.proposals`.
        target_se, precision: as in `vae.evidence.importance_sampling`.
        done: told after each batch how many examples are behind it.

    The ELBO's terms are means over min(K, 100) samples of the encoder's posterior; the KL is
    exact where it has a closed form.
    """
    device = next(model.parameters()).device
    sample = partial(importance_sampling, model, precision=precision)
    rows: list[dict[str, Tensor]] = []
    ladders: list[dict[int, Tensor]] = []
    values = BATCH_VALUES.get(device.type, BATCH_VALUES["cpu"])
    for part in x.split(max(1, min(1024, values // max(1, x[0].numel())))):
        part = part.to(device)
        noise = example_generators(part, seed)
        found = sample(part, num_samples, generator=noise, proposal=proposal, target_se=target_se)
        bound = sample(part, min(num_samples, BOUND_SAMPLES), generator=noise)
        with torch.inference_mode():
            closed = kl_divergence(model.posterior(part), model.prior())
        kl = bound.kl if closed is None else closed
        row = {name: getattr(found, name) for name in ("log_px", "se", "ess", "khat", "samples")}
        row["proposal_elbo"] = found.elbo
        rows.append(row | {"log_px_z": bound.log_px_z, "kl": kl, "elbo": bound.log_px_z - kl})
        ladders.append(found.ladder)
        if done is not None:
            done(sum(len(row["kl"]) for row in rows))
    columns = {name: _joined([row[name] for row in rows]) for name in rows[0]}
    return SplitEvidence(
        **columns, ladder={k: _joined([ladder[k] for ladder in ladders]) for k in ladders[0]}
    )


def summarise(
    evidence: SplitEvidence, baselines: list[Baseline], *, space: str, num_values: int
) -> dict[str, Any]:
    """metrics.json, but for what is the model's own: means over examples, with their errors.

    Examples without a finite log p(x) are counted (`num_unscored`), and are in no mean.

    Args:
        evidence: of the test split.
        baselines: scored on the same examples; the first is the strongest.
        space: bits/dim are for discrete data only.
        num_values: D.
    """
    scored = np.isfinite(evidence.log_px)
    unscored = int((~scored).sum())
    evidence = evidence.only(scored)
    baselines = [replace(b, log_px=b.log_px.cpu()[torch.from_numpy(scored)]) for b in baselines]
    mean, se = _mean_and_se(evidence.log_px)
    to_bits = None if space == "continuous" else 1 / (num_values * math.log(2))
    compared = [_compare(evidence.log_px, baseline, to_bits) for baseline in baselines]
    metrics: dict[str, Any] = {
        "num_examples": len(evidence.log_px),
        "num_unscored": unscored,
        "num_samples": max(evidence.ladder),
        "samples_mean": evidence.samples.mean(),
        "elbo": evidence.elbo.mean(),
        "log_px_z": evidence.log_px_z.mean(),
        "kl": evidence.kl.mean(),
        "log_px": mean,
        "log_px_se": se,
        "log_px_mc_se": math.sqrt(float((evidence.se**2).sum())) / max(1, len(evidence.se)),
        "bits_per_dim": None if to_bits is None else -mean * to_bits,
        "bits_per_dim_se": None if to_bits is None else se * to_bits,
        "ess_median": np.median(evidence.ess),
        "khat_median": _median(evidence.khat),
        "khat_bad_fraction": _share_above(evidence.khat, KHAT_LIMIT),
        "posterior_gap": (evidence.log_px - evidence.elbo).mean(),
        "proposal_elbo": evidence.proposal_elbo.mean(),
        "ladder": {str(k): values.mean() for k, values in sorted(evidence.ladder.items())},
        "baseline": compared[0],
    }
    if len(compared) > 1:
        metrics["baselines"] = {entry["name"]: entry for entry in compared}
    return metrics


def reference(evidence: SplitEvidence) -> dict[str, Any]:
    """reference.json: quantiles of log p(x), (101,), at evenly spaced probabilities."""
    evidence = evidence.only(np.isfinite(evidence.log_px))
    probabilities = np.linspace(0.0, 1.0, QUANTILES)
    return {
        "split": "valid",
        "num_examples": len(evidence.log_px),
        "num_samples": max(evidence.ladder),
        "probabilities": [round(float(p), 6) for p in probabilities],
        "log_px": np.quantile(evidence.log_px, probabilities).tolist(),
    }


def per_example(test: Split, evidence: SplitEvidence, baseline: Baseline) -> pd.DataFrame:
    """per_example.parquet: one row for each test example, in the split's order."""
    return pd.DataFrame(
        {
            "id": test.id,
            "label": test.label,
            "log_px": evidence.log_px,
            "se": evidence.se,
            "ess": evidence.ess,
            "khat": evidence.khat,
            "samples": evidence.samples.astype(int),
            "elbo": evidence.elbo,
            "log_px_z": evidence.log_px_z,
            "kl": evidence.kl,
            "baseline_log_px": baseline.log_px.cpu().numpy(),
            "reason": _reasons(evidence.log_px),
        }
    )


def _reasons(log_px: np.ndarray) -> pd.Series:
    """Why an example has no finite log p(x), text or None, (N,)."""
    words = "log p(x) is lower than its smallest number: it lies too far from the training data"
    found = [None if finite else words for finite in np.isfinite(log_px).tolist()]
    return pd.Series(found, dtype="string")


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
    settings = (K, config.seed, config.proposal, config.target_se, config.precision)
    # First, for what follows is long, and must not be lost to it.
    baselines = spared("evaluate", "baseline", lambda: _baselines(config, meta, model, x)) or [
        Baseline(name="none, since it failed", log_px=torch.full((len(x["test"]),), math.nan))
    ]
    with steps("evaluate", len(x["test"]) + len(x["valid"]), "example") as shown:
        test = score_split(model, x["test"], *settings, done=shown.to)
        before = len(x["test"])
        valid = score_split(model, x["valid"], *settings, done=lambda n: shown.to(before + n))
    num_values = math.prod(meta.data_shape)
    metrics = summarise(test, baselines, space=meta.space, num_values=num_values)
    how = {
        "proposal": config.proposal,
        "target_se": config.target_se,
        "precision": config.precision,
    }
    metrics |= how | _collapse(model, x["test"])

    def log_px(changed: Tensor) -> np.ndarray:
        samples = min(K, shifted.MOST_SAMPLES)
        return score_split(model, changed, samples, *settings[1:]).log_px

    scored = np.isfinite(test.log_px)
    metrics["shifted"] = spared(
        "evaluate",
        "shifted data",
        lambda: shifted.compare(
            x["test"][torch.from_numpy(scored)],
            test.log_px[scored],
            meta.space,
            config.seed,
            log_px,
        ),
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
        write_json(fresh / "reference.json", reference(valid) | how)
        table = per_example(splits["test"], test, baselines[0])
        table.to_parquet(fresh / "per_example.parquet", index=False)
        pictures.draw(gallery, test.log_px, fresh)
        ladder = metrics["ladder"], metrics["elbo"]
        figures = {
            "elbo_curves.png": lambda: plots.elbo_curves(history),
            "ladder.png": lambda: plots.ladder_figure(*ladder),
        }
        for name, make in figures.items():
            spared("evaluate", name, partial(_save, make, fresh / name))
    for line in describe(metrics):
        say(f"evaluate   {line}")
    return metrics


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


def _compare(log_px: np.ndarray, baseline: Baseline, to_bits: float | None) -> dict[str, Any]:
    """The baseline's score and the model's paired gain over it, with the error across examples."""
    theirs = baseline.log_px.cpu().numpy()
    gain, se = _mean_and_se(log_px - theirs)
    theirs = theirs if len(theirs) else np.full(1, math.nan)
    return {
        "name": baseline.name,
        "log_px": theirs.mean(),
        "bits_per_dim": None if to_bits is None else -theirs.mean() * to_bits,
        "gain": gain,
        "gain_se": se,
        "gain_in_se": gain / se if se > 0 else math.nan,
    }


def _mean_and_se(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error across examples; NaN for the error of a single one."""
    if len(values) < 2:
        return float(values[0]) if len(values) else math.nan, math.nan
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def _median(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else math.nan


def _share_above(values: np.ndarray, limit: float) -> float:
    known = values[~np.isnan(values)]
    return float((known > limit).mean()) if len(known) else math.nan


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


def _joined(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).double().cpu().numpy()


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
