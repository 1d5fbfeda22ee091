"""Plots of numbers: the sweep, the training curves and the evidence.

Every function returns a matplotlib `Figure`. Shapes: N examples. All in nats unless said.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter

from pipeline.figures.style import (
    BLUE,
    CATEGORIES,
    INK,
    MINUS,
    MUTED,
    ORANGE,
    RED,
    SMALL_PANEL,
    first_number,
    hover_point,
    hover_strips,
    new_figure,
    note,
    save,
    styled,
)
from vae.trust import KHAT_LIMIT

# --- sweep ---------------------------------------------------------------------------------------


FAILED = ("diverged", "died")  # statuses of points without a result


def sweep_plot(table: pd.DataFrame, path: Path, unit: str | None = None) -> None:
    """Draw `table` (columns of points.csv) into `path`; see `sweep_figure`."""
    save(sweep_figure(table, unit), path)


@styled
def sweep_figure(table: pd.DataFrame, unit: str | None = None) -> Figure:
    """Validation -log p(x) against latent dimension, one line for each likelihood.

    Args:
        table: the columns of points.csv; rows whose status is not "ok" are counted, not drawn. Of
            points that differ in other swept keys only, the best is drawn.
        unit: "bits/dim" or "nats"; None takes bits/dim where the points have it.

    Error bars are ± 1 standard error of the mean: over seeds or, with one seed, across examples.
    Lower is better; a ring marks the best.
    """
    figure, ((ax,),) = new_figure(size=(4.7, 3.4))
    if unit is None:
        unit = "nats" if table["valid_bits_per_dim"].isna().to_numpy().all() else "bits/dim"
    points = _sweep_points(table, unit)
    if not points:
        return note(ax, "Nothing was swept: both axes are pinned in params.yaml.")
    sizes = sorted({point.latent_dim for point in points}, key=first_number)
    names = sorted({point.likelihood for point in points})
    best = min(points, key=lambda point: point.score)
    for index, name in enumerate(names):
        shift = (index - (len(names) - 1) / 2) * 0.05  # so that error bars don't hide each other
        line = sorted(
            (point for point in points if point.likelihood == name),
            key=lambda point: sizes.index(point.latent_dim),
        )
        places = [sizes.index(point.latent_dim) + shift for point in line]
        scores, errors = [point.score for point in line], [point.error for point in line]
        ax.errorbar(
            places, scores, yerr=errors, marker="o", markersize=4.5, capsize=2.5, elinewidth=1.0,
            color=CATEGORIES[index % len(CATEGORIES)], label=name,
        )  # fmt: skip
        for place, point in zip(places, line, strict=True):
            words = f"{name}, {point.latent_dim} latent dimensions\n"
            hover_point(ax, place, point.score, words + point.words(unit))
        if best.likelihood == name:
            _mark_best(ax, sizes.index(best.latent_dim) + shift, best.score, unit)
    ax.set_xticks(range(len(sizes)), sizes)
    ax.set_xlim(-0.5, len(sizes) - 0.5)
    ax.margins(y=0.16)
    ax.grid(axis="x", visible=False)
    scores = [point.score for point in points]
    if min(scores) > 0 and max(scores) > 4 * min(scores):
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.yaxis.set_minor_formatter(ScalarFormatter())
    ax.set_xlabel("latent dimension")
    ax.set_ylabel(f"{MINUS}log p(x), {unit} (lower is better)")
    if failed := sum(status in FAILED for status in table["status"]):
        ax.set_title(f"{failed} of {len(table)} points failed and are not drawn", color=RED)
    figure.legend(loc="outside lower center", ncols=2 if len(names) > 2 else len(names))
    return figure


class _SweepPoint(NamedTuple):
    latent_dim: str
    likelihood: str
    score: float
    error: float

    def words(self, unit: str) -> str:
        """The score and its standard error."""
        digits = 4 if unit == "bits/dim" else 2
        return f"{self.score:.{digits}f} ± {self.error:.{digits}f} {unit}"


def _sweep_points(table: pd.DataFrame, unit: str) -> list[_SweepPoint]:
    """The best point of each latent dimension and likelihood."""
    score, sign = ("valid_bits_per_dim", 1) if unit == "bits/dim" else ("valid_log_px", -1)
    values, over_seeds, over_images = (
        np.array(table[name], dtype=float)  # None becomes NaN
        for name in (score, f"{score}_seed_se", f"{score}_se")
    )
    errors = np.nan_to_num(np.where(np.isnan(over_seeds), over_images, over_seeds))
    names = (table[name] for name in ("latent_dim", "likelihood", "status"))
    best: dict[tuple[str, str], _SweepPoint] = {}
    for latent, name, status, value, error in zip(*names, values, errors, strict=True):
        point = _SweepPoint(str(latent), str(name), sign * float(value), float(error))
        key = (point.latent_dim, point.likelihood)
        if status == "ok" and np.isfinite(point.score):
            best[key] = min(point, best.get(key, point), key=lambda point: point.score)
    return list(best.values())


def _mark_best(ax: Axes, place: float, score: float, unit: str) -> None:
    ax.plot(place, score, "o", markersize=12, mfc="none", mec=INK, mew=1.2, zorder=5)
    words = f"best {score:.3f}" if unit == "bits/dim" else f"best {score:.1f}"
    ax.annotate(
        words, (place, score), (0, -10), textcoords="offset points", ha="center", va="top",
        fontsize=8, fontweight="bold",
    )  # fmt: skip


# --- training ------------------------------------------------------------------------------------

CURVES = (("elbo", "ELBO"), ("log_px_z", "log p(x|z)"), ("kl", "KL(q(z|x) ‖ p(z))"))


@styled
def elbo_curves(history: pd.DataFrame) -> Figure:
    """ELBO and its two terms for each epoch (columns of history.csv), train and validation."""
    figure, axes = new_figure(1, 3, size=(9.6, 2.8))
    for ax, (column, title) in zip(axes[0], CURVES, strict=True):
        _curve(ax, history, column, title)
    return figure


@styled
def curve_figure(history: pd.DataFrame, column: str) -> Figure:
    """One of the three curves of `elbo_curves`, without a title; `column` is a key of CURVES."""
    figure, ((ax,),) = new_figure(size=SMALL_PANEL)
    _curve(ax, history, column, "")
    return figure


def _curve(ax: Axes, history: pd.DataFrame, column: str, title: str) -> None:
    epochs = history["epoch"].to_numpy()
    curves = {"train": (MUTED, 1.2), "valid": (BLUE, 1.8)}
    for split, (colour, width) in curves.items():
        values = history[f"{split}_{column}"]
        words = "validation" if split == "valid" else "training"
        marker = "o" if len(epochs) == 1 else ""
        ax.plot(epochs, values, color=colour, lw=width, label=words, marker=marker)
    best = history[history["is_best"].astype(bool)]
    if not best.empty:
        row = best.iloc[-1]
        ax.plot(row["epoch"], row[f"valid_{column}"], "o", ms=5, color=ORANGE, label="kept weights")
    settled = history.iloc[len(history) // 8 :]
    values = settled[[f"train_{column}", f"valid_{column}"]].to_numpy(dtype=float)
    values = values[np.isfinite(values)]
    if len(values) and np.ptp(values) > 0:  # the first epochs would flatten all the others
        margin = 0.06 * np.ptp(values)
        ax.set_ylim(values.min() - margin, values.max() + margin)
    ax.set_title(title)
    ax.set_xlabel("epoch")
    ax.set_ylabel("nats per example")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="best")
    words = [
        f"epoch {epoch}\ntraining {_signed(train)}\nvalidation {_signed(valid)}"
        for epoch, train, valid in zip(
            epochs, history[f"train_{column}"], history[f"valid_{column}"], strict=True
        )
    ]
    hover_strips(ax, [*(epochs - 0.5), epochs[-1] + 0.5], words)


# --- evidence ------------------------------------------------------------------------------------


@styled
def log_px_figure(log_px: np.ndarray, baseline: np.ndarray | None = None) -> Figure:
    """Histogram of log p(x), (N,) in nats, with the baseline's beside it where it fits."""
    figure, ((ax,),) = new_figure()
    draw_log_px(ax, log_px, baseline)
    return figure


