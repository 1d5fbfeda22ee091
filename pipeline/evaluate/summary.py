"""Figures of a split from those of its examples."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from pipeline.evaluate.baselines import Baseline
from pipeline.evaluate.scoring import SplitEvidence
from pipeline.stage import Split
from vae.trust import KHAT_LIMIT

QUANTILES = 101


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
