"""Pictures in one quiet style: every function returns a matplotlib `Figure`.

`save` writes one to a file; `to_svg` makes one that takes its colours from the page it stands in.
Nothing here touches pyplot or any other global state.

Shapes: N examples, C channels, H × W pixels, L latent dimensions. Images are floats in [0, 1].
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

INK, MUTED, GRID, PAPER = "#20262e", "#68727f", "#e3e7ec", "#ffffff"
BLUE, ORANGE, GREEN, RED = "#2f6f9f", "#d9772b", "#4c8c57", "#c0453f"
CATEGORIES = (
    "#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f",
    "#d9b62f", "#b07aa1", "#ff9da7", "#9c755f", "#8f8a86",
)  # fmt: skip
# In an SVG these colours become the page's own, so that it can be dark or light.
PAGE_COLOURS = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"}
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.unicode_minus": True,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "image.interpolation": "nearest",
}
styled = matplotlib.rc_context(STYLE)
PNG_DPI = 160
PANEL = (4.7, 3.1)  # inches; readable both in a phone's column and in half a desktop page
KHAT_LIMIT = 0.7


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = PANEL, **kwargs: Any):
    """Return (figure, array of axes (rows, columns)) in the common style."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


@styled
def save(figure: Figure, path: Path) -> None:
    """Write the figure to `path`; the suffix chooses the format (png or svg)."""
    if Path(path).suffix == ".svg":
        Path(path).write_text(to_svg(figure, Path(path).stem))
    else:
        FigureCanvasAgg(figure).print_figure(path, dpi=PNG_DPI, metadata={"Software": None})


