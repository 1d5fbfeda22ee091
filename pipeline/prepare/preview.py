"""preview.png: a page of the prepared examples, or the histograms of a table's columns.

Shapes: N examples, C channels, H height, W width.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from pipeline.figures import plain

ROWS, COLUMNS = 4, 16  # of images, for each split
EXAMPLES = ROWS * COLUMNS
PAGE_WIDTH = 1600
MOST_HISTOGRAMS = 16


def draw_preview(first: Mapping[str, np.ndarray], columns: Sequence[str] | None) -> bytes:
    """A PNG of each split's first examples, (N, C, H, W) or (N, columns)."""
    page = io.BytesIO()
    if columns is None:
        blocks = [_tile(x) for x in first.values()]
        Image.fromarray(np.concatenate(blocks).squeeze()).save(page, "PNG")
    else:
        figure = _histograms(next(iter(first.values())), columns)
        FigureCanvasAgg(figure).print_png(page)
    return page.getvalue()


def _tile(x: np.ndarray) -> np.ndarray:
    """(N, C, H, W) → (rows·(H+1), columns·(W+1), C): the examples, white where none is."""
    channels, height, width = x.shape[1:]
    columns = max(1, min(COLUMNS, PAGE_WIDTH // (width + 1)))
    page = np.full((ROWS * (height + 1), columns * (width + 1), channels), 255, np.uint8)
    scale = np.uint8(255 if x.max(initial=0) <= 1 else 1)
    for index, image in enumerate(x[: ROWS * columns]):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        page[top : top + height, left : left + width] = image.transpose(1, 2, 0) * scale
    return page


def _histograms(x: np.ndarray, columns: Sequence[str]) -> Figure:
    """One panel for each of the first columns."""
    shown = min(len(columns), MOST_HISTOGRAMS)
    across = min(shown, 4)
    down = -(-shown // across)
    figure = Figure(figsize=(2.4 * across, 1.8 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    for index, axis in enumerate(axes.flat):
        axis.set_visible(index < shown)
        if index < shown:
            axis.hist(x[:, index], bins=30, color="#2f6f9f")
            axis.set_title(plain(columns[index]), fontsize=9)
            axis.tick_params(labelsize=7)
            axis.set_yticks([])
    return figure
