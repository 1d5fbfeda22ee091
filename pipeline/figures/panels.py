"""Panels of images, of a table's columns and of the latent space, from arrays alone.

Every function returns a matplotlib `Figure`. Images are floats in [0, 1].
Shapes: N examples, H by W pixels, D data values, L latent dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from pipeline.figures.plots import draw_log_px, log_px_figure
from pipeline.figures.style import (
    BLUE,
    CATEGORIES,
    GRID,
    MINUS,
    MUTED,
    RED,
    first_number,
    name_legend,
    new_figure,
    plain,
    styled,
)

GAP = 0.06  # between two images, in widths of an image
LINE_INCHES, WORD_INCHES = 0.2, 0.48  # of what stands above an image
EXTREMES_INCHES = (5.3, 1.65)  # of the worst and the best images


@styled
def image_rows(rows: Sequence[tuple[str, np.ndarray]], title: str = "") -> Figure:
    """Labelled rows of images; each row is (label, (M, H, W) or (M, H, W, 3) in [0, 1])."""
    columns = max(len(images) for _, images in rows)
    height, width = rows[0][1].shape[1:3]
    scale = 5.0 / columns
    size = (5.6, max(0.8, len(rows) * scale * height / width + (0.4 if title else 0.1)))
    figure, ((ax,),) = new_figure(size=size)
    figure.get_layout_engine().set(h_pad=0.01)  # pyright: ignore
    _draw_rows(ax, rows)
    if title:
        figure.suptitle(title, fontsize=9.5, fontweight="bold", x=0.01, ha="left")
    return figure


@styled
def image_panels(panels: Sequence[tuple[str, np.ndarray]], columns: int = 8) -> Figure:
    """Grids of images side by side; each panel is (title, (M, H, W) or (M, H, W, 3) in [0, 1])."""
    figure, axes = new_figure(1, len(panels), size=(2.8 * len(panels), 3.05))
    for ax, (title, images) in zip(axes[0], panels, strict=True):
        _show(ax, mosaic(images, columns))
        ax.set_axis_off()
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
    names = sorted(set(labels), key=first_number) if labels is not None else []
    if 1 < len(names) <= len(CATEGORIES) * 2:
        labels_N = np.asarray(labels)
        for index, name in enumerate(names):
            chosen = points[labels_N == name]
            marker = "o" if index < len(CATEGORIES) else "^"
            colour = CATEGORIES[index % len(CATEGORIES)]
            ax.scatter(*chosen.T, s=size, color=colour, marker=marker, lw=0, alpha=0.8, label="-")
        legend = figure.legend(loc="outside right upper", markerscale=1.6, handletextpad=0.2)
        name_legend(legend, names)
    else:
        ax.scatter(*points.T, s=size, color=BLUE, lw=0, alpha=0.6)
    ax.set_xlabel(axis_names[0])
    ax.set_ylabel(axis_names[1])
    return figure


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
    figure, ((above,), (below,)) = new_figure(2, size=(5.6, 4.4), height_ratios=(1.6, 1.0))
    draw_log_px(above, log_px, None)
    _draw_extremes(below, log_px, images, count)
    return figure


@styled
def extremes_figure(log_px: np.ndarray, images: np.ndarray, count: int = 10) -> Figure:
    """The `count` worst and best images by log p(x), which stands above each, in nats."""
    figure, ((ax,),) = new_figure(size=(5.6, EXTREMES_INCHES[1]))
    _draw_extremes(ax, log_px, images, count)
    return figure


def _draw_extremes(ax: Axes, log_px: np.ndarray, images: np.ndarray, count: int) -> None:
    order = np.argsort(log_px)
    chosen = {"worst": order[:count], "best": order[::-1][:count]}
    rows = [(label, images[indices]) for label, indices in chosen.items()]
    words = [
        [f"{value:.0f}".replace("-", MINUS) for value in log_px[indices]]
        for indices in chosen.values()
    ]
    height, width = images.shape[1:3]
    across = EXTREMES_INCHES[0] / (min(count, len(images)) * (1 + GAP) * width)
    down = (EXTREMES_INCHES[1] / 2 - LINE_INCHES) / ((1 + GAP) * height)
    pixel = min(across, down)
    _draw_rows(ax, rows, words, line=LINE_INCHES / pixel, least=WORD_INCHES / pixel)


def _draw_rows(
    ax: Axes,
    rows: Sequence[tuple[str, np.ndarray]],
    words: Sequence[Sequence[str]] | None = None,
    line: float = 0.0,
    least: float = 0.0,
) -> None:
    """Labelled rows of images, in one axes: to lay out one for each image takes seconds.

    words: what stands above each image, `line` pixels high; a column is at least `least` wide.
    """
    height, width = rows[0][1].shape[1:3]
    columns = max(len(images) for _, images in rows)
    right, down = max(width * (1 + GAP), least), height + width * GAP + line
    frames = []
    for row, (label, images) in enumerate(rows):
        top = row * down + line
        ax.annotate(
            label, (0, top + height / 2), (-5, 0), ("axes fraction", "data"), "offset points",
            ha="right", va="center", fontsize=8.5,
        )  # fmt: skip
        for column, image in enumerate(images):
            left = column * right
            _show(ax, image, extent=(left, left + width, top + height, top))
            frames.append(Rectangle((left, top), width, height))
            if words is not None:
                middle = left + width / 2
                ax.text(middle, top - line / 4, words[row][column], ha="center", fontsize=7)
    ax.add_collection(PatchCollection(frames, facecolors="none", edgecolors=GRID, linewidths=0.4))
    ax.set_xlim(0, (columns - 1) * right + width)
    ax.set_ylim(len(rows) * down - GAP * width, 0)
    ax.set_axis_off()


@styled
def activity_figure(variance: np.ndarray, threshold: float) -> Figure:
    """Var_x E_q[z] of each latent dimension, (L,), largest first, with the limit of activity."""
    figure, ((ax,),) = new_figure()
    ordered = np.sort(variance)[::-1]
    colours = np.where(ordered > threshold, BLUE, RED)
    floor = min(threshold, float(ordered.min())) / 3
    places = np.arange(1, len(ordered) + 1)
    ax.bar(places, np.maximum(ordered, floor), bottom=0, color=colours, width=0.8)
    active = int((ordered > threshold).sum())
    words = f"limit {threshold}: {active} of {len(ordered)} active"
    ax.axhline(threshold, color=RED, lw=1.2, ls=(0, (4, 3)), label=words)
    ax.set_yscale("log")
    ax.set_ylim(max(floor, 1e-6), max(4.0, 4 * float(ordered.max())))
    ax.grid(axis="x", visible=False)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("latent dimension, most active first")
    ax.set_ylabel("variance of E[z|x] over x")
    ax.legend(loc="upper right")
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
        ax.set_title(plain(name))
        ax.set_xlabel("observed")
        ax.set_ylabel("reconstructed")
    return figure


@styled
def table_samples(x: np.ndarray, samples: np.ndarray, names: Sequence[str]) -> Figure:
    """Each column's test values, (N, D), and draws from the model, (M, D), as densities."""
    figure, panels = _column_panels(len(names))
    for ax, column, name in panels(names):
        low, high = np.quantile(np.concatenate([x[:, column], samples[:, column]]), [0.002, 0.998])
        edges = np.linspace(low, high if high > low else low + 1.0, 31).tolist()
        ax.hist(x[:, column], bins=edges, density=True, color=MUTED, alpha=0.5, label="test")
        ax.hist(
            samples[:, column], bins=edges, density=True, histtype="step", color=BLUE, lw=1.4,
            label="model",
        )  # fmt: skip
        ax.set_title(plain(name))
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
            ax.plot(steps, mean[:, column], color=CATEGORIES[index], lw=1.3, label="-")
        ax.set_title(f"z[{dimension}]")
    for ax in axes[:, 0]:
        ax.set_ylabel("E[x|z], standardised")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)))
    name_legend(legend, [str(names[column]) for column in sorted(strongest)])
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


def _show(ax: Axes, image: np.ndarray, **where: Any) -> None:
    ax.imshow(np.clip(image, 0.0, 1.0), cmap="gray", vmin=0.0, vmax=1.0, **where)