def to_svg(figure: Figure, name: str) -> str:
    """Return the figure as an `<svg>` element to stand in a page.

    Neutral colours are CSS variables (--ink, --muted, --grid, --paper) with the light values as
    default; ids start with `name`, so that several figures can share a page.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_figure(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour, f"var({variable}, {colour})")
    return svg.strip()


# --- sweep ---------------------------------------------------------------------------------------


def sweep_plot(trials: pd.DataFrame, path: Path, unit: str | None = None) -> None:
    """Draw `trials` (columns of trials.csv) into `path`; see `sweep_figure`."""
    save(sweep_figure(trials, unit), path)


@styled
def sweep_figure(trials: pd.DataFrame, unit: str | None = None) -> Figure:
    """Validation −log p(x) against latent dimension, one line for each likelihood.

    Args:
        trials: the columns of trials.csv; rows whose status is not "ok" are counted, not drawn.
        unit: "bits/dim" or "nats"; None takes bits/dim where the trials have it.

    Error bars are ± 1 standard error of the mean across images. Lower is better; a ring marks the
    best.
    """
    figure, ((ax,),) = new_figure(size=(5.2, 3.6))
    if unit is None:
        unit = "bits/dim" if trials["valid_bits_per_dim"].notna().any() else "nats"
    if unit == "bits/dim":
        score, error = trials["valid_bits_per_dim"], trials["valid_bits_per_dim_se"]
    else:
        score, error = -trials["valid_log_px"], trials["valid_log_px_se"]
    shown = trials.assign(score=score.astype(float), error=error.astype(float))
    shown = shown[(shown["status"] == "ok") & np.isfinite(shown["score"])]
    if shown.empty:
        return _note(ax, "Nothing was swept: both axes are pinned in params.yaml.")
    shown = shown.assign(latent=shown["latent_dim"].astype(str))
    sizes = sorted(shown["latent"].unique(), key=_first_number)
    names = sorted(shown["likelihood"].unique())
    for index, name in enumerate(names):
        line = shown[shown["likelihood"] == name].groupby("latent", sort=False)
        line = line.agg(score=("score", "mean"), error=("error", "max"))
        line = line.reindex([size for size in sizes if size in line.index])
        shift = (index - (len(names) - 1) / 2) * 0.05  # so that error bars don't hide each other
        places = np.array([sizes.index(size) for size in line.index]) + shift
        colour = CATEGORIES[index % len(CATEGORIES)]
        ax.errorbar(
            places, line["score"], yerr=line["error"].fillna(0.0), marker="o", markersize=4.5,
            capsize=2.5, elinewidth=1.0, color=colour, label=name,
        )  # fmt: skip
    best = shown.loc[shown["score"].idxmin()]
    index = names.index(best["likelihood"])
    place = sizes.index(best["latent"]) + (index - (len(names) - 1) / 2) * 0.05
    ax.plot(place, best["score"], "o", markersize=12, mfc="none", mec=INK, mew=1.2, zorder=5)
    shortened = f"{best['score']:.3f}" if unit == "bits/dim" else f"{best['score']:.1f}"
    ax.annotate(
        f"best {shortened}", (place, best["score"]), (0, -10), textcoords="offset points",
        ha="center", va="top", fontsize=8, fontweight="bold",
    )  # fmt: skip
    ax.set_xticks(range(len(sizes)), sizes)
    ax.set_xlim(-0.5, len(sizes) - 0.5)
    ax.margins(y=0.16)
    ax.grid(axis="x", visible=False)
    if shown["score"].min() > 0 and shown["score"].max() > 4 * shown["score"].min():
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.yaxis.set_minor_formatter(ScalarFormatter())
    ax.set_xlabel("latent dimension")
    ax.set_ylabel(f"validation −log p(x), {unit} (lower is better)")
    failed = int((trials["status"] == "failed").sum())
    if failed:
        ax.set_title(f"{failed} of {len(trials)} trials failed and are not drawn", color=RED)
    figure.legend(loc="outside lower center", ncols=2 if len(names) > 2 else len(names))
    return figure


# --- training ------------------------------------------------------------------------------------

CURVES = (("elbo", "ELBO"), ("log_px_z", "log p(x|z)"), ("kl", "KL(q(z|x) ‖ p(z))"))


@styled
def elbo_curves(history: pd.DataFrame) -> Figure:
    """ELBO and its two terms for each epoch (columns of history.csv), train and validation."""
    figure, axes = new_figure(1, 3, size=(11.0, 3.1))
    for ax, (column, title) in zip(axes[0], CURVES, strict=True):
        _curve(ax, history, column, title)
    return figure


@styled
def curve_figure(history: pd.DataFrame, column: str) -> Figure:
    """One of the three curves of `elbo_curves` by itself; `column` is a key of CURVES."""
    figure, ((ax,),) = new_figure()
    _curve(ax, history, column, dict(CURVES)[column])
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


# --- evidence ------------------------------------------------------------------------------------


@styled
def log_px_figure(log_px: np.ndarray, baseline: np.ndarray | None = None) -> Figure:
    """Histogram of log p(x), (N,) in nats, with the baseline's beside it where it fits."""
    figure, ((ax,),) = new_figure()
    _log_px_histogram(ax, log_px, baseline)
    return figure


def _log_px_histogram(ax: Axes, log_px: np.ndarray, baseline: np.ndarray | None) -> None:
    low, high = float(log_px.min()), float(log_px.max())
    note = ""
    if baseline is not None:
        spread = max(high - low, 1e-9)
        low = max(min(low, float(baseline.min())), low - 3 * spread)
        high = min(max(high, float(baseline.max())), high + 3 * spread)
        outside = int(((baseline < low) | (baseline > high)).sum())
        note = f" ({outside} beyond the axis)" if outside else ""
    edges = np.linspace(low, high if high > low else low + 1.0, 41)
    if baseline is not None:
        ax.hist(baseline, bins=edges, color=MUTED, alpha=0.45, label=f"baseline{note}")
    ax.hist(log_px, bins=edges, color=BLUE, alpha=0.85, label="model")
    ax.axvline(float(log_px.mean()), color=ORANGE, lw=1.4, label="model's mean")
    ax.set_xlabel("log p(x), nats")
    ax.set_ylabel("test examples")
    ax.grid(axis="x", visible=False)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.margins(y=0.28)
    ax.legend(loc="upper left")