def draw_log_px(ax: Axes, log_px: np.ndarray, baseline: np.ndarray | None) -> None:
    low, high = float(log_px.min()), float(log_px.max())
    note = ""
    if baseline is not None:
        spread = max(high - low, 1e-9)
        low = max(min(low, float(baseline.min())), low - 3 * spread)
        high = min(max(high, float(baseline.max())), high + 3 * spread)
        outside = int(((baseline < low) | (baseline > high)).sum())
        note = f" ({outside} beyond the axis)" if outside else ""
    edges = np.linspace(low, high if high > low else low + 1.0, 41).tolist()
    counted = {"model": log_px}
    if baseline is not None:
        counted["baseline"] = baseline
        ax.hist(baseline, bins=edges, color=MUTED, alpha=0.45, label=f"baseline{note}")
    ax.hist(log_px, bins=edges, color=BLUE, alpha=0.85, label="model")
    _hover_bins(ax, edges, counted, "nats")
    ax.axvline(float(log_px.mean()), color=ORANGE, lw=1.4, label="model's mean")
    ax.set_xlabel("log p(x), nats")
    ax.set_ylabel("test examples")
    ax.grid(axis="x", visible=False)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.margins(y=0.28)
    ax.legend(loc="upper left")


@styled
def ladder_figure(ladder: Mapping[str, float], elbo: float) -> Figure:
    """Mean importance-sampled bound against K; `ladder` is {K: nats}, `elbo` in nats."""
    figure, ((ax,),) = new_figure()
    samples = np.array([int(key) for key in ladder])
    values = np.array([ladder[key] for key in ladder], dtype=float)
    order = np.argsort(samples)
    samples, values = samples[order], values[order]
    ax.axhline(elbo, color=MUTED, lw=1.1, ls=(0, (4, 3)), label=f"ELBO {_signed(elbo)}")
    ax.plot(samples, values, "o-", color=BLUE, ms=4.5, label="bound from K samples")
    if len(samples) > 1:
        ax.set_xscale("log")
    ax.set_xticks(samples, [f"{k:,}" for k in samples])
    ax.minorticks_off()
    ax.margins(x=0.12, y=0.28)
    for k, value in zip(samples, values, strict=True):
        hover_point(ax, k, value, f"K = {k:,}\n{_signed(value)} nats\nELBO {value - elbo:+.2f}")
    ax.annotate(
        f"{_signed(values[-1])}\n(ELBO {values[-1] - elbo:+.2f})", (samples[-1], values[-1]),
        (4, 6), textcoords="offset points", ha="right", va="bottom", fontsize=8, fontweight="bold",
    )  # fmt: skip
    ax.set_xlabel("importance samples K")
    ax.set_ylabel("mean bound on log p(x), nats")
    ax.legend(loc="upper left")
    return figure


