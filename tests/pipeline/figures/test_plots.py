"""Figures hold what they claim to show; SVGs can share a page and take its colours."""

import xml.etree.ElementTree as ET
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from pipeline.evaluate import gallery as pictures
from pipeline.figures import MINUS, panels, plots, save, to_svg
from vae.models import VAE, VAEConfig


def trials(**changes) -> pd.DataFrame:
    rows = [
        {
            "trial_id": f"{name}{size}",
            "latent_dim": size,
            "likelihood": name,
            "status": "ok",
            "valid_log_px": -1000.0 - size,
            "valid_log_px_se": 5.0,
            "valid_log_px_seed_se": None,
            "valid_bits_per_dim": score,
            "valid_bits_per_dim_se": 0.01,
            "valid_bits_per_dim_seed_se": None,
        }
        | changes
        for name, size, score in [("b", 16, 2.0), ("a", 2, 3.0), ("a", 16, 1.5), ("b", 2, 2.5)]
    ]
    return pd.DataFrame(rows)


def lines(ax) -> dict[str, list[float]]:
    """The data of each error bar by its label."""
    return {c.get_label(): list(c.lines[0].get_ydata()) for c in ax.containers}


def legend(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_sweep_draws_one_line_a_likelihood_in_the_order_of_sizes():
    (ax,) = plots.sweep_figure(trials()).axes
    assert lines(ax) == {"a": [3.0, 1.5], "b": [2.5, 2.0]}
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["2", "16"]
    assert any("best 1.500" in text.get_text() for text in ax.texts)


def test_sweep_draws_the_best_of_points_that_differ_in_other_keys():
    table = pd.concat([trials(), trials().assign(valid_bits_per_dim=[1.9, 3.5, 1.6, 2.6])])
    (ax,) = plots.sweep_figure(table).axes
    assert lines(ax) == {"a": [3.0, 1.5], "b": [2.5, 1.9]}


def test_sweep_bars_are_over_seeds_where_there_are_several():
    def bars(**changes) -> list[float]:
        (ax,) = plots.sweep_figure(trials(**changes)).axes
        (segments,) = ax.containers[0].lines[2]  # type: ignore[attr-defined]
        return [round(float(y[1, 1] - y[0, 1]), 6) for y in segments.get_segments()]

    assert bars() == [0.02, 0.02]
    assert bars(valid_bits_per_dim_seed_se=0.2) == [0.4, 0.4]


def test_sweep_in_nats_is_minus_log_px():
    (ax,) = plots.sweep_figure(trials(), "nats").axes
    assert lines(ax) == {"a": [1002.0, 1016.0], "b": [1002.0, 1016.0]}
    assert "nats" in ax.get_ylabel()


def test_sweep_without_bits_falls_back_to_nats():
    (ax,) = plots.sweep_figure(trials(valid_bits_per_dim=np.nan)).axes
    assert "nats" in ax.get_ylabel()


def test_sweep_counts_failed_trials():
    table = trials()
    table.loc[0, ["status", "valid_bits_per_dim"]] = ["died", np.nan]
    (ax,) = plots.sweep_figure(table).axes
    assert "1 of 4 points failed" in ax.get_title("left")
    assert lines(ax)["b"] == [2.5]


def test_pinned_sweep_says_so(tmp_path):
    table = trials(status="pinned", valid_bits_per_dim=np.nan).iloc[:1]
    (ax,) = plots.sweep_figure(table).axes
    assert "pinned" in ax.texts[0].get_text()
    plots.sweep_plot(table, tmp_path / "sweep.png")
    with Image.open(tmp_path / "sweep.png") as image:
        assert image.size[0] > 500


def test_svg_has_its_own_ids_and_the_pages_colours():
    svg = to_svg(plots.sweep_figure(trials()), "sweep")
    ET.fromstring(svg.replace("xlink:href", "href"))  # well formed
    assert "var(--ink, #20262e)" in svg
    assert "http" not in svg.replace("http://www.w3.org/", "")
    ids = [part.split('"')[0] for part in svg.split(' id="')[1:]]
    assert ids
    assert all(name.startswith("sweep-") for name in ids)
    used = {
        part.split('"')[0].split(")")[0]
        for part in svg.replace("url(#", 'href="#').split('href="#')[1:]
    }
    assert used <= set(ids)


def test_svg_is_the_same_each_time():
    assert to_svg(plots.sweep_figure(trials()), "s") == to_svg(plots.sweep_figure(trials()), "s")


def test_drawing_leaves_no_trace_in_matplotlib(tmp_path):
    before = dict(matplotlib.rcParams)
    save(plots.sweep_figure(trials()), tmp_path / "a.png")
    save(plots.sweep_figure(trials()), tmp_path / "a.svg")
    assert dict(matplotlib.rcParams) == before


def test_ladder_shows_the_gain_over_the_elbo():
    (ax,) = plots.ladder_figure({"100": -90.0, "1": -100.0, "10": -95.0}, -101.5).axes
    np.testing.assert_array_equal(ax.lines[1].get_xdata(), [1, 10, 100])
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), [-100.0, -95.0, -90.0])
    assert legend(ax) == [f"ELBO {MINUS}101.50", "bound from K samples"]
    assert ax.texts[0].get_text() == f"{MINUS}90.00\n(ELBO +11.50)"