@styled
def histogram_with_extremes(
    log_px: np.ndarray, images: np.ndarray | None, count: int = 10
) -> Figure:
    """Histogram of log p(x) and, below it, the `count` worst and best images.

    Args:
        log_px: (N,), nats.
        images: (N, H, W) or (N, H, W, 3) in [0, 1], or None for data that are not images.
        count: images in each row.
    """
    if images is None:
        return log_px_figure(log_px)
    figure = Figure(figsize=(7.2, 4.9), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.6, 1.0))
    _log_px_histogram(upper.subplots(), log_px, None)
    _extremes(lower, log_px, images, count)
    return figure


@styled
def extremes_figure(log_px: np.ndarray, images: np.ndarray, count: int = 10) -> Figure:
    """The `count` worst and best images by log p(x), which stands above each, in nats."""
    figure = Figure(figsize=(7.2, 2.0), layout="constrained")
    _extremes(figure, log_px, images, count)
    return figure


def _extremes(figure: Any, log_px: np.ndarray, images: np.ndarray, count: int) -> None:
    count = min(count, len(log_px))
    axes = figure.subplots(2, count, squeeze=False)
    order = np.argsort(log_px)
    chosen = {"worst": order[:count], "best": order[::-1][:count]}
    for row, (title, indices) in zip(axes, chosen.items(), strict=True):
        for ax, index in zip(row, indices, strict=True):
            _show(ax, images[index])
            ax.set_title(f"{log_px[index]:.0f}", fontsize=7, loc="center", fontweight="normal")
        row[0].set_ylabel(title, fontsize=8.5)


@styled
def ladder_figure(ladder: Mapping[str, float], elbo: float) -> Figure:
    """Mean importance-sampled bound against K; `ladder` is {K: nats}, `elbo` in nats."""
    figure, ((ax,),) = new_figure()
    samples = np.array([int(key) for key in ladder])
    values = np.array([ladder[key] for key in ladder], dtype=float)
    order = np.argsort(samples)
    samples, values = samples[order], values[order]
    ax.axhline(elbo, color=MUTED, lw=1.1, ls=(0, (4, 3)), label=f"ELBO {elbo:.2f}")
    ax.plot(samples, values, "o-", color=BLUE, ms=4.5, label="bound from K samples")
    if len(samples) > 1:
        ax.set_xscale("log")
    ax.set_xticks(samples, [f"{k:,}" for k in samples])
    ax.minorticks_off()
    ax.margins(x=0.12, y=0.2)
    gain = values[-1] - elbo
    ax.annotate(
        f"{values[-1]:.2f}\n({gain:+.2f})", (samples[-1], values[-1]), (-6, -8),
        textcoords="offset points", ha="right", va="top", fontsize=8, fontweight="bold",
    )  # fmt: skip
    ax.set_xlabel("importance samples K")
    ax.set_ylabel("mean bound on log p(x), nats")
    ax.legend(loc="lower right" if len(samples) > 1 else "best")
    return figure


@styled
def ess_figure(ess: np.ndarray, num_samples: int) -> Figure:
    """Histogram of the effective sample size, (N,), out of `num_samples`, on a log axis."""
    figure, ((ax,),) = new_figure()
    ess = np.clip(ess[np.isfinite(ess)], 1.0, None)
    edges = np.geomspace(1.0, max(num_samples, 2), 41)
    ax.hist(ess, bins=edges, color=BLUE, alpha=0.85)
    if len(ess):
        ax.axvline(np.median(ess), color=ORANGE, lw=1.4, label=f"median {np.median(ess):.0f}")
        ax.legend(loc="best")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(ScalarFormatter())
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
        return _note(ax, "khat needs 25 importance samples or more.")
    edges = np.linspace(min(khat.min(), 0.0), max(khat.max(), KHAT_LIMIT + 0.1), 41)
    ax.hist(khat[khat <= KHAT_LIMIT], bins=edges, color=BLUE, alpha=0.85)
    ax.hist(khat[khat > KHAT_LIMIT], bins=edges, color=RED, alpha=0.85)
    words = f"limit {KHAT_LIMIT}: {np.mean(khat > KHAT_LIMIT):.1%} above"
    ax.axvline(KHAT_LIMIT, color=RED, lw=1.2, ls=(0, (4, 3)), label=words)
    ax.margins(y=0.2)
    ax.set_xlabel("khat, Pareto shape of the importance weights")
    ax.set_ylabel("test examples")
    ax.grid(axis="x", visible=False)
    ax.legend(loc="upper left")
    return figure