@styled
def ess_figure(ess: np.ndarray, num_samples: int) -> Figure:
    """Histogram of the effective sample size, (N,), out of `num_samples`, on a log axis."""
    figure, ((ax,),) = new_figure()
    ess = np.clip(ess[np.isfinite(ess)], 1.0, None)
    edges = np.geomspace(1.0, max(num_samples, 2), 41).tolist()
    ax.hist(ess, bins=edges, color=BLUE, alpha=0.85)
    _hover_bins(ax, edges, {"": ess}, "effective samples")
    if len(ess):
        ax.axvline(np.median(ess), color=ORANGE, lw=1.4, label=f"median {np.median(ess):.0f}")
        ax.legend(loc="best")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.set_xlabel(f"effective sample size out of K = {num_samples:,}")
    ax.set_ylabel("test examples")
    ax.grid(axis="x", visible=False)
    return figure


@styled
def khat_figure(khat: np.ndarray) -> Figure:
    """Histogram of the Pareto shape of the largest weights, (N,); above 0.7 is untrustworthy."""
    figure, ((ax,),) = new_figure()
    khat = khat[np.isfinite(khat)]
    if not len(khat):
        return note(ax, "khat needs 25 importance samples or more.")
    edges = np.linspace(min(khat.min(), 0.0), max(khat.max(), KHAT_LIMIT + 0.1), 41).tolist()
    ax.hist(khat[khat <= KHAT_LIMIT], bins=edges, color=BLUE, alpha=0.85)
    ax.hist(khat[khat > KHAT_LIMIT], bins=edges, color=RED, alpha=0.85)
    _hover_bins(ax, edges, {"": khat}, "khat", digits=2)
    words = f"limit {KHAT_LIMIT}: {np.mean(khat > KHAT_LIMIT):.1%} above"
    ax.axvline(KHAT_LIMIT, color=RED, lw=1.2, ls=(0, (4, 3)), label=words)
    ax.set_xlabel("khat, Pareto shape of the importance weights")
    ax.set_ylabel("test examples")
    ax.grid(axis="x", visible=False)
    ax.legend(
        loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0
    )  # above: no line crosses it
    return figure


def _hover_bins(
    ax: Axes, edges: list[float], counted: Mapping[str, np.ndarray], unit: str, digits: int = 0
) -> None:
    """Each bin of a histogram says its limits and its counts."""
    words = [
        f"{low:.{digits}f} to {high:.{digits}f} {unit}".replace("-", MINUS)
        for low, high in pairwise(edges)
    ]
    for name, values in counted.items():
        found, _ = np.histogram(values, edges)
        words = [
            f"{line}\n{name}{': ' if name else ''}{count:,} examples"
            for line, count in zip(words, found, strict=True)
        ]
    hover_strips(ax, edges, words)


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", MINUS)