def test_khat_separates_the_untrustworthy():
    khat = np.array([0.1, 0.3, 0.6, 0.9, np.nan])
    (ax,) = plots.khat_figure(khat).axes
    trusted, rest = (sum(bar.get_height() for bar in group) for group in ax.containers)
    assert (trusted, rest) == (3, 1)
    assert "25.0% above" in legend(ax)[0]


def test_khat_of_too_few_samples_says_so():
    (ax,) = plots.khat_figure(np.full(4, np.nan)).axes
    assert "25 importance samples" in ax.texts[0].get_text()


def test_histogram_counts_what_lies_beyond_the_axis():
    log_px = np.linspace(-110.0, -100.0, 200)
    baseline = np.append(np.full(9, -120.0), -1e6)
    (ax,) = plots.log_px_figure(log_px, baseline).axes
    assert "baseline (1 beyond the axis)" in legend(ax)
    counts = [sum(bar.get_height() for bar in group) for group in ax.containers]
    assert counts == [9, 200]


def test_extremes_are_the_worst_and_the_best():
    images = np.zeros((5, 2, 2)) + np.arange(5)[:, None, None] / 10
    figure = panels.extremes_figure(np.array([-3.0, -1.0, -5.0, -2.0, -4.0]), images, count=2)
    (ax,) = figure.axes
    shown = [float(np.max(image.get_array())) for image in ax.images]  # type: ignore
    assert shown == pytest.approx([0.2, 0.4, 0.1, 0.3])
    places = [image.get_extent() for image in ax.images]
    assert places[0][0] == places[2][0] < places[1][0] == places[3][0]
    words = [text.get_text() for text in ax.texts]
    assert words == ["worst", f"{MINUS}5", f"{MINUS}4", "best", f"{MINUS}1", f"{MINUS}2"]


@pytest.mark.parametrize(("rows", "columns"), [(1, 11), (4, 11), (8, 11), (3, 10), (3, 2)])
def test_no_label_of_a_row_is_cut_off(rows: int, columns: int):
    figure = panels.image_rows([("z[3]", np.zeros((columns, 28, 28)))] * rows)
    FigureCanvasAgg(figure).draw()
    (ax,) = figure.axes
    assert all(text.get_window_extent().x0 >= 0 for text in ax.texts)


def test_mosaic_places_every_image():
    images = np.arange(1, 6)[:, None, None] / 10 * np.ones((5, 2, 3))
    page = panels.mosaic(images, columns=2)
    assert page.shape == (8, 7)
    assert page[0, 0] == pytest.approx(0.1)
    assert page[3, 4] == pytest.approx(0.4)
    assert page[6, 0] == pytest.approx(0.5)
    assert page[6, 4] == 1.0  # nothing there
    assert page[2, 0] == 1.0  # the gap


@pytest.mark.parametrize(
    ("space", "value", "expected"), [("grey8", 51.0, 0.2), ("binary", 1.0, 1.0)]
)
def test_images_are_scaled_by_their_space(space, value, expected):
    x = torch.full((2, 1, 3, 4), value)
    np.testing.assert_allclose(pictures.to_images(x, space), np.full((2, 3, 4), expected))


def test_colour_images_keep_their_channels():
    x = torch.arange(3.0).view(1, 3, 1, 1).expand(2, 3, 4, 5) * 100
    images = pictures.to_images(x, "grey8")
    assert images.shape == (2, 4, 5, 3)
    np.testing.assert_allclose(images[0, 0, 0], [0.0, 100 / 255, 200 / 255])
    assert pictures.to_images(torch.ones(2, 5, 4, 4), "grey8").shape == (2, 4, 4)