# --- pictures of the model -----------------------------------------------------------------------


@styled
def image_rows(rows: Sequence[tuple[str, np.ndarray]], title: str = "") -> Figure:
    """Labelled rows of images; each row is (label, (M, H, W) or (M, H, W, 3) in [0, 1])."""
    columns = max(len(images) for _, images in rows)
    height, width = rows[0][1].shape[1:3]
    scale = 7.2 / columns
    size = (8.2, max(1.0, len(rows) * scale * height / width + (0.4 if title else 0.1)))
    figure, axes = new_figure(len(rows), columns, size=size)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02)  # pyright: ignore
    for row, (label, images) in zip(axes, rows, strict=True):
        for ax in row[len(images) :]:
            ax.set_axis_off()
        for ax, image in zip(row, images, strict=False):
            _show(ax, image)
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8.5)
    if title:
        figure.suptitle(title, fontsize=9.5, fontweight="bold", x=0.01, ha="left")
    return figure


@styled
def image_panels(panels: Sequence[tuple[str, np.ndarray]], columns: int = 8) -> Figure:
    """Grids of images side by side; each panel is (title, (M, H, W) or (M, H, W, 3) in [0, 1])."""
    figure, axes = new_figure(1, len(panels), size=(4.2 * len(panels), 4.5))
    for ax, (title, images) in zip(axes[0], panels, strict=True):
        _show(ax, mosaic(images, columns))
        for spine in ax.spines.values():
            spine.set_visible(False)
        ax.set_title(title)
    return figure


