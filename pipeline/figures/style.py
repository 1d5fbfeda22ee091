"""How every figure looks, and how it becomes a file or a part of a page.

Nothing here touches pyplot or any other global state.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.patches import Rectangle

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
LONGEST_NAME = 40
# Scripts that DejaVu lacks are drawn by one of these where it is installed.
FALLBACKS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC",
             "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
             "Droid Sans Fallback", "Noto Sans Arabic", "Noto Sans Hebrew",
             "Noto Sans Devanagari", "Noto Sans Thai", "Noto Emoji", "Unifont")  # fmt: skip
_installed = {font.name for font in font_manager.fontManager.ttflist}
STYLE["font.family"] = ["DejaVu Sans", *(name for name in FALLBACKS if name in _installed)]
MINUS = "\N{MINUS SIGN}"
styled = matplotlib.rc_context(STYLE)  # pyright: ignore[reportArgumentType]
PNG_DPI = 200
TIP = "tip:"  # begins the id of what a page explains under the pointer
MOST_STRIPS = 200
ABOVE_ALL = 20  # in matplotlib's order of drawing
PANEL = (4.2, 2.9)  # inches; readable both in a phone's column and in half a desktop page
SMALL_PANEL = (3.7, 2.8)  # the same in a third of it


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = PANEL, **kwargs: Any):
    """Return (figure, array of axes (rows, columns)) in the common style."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


@styled
def save(figure: Figure, path: Path) -> None:
    """Write the figure to `path`; the suffix chooses the format (png or svg)."""
    if Path(path).suffix == ".svg":
        Path(path).write_text(to_svg(figure, Path(path).stem))
        return
    with _any_script():
        FigureCanvasAgg(figure).print_figure(path, dpi=PNG_DPI, metadata={"Software": None})


@contextmanager
def _any_script() -> Iterator[None]:
    """Draw names in a script that no installed font has as boxes, and no warning for each letter.

    A page draws them right: its words are text, in the fonts of the browser.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def to_svg(figure: Figure, name: str) -> str:
    """Return the figure as an `<svg>` element to stand in a page.

    Neutral colours are CSS variables (--ink, --muted, --grid, --paper) with the light values as
    default; ids start with `name`, so that several figures can share a page. What `hover_strips`
    and `hover_point` marked has its words as attribute data-tip.
    """
    style: Any = {**STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style):
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with _any_script():
            FigureCanvasSVG(figure).print_figure(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(rf'<g id="{TIP}([^"]+)">', r'<g data-tip="\1">', svg)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour, f"var({variable}, {colour})")
    return svg.strip()


def hover_strips(ax: Axes, edges: Sequence[float], words: Sequence[str]) -> None:
    """Give the strips between `edges` words that a page shows under the pointer; draws nothing.

    Of more strips than a pointer can tell apart, every nth is marked, n strips wide.
    """
    step = -(-len(words) // MOST_STRIPS)
    for start in range(0, len(words), step):
        left, right = edges[start], edges[min(start + step, len(words))]
        ax.add_artist(
            Rectangle(
                (left, 0), right - left, 1, transform=ax.get_xaxis_transform(),
                facecolor="none", edgecolor="none", gid=TIP + words[start], zorder=ABOVE_ALL,
            )
        )  # fmt: skip


def hover_point(ax: Axes, x: float, y: float, words: str) -> None:
    """Give a point words that a page shows under the pointer; draws nothing."""
    clear: Any = {"facecolors": "none", "edgecolors": "none"}
    ax.scatter([x], [y], s=180, gid=TIP + words, zorder=ABOVE_ALL, **clear)


def plain(name: str) -> str:
    """A user's name as words of a figure: no mathematics, on one line, and not without end."""
    line = "".join(letter if letter.isprintable() else " " for letter in str(name))
    if len(line) > LONGEST_NAME:
        line = line[: LONGEST_NAME - 1] + "…"
    return line.replace("$", r"\$")


def name_legend(legend: Legend, names: Sequence[str]) -> None:
    """Write users' names into a legend, which leaves out those that begin with "_" by itself."""
    for entry, name in zip(legend.get_texts(), names, strict=True):
        entry.set_text(plain(name))


def note(ax: Axes, words: str) -> Figure:
    """Say in words what there is not to draw."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, words, ha="center", va="center", color=MUTED, transform=ax.transAxes)
    figure = ax.get_figure()
    assert isinstance(figure, Figure)
    return figure


def first_number(text: str) -> tuple[float, str]:
    """Sorting key by which "2" comes before "16"."""
    found = re.search(r"-?\d+(\.\d+)?", str(text))
    return (float(found.group()) if found else float("inf"), str(text))