def test_principal_components_find_the_long_axis():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(500, 4)) * [0.1, 5.0, 0.1, 1.0]
    scores, share = pictures.principal_components(points)
    assert abs(np.corrcoef(scores[:, 0], points[:, 1])[0, 1]) > 0.999
    assert share[0] == pytest.approx(25 / 26.02, abs=0.02)
    np.testing.assert_allclose(scores.var(0), np.sort(points.var(0))[::-1][:2], rtol=0.02)


CASES = [
    ((1, 6, 5), "grey8", "discretized_logistic", 3, {}),
    ((3, 4, 4), "grey8", "gaussian", 2, {}),
    ((1, 6, 5), "binary", "bernoulli", 1, {}),
    ((1, 6, 5), "binary", "bernoulli", (4, 2), {"posterior": "diagonal"}),
    ((1, 6, 5), "binary", "bernoulli", 3, {"posterior": "flow", "prior": "vamp"}),
    ((4,), "continuous", "student_t", 2, {}),
    ((1,), "continuous", "gaussian", 1, {"prior": "mixture"}),
    ((12,), "continuous", "laplace", 5, {}),
]


@pytest.mark.parametrize(("shape", "space", "likelihood", "latent_dim", "more"), CASES)
def test_every_kind_of_data_and_model_has_its_pictures(
    tmp_path, shape, space, likelihood, latent_dim, more
):
    torch.manual_seed(0)
    config = VAEConfig(
        data_shape=shape, space=space, likelihood=likelihood, latent_dim=latent_dim, hidden=(8,),
        **more,
    )  # fmt: skip
    highest = {"grey8": 256, "binary": 2, "continuous": 100}[space]
    x = torch.randint(0, highest, (30, *shape)).to(torch.uint8)
    gallery = pictures.Gallery(
        model=VAE(config).eval(), x=x, labels=[str(i % 3) for i in range(30)]
    )
    pictures.draw(gallery, np.linspace(-50, -10, 30), tmp_path)
    names = {path.stem for path in tmp_path.glob("*.png")}
    expected = {
        "reconstructions", "samples", "traversals", "latent_space", "activity", "histogram",
    }  # fmt: skip
    assert names == expected | ({"extremes"} if gallery.is_images else set())
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 3, f"{path.name} is blank"


def test_pictures_do_not_depend_on_what_was_drawn_before(tmp_path):
    torch.manual_seed(0)
    config = VAEConfig(
        data_shape=(1, 4, 4), space="grey8", likelihood="gaussian", latent_dim=2, hidden=(8,)
    )
    gallery = pictures.Gallery(model=VAE(config).eval(), x=torch.randint(0, 256, (20, 1, 4, 4)))
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        pictures.draw(gallery, np.linspace(-9, -1, 20), folder)
        drawn.append({path.name: path.read_bytes() for path in folder.glob("*.png")})
    assert drawn[0] == drawn[1]


def test_traversal_moves_one_dimension_over_the_aggregate_posterior():
    torch.manual_seed(0)
    config = VAEConfig(
        data_shape=(4,), space="continuous", likelihood="gaussian", latent_dim=3, hidden=(8,)
    )
    gallery = pictures.Gallery(model=VAE(config).eval(), x=torch.randn(400, 4))
    means = torch.randn(400, 3) * torch.tensor([1.0, 3.0, 0.1])
    with torch.inference_mode():
        dimensions, steps, moved = pictures.traversal(gallery, means, start=7)
    assert dimensions == [1, 0, 2]
    assert steps[0] == -3
    assert steps[-1] == 3
    for dimension, z in zip(dimensions, moved, strict=True):
        still = [d for d in range(3) if d != dimension]
        np.testing.assert_allclose(z[:, still], means[7, still].expand(len(steps), 2))
        assert (z[1:, dimension] > z[:-1, dimension]).all()


def test_curves_show_both_splits_and_the_kept_epoch():
    history = pd.DataFrame(
        {"epoch": [1, 2, 3], "is_best": [True, True, False]}
        | {f"{s}_{c}": [-9.0, -5.0, -6.0] for s in ("train", "valid") for c in dict(plots.CURVES)}
    )
    (ax,) = plots.curve_figure(history, "elbo").axes
    found = {
        line.get_label(): SimpleNamespace(x=line.get_xdata(), y=line.get_ydata())
        for line in ax.lines
    }
    assert list(found["validation"].y) == [-9.0, -5.0, -6.0]
    assert (list(found["kept weights"].x), list(found["kept weights"].y)) == ([2], [-5.0])
    assert [a.get_title("left") for a in plots.elbo_curves(history).axes] == [
        title for _, title in plots.CURVES
    ]