def mosaic(images: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
    """Put (M, H, W[, 3]) images in [0, 1] into one image, `gap` white pixels between them."""
    rows = -(-len(images) // columns)
    height, width = images.shape[1:3]
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, *images.shape[3:])
    canvas = np.ones(shape, dtype=float)
    for index, image in enumerate(images):
        top = index // columns * (height + gap)
        left = index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


@styled
def latent_figure(
    points: np.ndarray, labels: Sequence[str] | None, axis_names: tuple[str, str]
) -> Figure:
    """Posterior means of the test split, `points` (N, 2), coloured by `labels` where given."""
    figure, ((ax,),) = new_figure(size=(5.6, 4.6))
    size = float(np.clip(4000 / len(points), 2, 16))
    names = sorted(set(labels), key=_first_number) if labels is not None else []
    if 1 < len(names) <= len(CATEGORIES) * 2:
        labels_N = np.asarray(labels)
        for index, name in enumerate(names):
            chosen = points[labels_N == name]
            marker = "o" if index < len(CATEGORIES) else "^"
            colour = CATEGORIES[index % len(CATEGORIES)]
            ax.scatter(*chosen.T, s=size, color=colour, marker=marker, lw=0, alpha=0.8, label=name)
        figure.legend(loc="outside right upper", markerscale=1.6, handletextpad=0.2)
    else:
        ax.scatter(*points.T, s=size, color=BLUE, lw=0, alpha=0.6)
    ax.set_xlabel(axis_names[0])
    ax.set_ylabel(axis_names[1])
    return figure


# --- pictures of tables --------------------------------------------------------------------------


@styled
def table_reconstructions(x: np.ndarray, mean: np.ndarray, names: Sequence[str]) -> Figure:
    """Each column observed, (N, D), against its reconstruction E[x|z], (N, D), raw units."""
    figure, panels = _column_panels(len(names))
    for ax, column, name in panels(names):
        ax.scatter(x[:, column], mean[:, column], s=5, color=BLUE, alpha=0.5, lw=0)
        limits = [x[:, column].min(), x[:, column].max()]
        ax.plot(limits, limits, color=MUTED, lw=0.9, ls=(0, (4, 3)))
        ax.set_title(name)
        ax.set_xlabel("observed")
        ax.set_ylabel("reconstructed")
    return figure


@styled
def table_samples(x: np.ndarray, samples: np.ndarray, names: Sequence[str]) -> Figure:
    """Each column's test values, (N, D), and draws from the model, (M, D), as densities."""
    figure, panels = _column_panels(len(names))
    for ax, column, name in panels(names):
        low, high = np.quantile(np.concatenate([x[:, column], samples[:, column]]), [0.002, 0.998])
        edges = np.linspace(low, high if high > low else low + 1.0, 31)
        ax.hist(x[:, column], bins=edges, density=True, color=MUTED, alpha=0.5, label="test")
        ax.hist(
            samples[:, column], bins=edges, density=True, histtype="step", color=BLUE, lw=1.4,
            label="model",
        )  # fmt: skip
        ax.set_title(name)
        ax.set_yticks([])
    figure.axes[0].legend(loc="best")
    return figure


@styled
def table_traversals(
    steps: np.ndarray, means: np.ndarray, dimensions: Sequence[int], names: Sequence[str]
) -> Figure:
    """How E[x|z] moves with one latent dimension at a time.

    Args:
        steps: (S,), in standard deviations of the aggregate posterior.
        means: (L, S, D), in standard deviations of each column.
        dimensions: the L latent dimensions' numbers.
        names: the D columns' names.
    """
    columns = min(3, len(dimensions))
    rows = -(-len(dimensions) // columns)
    figure, axes = new_figure(rows, columns, size=(3.2 * columns, 2.5 * rows + 0.4), sharey=True)
    strongest = np.argsort(np.ptp(means, axis=1).max(axis=0))[::-1][: len(CATEGORIES)]
    for ax in axes.flat[len(dimensions) :]:
        ax.set_axis_off()
    for ax, dimension, mean in zip(axes.flat, dimensions, means, strict=False):
        for index, column in enumerate(sorted(strongest)):
            ax.plot(steps, mean[:, column], color=CATEGORIES[index], lw=1.3, label=names[column])
        ax.set_title(f"z[{dimension}]")
    for ax in axes[:, 0]:
        ax.set_ylabel("E[x|z], standardised")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)))
    return figure


def _column_panels(count: int):
    shown = min(count, 9)
    columns = min(3, shown)
    rows = -(-shown // columns)
    figure, axes = new_figure(rows, columns, size=(2.9 * columns, 2.4 * rows))
    for ax in axes.flat[shown:]:
        ax.set_axis_off()

    def panels(names: Sequence[str]):
        return zip(axes.flat[:shown], range(shown), names, strict=False)

    return figure, panels


def _show(ax: Axes, image: np.ndarray) -> None:
    ax.imshow(np.clip(image, 0.0, 1.0), cmap="gray", vmin=0.0, vmax=1.0)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_linewidth(0.4)
        spine.set_color(GRID)
        spine.set_visible(True)


def _note(ax: Axes, words: str) -> Figure:
    ax.set_axis_off()
    ax.text(0.5, 0.5, words, ha="center", va="center", color=MUTED, transform=ax.transAxes)
    figure = ax.get_figure()
    assert isinstance(figure, Figure)
    return figure


def _first_number(text: str) -> tuple[float, str]:
    found = re.search(r"-?\d+(\.\d+)?", str(text))
    return (float(found.group()) if found else float("inf"), str(text))
